"""Memory: the prediction is above what a forward takes and not far above; peaks are seen."""

import mmap

import pytest
import torch
from tiny import FAMILIES, tiny_model
from tiny_serve import byte_student, byte_teacher, byte_vocab

from mdm.canvas import SamplerSettings
from mdm.convert import make_bidirectional
from mdm.denoiser import Denoiser
from mdm.generate import Hole, fill, open_filling
from mdm.sampler import take_step
from mdm.serve.memory import MIB, PeakMeter, Reading, footprint, free_bytes, highest

CPU = torch.device("cpu")


def test_the_meter_sees_a_peak_that_is_gone_again():
    meter = PeakMeter(CPU)
    meter.reset()
    before = meter.read()
    # Pages of its own, touched and freed at once: the heap may have that much to spare.
    with mmap.mmap(-1, 64 * MIB) as pages:
        for start in range(0, len(pages), 4096):
            pages[start] = 1
    after = meter.read()
    assert after.rss_peak - before.rss_peak > 48 * MIB
    meter.reset()
    assert meter.read().rss_peak < after.rss_peak - 32 * MIB
    assert after.device is None


def test_highest_keeps_peaks_and_the_present():
    one, other = Reading(5, 9, 2, 8), Reading(6, 7, 1, 3)
    assert highest(one, other) == Reading(6, 9, 1, 8)
    assert highest(None, other) == other
    assert highest(Reading(5, 9), Reading(1, 10)) == Reading(1, 10)


def big_student(vocab=3000, hidden=64):
    """Large enough that tensors outweigh the allocator's noise."""
    student = byte_student()
    model = tiny_model("llama", vocab, layers=2, hidden=hidden)
    make_bidirectional(model)
    return Denoiser(model, student.vocab, shift=True).eval()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"block_length": 100},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"cfg_scale": 1.0},
        {"remasking": "entropy", "suppress_eos": True},
        {"block_length": 4, "steps": 100},
    ],
    ids=str,
)
def test_a_forward_takes_what_was_predicted(settings):
    """Allocations are counted by torch's profiler: exact, and the same on every machine."""
    from mdm.serve.models import hold
    from mdm.serve.units import fill_unit

    student = big_student()
    served = hold(student, name="big", source="-")
    hole = Hole((256, *[65] * 300), 400)
    how = SamplerSettings(**{"stop_at_eos": False, "steps": 4, **settings})
    predicted = fill_unit(served, student, 0, hole, how).step_bytes
    filling = open_filling(student, hole, how)
    peak = peak_allocation(lambda: take_step(student, {0: filling.canvas}))
    assert peak <= predicted <= 1.7 * peak, (peak / MIB, predicted / MIB)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_a_forward_of_any_family_takes_no_more_than_predicted(family, dtype, padded):
    model = tiny_model(family, 300, layers=3, hidden=64)
    make_bidirectional(model)
    vocab = byte_vocab().with_mask(None)
    denoiser = Denoiser(model.to(dtype), vocab, shift=True).eval()
    xt_BL = torch.full((4, 200), 65)
    document_ids_BL = torch.zeros_like(xt_BL)
    if padded:
        document_ids_BL[0, 150:] = -1
    wanted_BL = torch.zeros_like(xt_BL, dtype=torch.bool)
    wanted_BL[:, -2:] = True
    with torch.no_grad():
        peak = peak_allocation(lambda: denoiser(xt_BL, wanted_BL, document_ids_BL=document_ids_BL))
    always = denoiser.always_mask
    predicted = footprint(model).step_bytes(4, 200, 8, SamplerSettings(), padded=padded or always)
    assert peak <= predicted <= 2.5 * peak, (peak / MIB, predicted / MIB)


def peak_allocation(work):
    """Bytes that are allocated at the same time at most while `work` runs, beyond those before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    now = peak = 0
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak > 0
    return peak


def test_a_cache_of_a_teacher_is_predicted():
    teacher = byte_teacher()
    sizes = footprint(teacher.model)
    x_BL = torch.full((3, 200), 65)
    with torch.no_grad():
        cache = teacher.model(x_BL, use_cache=True).past_key_values
    held = sum(
        part.numel() * part.element_size()
        for layer in cache.layers
        for part in (layer.keys, layer.values)
    )
    assert held <= sizes.buffer_bytes(3, 200) <= 1.5 * held  # in whole grains of 64 tokens


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox", "gemma3", "starcoder2"])
def test_every_family_has_a_footprint(family):
    model = tiny_model(family, 50, layers=2, hidden=32)
    sizes = footprint(model)
    assert (sizes.layers, sizes.hidden, sizes.vocab, sizes.itemsize) == (2, 32, 50, 4)
    assert sizes.inner >= 32
    assert sizes.forward_bytes(2, 10) > sizes.forward_bytes(1, 10) > 0


def test_free_memory_is_a_number_of_this_machine():
    assert MIB < free_bytes(CPU) < 2**50


def test_filling_does_not_leave_memory_behind():
    student = byte_student()
    hole = Hole((256, 65), 8)
    fill(student, [hole], SamplerSettings())
    meter = PeakMeter(CPU)
    before = meter.read().rss
    for _ in range(20):
        fill(student, [hole], SamplerSettings())
    assert meter.read().rss - before < 8 * MIB
