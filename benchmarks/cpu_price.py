"""What a model says of real code with other numbers, against itself in float32.

A student is asked about random tokens that it sees masked, an AR model about the next one.
Shapes: R texts, L length, N positions asked for, V vocabulary.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mdm.autoregressive import Autoregressive
from mdm.denoiser import Denoiser
from mdm.diffusion import generator

MASKED = 0.5  # of a text that the student is asked about


def prices(
    exact: Denoiser | Autoregressive,
    models: Mapping[str, Denoiser | Autoregressive],
    x0_RL: torch.Tensor,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """How far each of the models is from `exact`, under its name; all are given the same masks."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for row, x0_L in enumerate(x0_RL):
        wanted_L = questions(exact, x0_L, (seed, row))
        exact_NV = logits_of(exact, x0_L, wanted_L)
        for name, model in models.items():
            other_NV = logits_of(model, x0_L, wanted_L)
            found[name].append(apart(exact_NV, other_NV, x0_L[wanted_L]))
    return {name: over_texts(texts) for name, texts in found.items()}


def questions(
    model: Denoiser | Autoregressive, x0_L: torch.Tensor, key: tuple[int, ...]
) -> torch.Tensor:
    """(L,) positions asked for, never the first: random ones, which a student sees masked, or all."""
    wanted_L = torch.ones_like(x0_L, dtype=torch.bool)
    if isinstance(model, Denoiser):
        random = generator("bench cpu", *key)
        wanted_L = torch.rand(len(x0_L), generator=random) < MASKED
        wanted_L[-1] = True  # so there is one
    wanted_L[0] = False
    return wanted_L


@torch.no_grad()
def logits_of(
    model: Denoiser | Autoregressive, x0_L: torch.Tensor, wanted_L: torch.Tensor
) -> torch.Tensor:
    """(N, V) float32 logits of the wanted positions; the lowest number for what cannot be written."""
    if isinstance(model, Denoiser):
        xt_L = x0_L.masked_fill(wanted_L, model.mask_id)
        clean_bL = None if model.block_size is None else x0_L[None]
        logits_NV: torch.Tensor = model(xt_L[None], wanted_L[None], x0_bL=clean_bL)
        return logits_NV.clamp_min(torch.finfo(torch.float32).min)  # -inf has no differences
    logits_LV = model.model(x0_L[None], use_cache=False).logits[0, :, : len(model.vocab)].float()
    found: torch.Tensor = logits_LV.roll(1, dims=0)[wanted_L]
    return found


def apart(
    exact_NV: torch.Tensor, other_NV: torch.Tensor, target_N: torch.Tensor
) -> dict[str, float]:
    """How far the other logits are from the exact ones: nats a token, a share, the largest difference."""
    exact, other = exact_NV.double().log_softmax(-1), other_NV.double().log_softmax(-1)
    return {
        "kl": float((exact.exp() * (exact - other)).sum(-1).mean()),
        "cross_entropy": float((exact - other).gather(1, target_N[:, None]).mean()),
        "same_argmax": float((exact.argmax(-1) == other.argmax(-1)).double().mean()),
        "largest": float((exact_NV - other_NV).abs().max()),
        "tokens": len(target_N),
    }


def over_texts(texts: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Means over texts with their standard errors; the largest of the largest."""
    found: dict[str, Any] = {
        "tokens": int(sum(text["tokens"] for text in texts)),
        "n": len(texts),
        "largest": max(text["largest"] for text in texts),
    }
    for name in ("kl", "cross_entropy", "same_argmax"):
        values = [text[name] for text in texts]
        found[name] = {"mean": statistics.fmean(values), "std_err": standard_error(values)}
    return found


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None if there is but one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
