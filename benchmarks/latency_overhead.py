"""What mdm's loop takes beside the bare calls of the model: choosing, bookkeeping, masks, caches.

Every step of a real run is timed, and straight after it the same forward alone: body and head of the
`transformers` model on the same tokens, with positions, mask and the places of its keys made beforehand.
The two take turns, so what else the machine does hits both.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache

from mdm import attention
from mdm.buffers import Batch, Layer
from mdm.denoiser import Denoiser
from mdm.sampler import make_canvas, take_step

from .latency_models import Models, Prompts
from .latency_settings import LatencyBench
from .serve_report import mean_and_error

Note = Callable[[str], None]
LENGTH = 64  # tokens of a text here


def overhead(
    settings: LatencyBench, models: Models, prompts: Prompts, note: Note
) -> dict[str, Any]:
    """Seconds of steps and of bare forwards, medians over all steps, and what the loop takes on top.

    Every text gives a ratio, of its sums less 1; the mean and its standard error are over texts.
    """
    student, shares, steps, bares = models.student, [], [], []
    for ids in prompts.student:
        own_steps, own_bares = _timed(student, list(ids), settings)
        shares.append(sum(own_steps) / sum(own_bares) - 1)
        steps += own_steps
        bares += own_bares
    mean, error = mean_and_error(shares)
    note(f"overhead of the loop {mean:.1%}")
    return {
        "texts": len(shares),
        "steps": len(steps),
        "decoding": settings.chosen.name,
        "step_s_median": statistics.median(steps),
        "bare_s_median": statistics.median(bares),
        "median_share": statistics.median(a / b for a, b in zip(steps, bares, strict=True)) - 1,
        "share": mean,
        "share_std_err": error,
    }


def _timed(
    student: Denoiser, ids: list[int], settings: LatencyBench
) -> tuple[list[float], list[float]]:
    """Seconds of every step of a text, and of the bare forward after it."""
    decoding = settings.chosen
    sampler = decoding.sampler(
        suppress_eos=True,
        block_length=settings.block_length,
        cache=settings.cache,
        refresh=settings.refresh,
    )
    length = min(LENGTH, settings.gen_length)
    canvas = make_canvas(
        student,
        [*ids, *[student.mask_id] * length],
        sampler,
        tokens_per_step=decoding.tokens_per_step,
    )
    runner, caught = student.runner, []

    def body(reader: Any, batch: Batch) -> torch.Tensor:
        caught.append(batch)
        return runner.body(reader, batch)

    steps, bares = [], []
    student.runner = dataclasses.replace(runner, body=body)
    try:
        while not canvas.finished:
            before, count = canvas.ids_L.clone(), len(canvas.open_positions())
            began = time.perf_counter()
            take_step(student, {0: canvas})
            steps.append(time.perf_counter() - began)
            call = _bare(student, caught.pop() if caught else None, before, count)
            began = time.perf_counter()
            call()
            bares.append(time.perf_counter() - began)
    finally:
        student.runner = runner
    return steps, bares


def _bare(
    student: Denoiser, batch: Batch | None, ids_L: torch.Tensor, count: int
) -> Callable[[], torch.Tensor]:
    """The same forward as a call of the model, everything it is given made already."""
    body, head, device = (
        student.model.base_model,
        student.model.get_output_embeddings(),
        student.device,
    )
    if batch is None:  # a whole canvas, without a cache
        x_BL, options = ids_L[None].to(device), {"use_cache": False}
    else:
        x_BL, options = batch.x_BQ.to(device), _options(student, batch)

    @torch.no_grad()
    def call() -> torch.Tensor:
        logits_NV: torch.Tensor = head(body(x_BL, **options)[0][0, -count:])
        return logits_NV.argmax(-1).cpu()

    return call


def _options(student: Denoiser, batch: Batch) -> dict[str, Any]:
    device, config = student.device, student.model.config.get_text_config()
    where = None
    if batch.start is None:
        where = (torch.arange(len(batch.x_BQ))[:, None].to(device), batch.place_BQ.to(device))
    mask = None
    if not batch.plain:
        seen = batch.visible(batch.queries, batch.keys)
        assert isinstance(seen, torch.Tensor), "a student has one kind of layer"
        mask = attention.float_mask(seen, student.model.dtype).to(device)
    layers = [Layer(batch, index, where) for index in range(config.num_hidden_layers)]
    return {
        "attention_mask": mask,
        "position_ids": batch.queries.position.to(device),
        "past_key_values": Cache(layers=layers),
        "use_cache": True,
    }
