"""From text to text: what is put on the canvas, and what comes back."""

from dataclasses import replace

import pytest
import torch
from students import ScriptedStudent, random_student
from tiny import CHAT_TEMPLATE
from tiny import START as START_TOKEN

from mdm.canvas import SamplerSettings
from mdm.errors import ConfigError, VocabError
from mdm.generate import Request, encode, generate, request_of

START, END, PAD, MASK, V = 12, 13, 14, 15, 16
GREEDY = SamplerSettings()


def scripted(tokens_L):
    """A student that writes this row, left to right."""
    logits_LV = torch.zeros(len(tokens_L), V)
    for i, token in enumerate(tokens_L):
        logits_LV[i, token] = 30.0 - i
    return ScriptedStudent(lambda xt_BL: logits_LV.expand(len(xt_BL), -1, -1))


# --- the canvas ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Request("w1 w2", None, 3), [START, 1, 2, MASK, MASK, MASK]),
        (Request("", None, 1), [START, MASK]),
        (Request("w1", "w2 w3", 2), [START, 1, MASK, MASK, 2, 3]),
        (Request("", "w2", 1), [START, MASK, 2]),
    ],
)
def test_canvas_of_a_request(request_, expected):
    assert encode(random_student(), request_) == expected


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHAT_TEMPLATE.replace(START_TOKEN, "")])
def test_a_chat_has_one_start_token(template):
    # Data rows are made so too: a template may bring a start token of its own.
    denoiser = random_student()
    denoiser.vocab.tokenizer.chat_template = template
    ids = encode(denoiser, Request("w3", None, 2, chat=True))
    assert ids[0] == START
    assert ids[1] != START
    assert 3 in ids
    assert ids[-2:] == [MASK, MASK]


def test_a_chat_needs_a_template():
    with pytest.raises(VocabError, match="no chat template"):
        encode(random_student(), Request("w3", None, 2, chat=True))


def test_a_request_wants_at_least_one_token():
    with pytest.raises(ConfigError, match="tokens to fill must be >= 1; got 0"):
        Request("w1", None, 0)


# --- what comes back -----------------------------------------------------------------------------


def test_text_ends_before_the_end_token():
    (found,) = generate(scripted([0, 0, 4, 5, END, 6]), [Request("w1", None, 4)], GREEDY)
    assert (found.text, found.num_tokens, found.finish_reason) == ("w4 w5", 2, "stop")
    assert found.token_ids == [4, 5, END, END]
    assert found.nfe == 3


def test_text_without_an_end_has_the_length_asked_for():
    (found,) = generate(scripted([0, 0, 4, 5, 6]), [Request("w1", None, 3)], GREEDY)
    assert (found.text, found.num_tokens, found.finish_reason) == ("w4 w5 w6", 3, "length")
    assert found.nfe == 3


def test_a_hole_has_the_length_asked_for():
    # The likeliest token is the end, everywhere; between a prefix and a suffix it is no choice.
    logits_V = torch.zeros(V)
    logits_V[END], logits_V[7] = 5.0, 4.0
    denoiser = ScriptedStudent(lambda xt_BL: logits_V.expand(*xt_BL.shape, V))
    hole, prompt = generate(denoiser, [Request("w1", "w2", 3), Request("w1", None, 3)], GREEDY)
    assert (hole.token_ids, hole.finish_reason) == ([7, 7, 7], "length")
    assert (prompt.token_ids, prompt.text, prompt.finish_reason) == ([END] * 3, "", "stop")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_hole_at_the_end_is_a_continuation(temperature):
    denoiser = random_student(shift=True)
    settings = SamplerSettings(temperature=temperature, suppress_eos=True)
    (hole,) = generate(denoiser, [Request("w1 w2", "", 6)], settings)
    assert [hole] == generate(denoiser, [Request("w1 w2", None, 6)], settings)


def test_requests_of_one_batch_are_those_of_single_calls_at_row_0():
    denoiser = random_student(shift=True)
    settings = SamplerSettings(steps=3, cfg_scale=0.5)
    requests = [Request("w1 w2 w3 w4", None, 6), Request("w5", "w6 w7", 6), Request("", None, 3)]
    alone = [generate(denoiser, [request], settings)[0] for request in requests]
    assert generate(denoiser, requests, settings) == alone
    assert generate(denoiser, [], settings) == []


def test_samples_of_one_request_differ_and_reproduce():
    denoiser = random_student()
    settings = SamplerSettings(temperature=2.0)
    requests = [Request("w1", None, 8)] * 3
    results = generate(denoiser, requests, settings, seed=1)
    assert len({result.text for result in results}) == 3
    assert generate(denoiser, requests, settings, seed=1) == results
    assert generate(denoiser, requests, settings, seed=2) != results
    # Row 0 of a batch is the single call.
    assert generate(denoiser, requests[:1], settings, seed=1) == results[:1]


def test_watch_sees_every_step():
    seen = []
    denoiser = random_student()
    generate(
        denoiser,
        [Request("w1", None, 4), Request("w1", None, 2)],
        replace(GREEDY, stop_at_eos=False),
        watch=lambda step, canvases: seen.append(
            (step.step, [int(canvas.open_L.sum()) for canvas in canvases])
        ),
    )
    assert seen == [(0, [3, 1]), (1, [2, 0]), (2, [1, 0]), (3, [0, 0])]


@pytest.mark.parametrize("mask_token", [None, "<|pad|>"])
def test_compat_pads_left_and_padding_is_no_hole(mask_token):
    # A vocabulary may use its pad token as mask.
    denoiser = random_student(shift=True)
    denoiser.vocab = denoiser.vocab.with_mask(mask_token)
    denoiser.mask_id = denoiser.vocab.mask_id
    settings = SamplerSettings(compat="llada", steps=4, block_length=4)
    requests = [Request("w1 w2 w3 w4", None, 4), Request("w5", None, 4)]
    short_and_long = generate(denoiser, requests, settings)
    assert generate(denoiser, requests[1:], settings) == short_and_long[1:]
    assert [result.nfe for result in short_and_long] == [4, 4]


# --- the command line's request ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("p", None, None, None, 9), Request("p", None, 9)),
        ((None, "a", "b", 3, 9), Request("a", "b", 3)),
        ((None, "a", None, 3, 9), Request("a", "", 3)),
        ((None, None, "b", 3, 9), Request("", "b", 3)),
        ((None, None, None, 3, 9), Request("", "", 3)),
    ],
)
def test_request_of(arguments, expected):
    assert request_of(*arguments) == expected


def test_request_of_a_chat():
    assert request_of("p", None, None, None, 9, chat=True) == Request("p", None, 9, chat=True)


@pytest.mark.parametrize(
    ("arguments", "chat", "text"),
    [
        ((None, None, None, None, 9), False, "give a PROMPT to continue, or --prefix"),
        (("p", "a", None, None, 9), False, "give either a PROMPT or --prefix/--suffix, not both"),
        (("p", None, None, 4, 9), False, "give either a PROMPT or --prefix/--suffix, not both"),
        ((None, "a", "b", None, 9), False, "need --span N"),
        ((None, "a", "b", 4, 9), True, "--chat needs a PROMPT"),
        ((None, "a", "b", 0, 9), False, "must be >= 1; got 0"),
        (("p", None, None, None, 0), False, "must be >= 1; got 0"),
    ],
)
def test_what_is_no_request(arguments, chat, text):
    with pytest.raises(ConfigError, match=text):
        request_of(*arguments, chat=chat)
