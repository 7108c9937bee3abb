"""The picture of a canvas: what is shown as what, on a terminal and elsewhere."""

import io

from rich.console import Console
from students import random_student

from mdm.canvas import SamplerSettings
from mdm.generate import Request, generate
from mdm.sampler import denoise, make_canvas
from mdm.view import OPEN, DenoisingView

SETTINGS = SamplerSettings(steps=2, stop_at_eos=False, suppress_eos=True)


def shown(terminal):
    denoiser = random_student()
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    with DenoisingView(denoiser.vocab, console) as view:
        requests = [Request("w1 w2", "w3", 4), Request("w4", None, 4)]
        results = generate(denoiser, requests, SETTINGS, watch=view)
    return console.file.getvalue(), results


def test_elsewhere_every_step_is_one_picture_of_the_first_canvas():
    text, (first, _) = shown(terminal=False)
    assert "\x1b" not in text
    pictures = text.split("── step ")[1:]
    assert [picture.split(" ──")[0] for picture in pictures] == ["1, 2 open", "2, 0 open"]
    assert pictures[0].count(OPEN) == 2
    decided = first.text.replace(" ", "")
    assert pictures[1].splitlines()[1] == f"w1 w2{decided}w3"


def test_a_terminal_shows_the_last_picture_in_place():
    text, _ = shown(terminal=True)
    assert "\x1b[" in text
    assert "step 2, 0 open" in text


def test_given_open_and_decided_tokens_look_different():
    denoiser = random_student()
    vocab = denoiser.vocab
    view = DenoisingView(vocab, Console(file=io.StringIO()))
    ids = [vocab.start_id, 1, vocab.mask_id, vocab.mask_id, vocab.mask_id, 2, 3]
    canvas = make_canvas(denoiser, ids, SamplerSettings())
    canvas.ids_L[3], canvas.open_L[3] = 7, False
    picture = view.draw(canvas, 0)
    pieces = [(picture.plain[s.start : s.end], str(s.style)) for s in picture.spans]
    assert pieces == [
        ("w1", "dim"),
        (OPEN, "bright_black"),
        ("w7", view.colour(3)),
        (OPEN, "bright_black"),
        ("w2 w3", "dim"),
    ]


def test_markup_in_text_is_text():
    # Code is full of square brackets.
    denoiser = random_student()
    view = DenoisingView(denoiser.vocab, Console(file=io.StringIO()))
    view.vocab = type("V", (), {"decode": lambda self, ids: "[red]x[0]"})()
    canvas = make_canvas(denoiser, [1, denoiser.mask_id], SamplerSettings())
    assert "[red]x[0]" in view.draw(canvas, 0).plain


def test_confidence_is_that_of_the_first_canvas():
    denoiser = random_student()
    view = DenoisingView(denoiser.vocab, Console(file=io.StringIO()))
    rows = [[1, denoiser.mask_id], [1, 2, 3, denoiser.mask_id]]
    canvases = [make_canvas(denoiser, ids, SETTINGS) for ids in rows]
    for step in denoise(denoiser, canvases):
        view(step, canvases)
    assert view.confidence.keys() == {1}


def test_colours_go_from_red_to_green():
    denoiser = random_student()
    view = DenoisingView(denoiser.vocab, Console(file=io.StringIO()))
    view.confidence = {1: 0.0, 2: 1.0, 3: float("-inf"), 4: -3.2}
    assert view.colour(1) == view.colour(3) == view.colour(4) == "rgb(220,40,60)"
    assert view.colour(2) == "rgb(0,220,60)"
    assert view.colour(99) == view.colour(1)
