"""Forwards of fixed shape say what others say, and what is recorded is played again.

There is no GPU here: what a graph does (run the same call on the same tensors) is done by calling it again.
"""

import gc
from dataclasses import replace

import pytest
import torch
from students import random_student
from test_autoregressive import HOLES as TEXTS
from test_autoregressive import random_ar

from mdm.acceleration import (
    LEAST_CAPACITY,
    MOST_IDLE,
    MOST_READ,
    REFUSED,
    Static,
    accelerate,
)
from mdm.attention import BLOCK_ATTENTIONS
from mdm.autoregressive import DecodingSettings, write
from mdm.buffers import EAGER
from mdm.canvas import SamplerSettings
from mdm.errors import ConfigError
from mdm.sampler import denoise, make_canvas, open_logits, take_step

START, END, MASK = 12, 13, 15
FULL = SamplerSettings(stop_at_eos=False)
TEXT = [START, 3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


class Recorder:
    """Plays a call again by making it; counts calls of each kind."""

    def __init__(self):
        self.recorded = self.played = 0

    def __call__(self, run, device):
        self.recorded += 1

        def play():
            self.played += 1
            return run()

        return play


def static(reader):
    recorder = Recorder()
    runner = Static(recorder)
    reader.runner = runner.runner()
    return runner, recorder


def run(denoiser, canvases, batch_size=None):
    for _ in denoise(denoiser, canvases, batch_size=batch_size):
        pass
    return [canvas.ids_L.tolist() for canvas in canvases]


@pytest.mark.parametrize("attention", BLOCK_ATTENTIONS)
@pytest.mark.parametrize(("family", "shift"), [("llama", True), ("gemma3", False)])
def test_steps_of_fixed_shape_equal_those_of_their_own(family, shift, attention):
    denoiser = random_student(family, block_size=3, layers=2, shift=shift, attention=attention)
    runner, recorder = static(denoiser)
    fixed = denoiser.runner

    def by(runner, step, *arguments):
        denoiser.runner = runner
        return step(denoiser, *arguments)

    for length in range(1, 8):  # without a token in front all masks are alike
        ids = [*TEXT[:length], *[MASK] * 7]
        one, two = make_canvas(denoiser, ids, FULL), make_canvas(denoiser, ids, FULL)
        while not one.finished:
            (expected,), (found,) = by(EAGER, open_logits, [one]), by(fixed, open_logits, [two])
            assert torch.allclose(found[:, :MASK], expected[:, :MASK], atol=1e-4, rtol=1e-4)
            by(EAGER, take_step, {0: one})
            by(fixed, take_step, {0: two})
        assert one.ids_L.tolist() == two.ids_L.tolist()
    assert recorder.played > 50
    # 1 … 9 tokens are read, so 1, 2, 4, 8 or 16; a buffer for those who look and one for who goes on.
    assert recorder.recorded <= 10
    assert len(runner.storages[1, LEAST_CAPACITY]) <= 2
    assert set(runner.reasons) == {"the first forward in a new buffer"}


def test_rows_of_any_length_share_what_is_recorded():
    denoiser = random_student(block_size=3, layers=2, shift=True)
    settings = [FULL, replace(FULL, threshold=0.3), replace(FULL, cfg_scale=0.7), FULL]
    rows = [[*TEXT[:n], *[MASK] * m] for n, m in ((3, 5), (11, 4), (2, 9), (7, 3))]

    def canvases():
        return [make_canvas(denoiser, ids, own) for ids, own in zip(rows, settings, strict=True)]

    expected = run(denoiser, canvases())
    _, recorder = static(denoiser)
    for batch_size in (None, 2, 1):
        assert run(denoiser, canvases(), batch_size) == expected
    assert recorder.played > recorder.recorded


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_approximate_caches_are_recorded_too(cache):
    denoiser = random_student(layers=2, shift=True)
    settings = replace(FULL, cache=cache, block_length=4)
    rows = [[START, 4, *[MASK] * 9], [START, *[MASK] * 6, 3]]

    def canvases():
        return [make_canvas(denoiser, ids, settings) for ids in rows]

    expected = run(denoiser, canvases())
    _, recorder = static(denoiser)
    assert run(denoiser, canvases()) == expected
    assert recorder.played > recorder.recorded


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_an_ar_model_is_treated_alike(family):
    ar = random_ar(family)
    settings = DecodingSettings(temperature=1.2)
    expected = [one.token_ids for one in write(ar, TEXTS, settings)]
    _, recorder = static(ar)
    for batch_size in (1, 3, 8):
        found = write(ar, TEXTS, settings, batch_size=batch_size)
        assert [one.token_ids for one in found] == expected
    assert recorder.played > 2 * recorder.recorded


def test_buffers_and_recordings_serve_again():
    denoiser = random_student(block_size=3)
    runner, recorder = static(denoiser)
    ids = [*TEXT[:5], *[MASK] * 9]
    run(denoiser, [make_canvas(denoiser, ids, FULL)])
    once = recorder.recorded
    gc.collect()
    for _ in range(3):
        run(denoiser, [make_canvas(denoiser, ids, FULL)])
    assert once == 3  # a block, a block with the one before, the last with that before it
    assert recorder.recorded == once
    assert len(runner.storages[1, LEAST_CAPACITY]) == 1
    # Two texts at once that do not share forwards need two.
    one, two = (make_canvas(denoiser, ids, FULL) for _ in range(2))
    for canvas in (one, two, one):
        take_step(denoiser, {0: canvas})
    assert len(runner.storages[1, LEAST_CAPACITY]) == 2


def test_long_prompts_are_read_as_they_are_and_long_texts_move():
    denoiser = random_student(block_size=4)
    ids = [START, *[3, 4, 5] * 100, *[MASK] * 6]
    expected = run(denoiser, [make_canvas(denoiser, ids, FULL)])
    runner, _ = static(denoiser)
    assert run(denoiser, [make_canvas(denoiser, ids, FULL)]) == expected
    assert runner.reasons[f"more than {MOST_READ} tokens are read at once"] == 1
    assert list(runner.storages) == [(1, 512)]


def test_what_cannot_be_recorded_is_run_and_says_why(caplog):
    denoiser = random_student(block_size=3)
    ids = [*TEXT[:5], *[MASK] * 9]
    expected = run(denoiser, [make_canvas(denoiser, ids, FULL)])

    def refusing(run, device):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    runner = Static(refusing)
    denoiser.runner = runner.runner()
    assert run(denoiser, [make_canvas(denoiser, ids, FULL)]) == expected
    # Counted for every forward; said once for each shape.
    forwards = len(expected[0]) - 5
    assert sum(runner.reasons.values()) == forwards
    assert runner.reasons[REFUSED] > 5
    assert "operation not permitted when stream is capturing" in caplog.text
    assert caplog.text.count(REFUSED) < runner.reasons[REFUSED]


def test_running_out_of_memory_while_recording_is_told():
    def full(run, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    denoiser = random_student(block_size=3)
    denoiser.runner = Static(full).runner()
    with pytest.raises(torch.OutOfMemoryError):
        run(denoiser, [make_canvas(denoiser, [*TEXT[:5], *[MASK] * 9], FULL)])


def test_what_a_broken_text_left_is_gone():
    """A buffer that held NaN serves again: a mask adds to a number, and NaN stays NaN."""
    denoiser = random_student(block_size=3)
    ids = [*TEXT[:5], *[MASK] * 4]
    expected = run(denoiser, [make_canvas(denoiser, ids, FULL)])
    runner, _ = static(denoiser)
    run(denoiser, [make_canvas(denoiser, ids, FULL)])
    for storage in runner.storages[1, LEAST_CAPACITY]:
        for parts in storage.layers.values():
            for part in parts:
                part.fill_(torch.nan)
    assert run(denoiser, [make_canvas(denoiser, ids, FULL)]) == expected


def test_rows_that_leave_one_by_one_need_few_recordings():
    ar = random_ar()
    holes = [replace(TEXTS[0], length=n, stop=(), key=(0, n)) for n in range(2, 10)]
    settings = DecodingSettings(suppress_eos=True)
    expected = [one.token_ids for one in write(ar, holes, settings)]
    runner, recorder = static(ar)
    assert [one.token_ids for one in write(ar, holes, settings)] == expected
    assert sorted(runner.storages) == [(n, LEAST_CAPACITY) for n in (1, 2, 4, 8)]
    assert recorder.recorded <= 8
    assert sum(len(own) for own in runner.storages.values()) <= 8


def test_memory_that_serves_nobody_is_let_go():
    denoiser = random_student(block_size=3)
    runner, _ = static(denoiser)
    ids = [*TEXT[:5], *[MASK] * 4]
    canvases = [make_canvas(denoiser, ids, FULL) for _ in range(9)]
    for canvas in canvases:  # nine texts at once that share no forward
        take_step(denoiser, {0: canvas})
    own = runner.storages[1, LEAST_CAPACITY]
    assert len(own) == 9
    for canvas in canvases:
        run(denoiser, [canvas])
    take_step(denoiser, dict(enumerate([make_canvas(denoiser, ids, FULL) for _ in range(2)])))
    assert len(own) == MOST_IDLE


def test_a_text_begun_in_another_mode_goes_on():
    denoiser = random_student(block_size=3)
    ids = [*TEXT[:5], *[MASK] * 9]
    expected = run(denoiser, [make_canvas(denoiser, ids, FULL)])
    canvas = make_canvas(denoiser, ids, FULL)
    for _ in range(3):
        take_step(denoiser, {0: canvas})
    runner, _ = static(denoiser)
    assert run(denoiser, [canvas]) == expected
    assert set(runner.reasons) == {"a buffer of a text that was begun in another mode"}


def test_a_head_that_is_not_plain_cannot_be_recorded():
    denoiser = random_student("granite", block_size=3)
    with pytest.raises(ConfigError, match="the head of GraniteForCausalLM is more than a matrix"):
        accelerate(denoiser, "compile")
    assert denoiser.runner is EAGER


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_compiled_forwards_are_the_same(kind, monkeypatch):
    """Traced by torch's compiler; the code it would generate is the compiler's own affair."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: real(f, backend="aot_eager"))
    reader = random_student(block_size=3, shift=True) if kind == "student" else random_ar()

    def text():
        if kind == "student":
            return run(reader, [make_canvas(reader, [*TEXT[:5], *[MASK] * 7], FULL)])
        return [one.token_ids for one in write(reader, TEXTS[:2], DecodingSettings())]

    expected = text()
    accelerate(reader, "compile")
    assert text() == expected
    accelerate(reader, "eager")
    assert reader.runner is EAGER


def test_modes_that_are_not_there():
    denoiser = random_student(block_size=3)
    with pytest.raises(ConfigError, match=r"unknown mode 'graph'; did you mean 'graphs'"):
        accelerate(denoiser, "graph")
    with pytest.raises(ConfigError, match="records what a GPU is told, but this model is on cpu"):
        accelerate(denoiser, "graphs")


def test_layers_of_8_bits_are_not_compiled(monkeypatch):
    denoiser = random_student(block_size=3)
    monkeypatch.setattr("mdm.acceleration.is_quantised", lambda model: model is denoiser.model)
    with pytest.raises(ConfigError, match="finds nothing to compile in layers of 8 bits"):
        accelerate(denoiser, "compile")
