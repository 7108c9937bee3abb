"""The bytes of a sparse target on disk: 6K + 4 for K kept tokens, lowest first.

    3K  ids of the kept tokens
    3K  their log-probabilities as whole numbers, -log p · 2^18 rounded; 2^24 - 1 marks an unused slot
    4   tail mass, the bits of a float32

A log-probability is off by at most 2^-19 nats; the least one is -63.99999 (probability 1e-28). A
position that was not asked for, or to which the teacher has no counterpart, has unused slots only.
Shapes: N positions, K kept tokens, M numbers, W bytes of a token, X bytes of numbers.
"""

from __future__ import annotations

import torch

from .targets import NOT_KEPT, SoftTargets

_STEPS = 2.0**18  # a nat
_UNUSED = 2**24 - 1


def width(top_k: int) -> int:
    """Bytes of a token."""
    return 6 * top_k + 4


def encode(targets: SoftTargets, top_k: int) -> torch.Tensor:
    """(N, W) uint8 on the CPU, with slots for `top_k` tokens; the targets have no more than that."""
    ids_NK, log_probs_NK, tail_N = (tensor.cpu() for tensor in targets.tensors)
    rows, kept = ids_NK.shape
    assert kept <= top_k, "more tokens than slots"
    assert not ids_NK.numel() or int(ids_NK.max()) < 2**24, "ids have three bytes"
    used_NK = log_probs_NK > NOT_KEPT
    # Exact in float32: scaling by a power of two, then whole numbers below 2^24.
    steps_NK = (log_probs_NK.float().clamp(-_UNUSED / _STEPS, 0.0) * -_STEPS).round().int()
    numbers_N2K = torch.zeros(rows, 2, top_k, dtype=torch.int32)
    numbers_N2K[:, 1] = _UNUSED
    numbers_N2K[:, 0, :kept] = torch.where(used_NK, ids_NK.int(), 0)
    numbers_N2K[:, 1, :kept] = torch.where(used_NK, steps_NK.clamp(max=_UNUSED - 1), _UNUSED)
    tail_N1 = tail_N.float()[:, None].contiguous().view(torch.int32)
    return torch.cat([_split(numbers_N2K.flatten(1), 3), _split(tail_N1, 4)], dim=1)


def decode(bytes_NW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, K) ids, (N, K) float32 log-probabilities, (N,) float32 tail mass."""
    rows, size = bytes_NW.shape
    numbers_N2K = _join(bytes_NW[:, : size - 4], 3).view(rows, 2, (size - 4) // 6)
    ids_NK, steps_NK = numbers_N2K.unbind(1)
    log_probs_NK = (steps_NK.float() / -_STEPS).masked_fill(steps_NK == _UNUSED, NOT_KEPT)
    tail_N = _join(bytes_NW[:, size - 4 :], 4).view(torch.float32)[:, 0]
    return ids_NK.long(), log_probs_NK, tail_N


def no_answer(top_k: int) -> torch.Tensor:
    """(W,) the bytes of a token without an answer."""
    nothing = torch.full((1, 1), NOT_KEPT)
    return encode(
        SoftTargets(nothing.new_zeros(1, 1).long(), nothing, torch.zeros(1), 1.0, ""), top_k
    )[0]


def _split(numbers_NM: torch.Tensor, size: int) -> torch.Tensor:
    """(N, M · size) bytes of int32 numbers."""
    shifts = 8 * torch.arange(size, dtype=torch.int32)
    return ((numbers_NM[..., None] >> shifts) & 255).to(torch.uint8).flatten(1)


def _join(bytes_NX: torch.Tensor, size: int) -> torch.Tensor:
    """(N, M) int32 numbers of M · size bytes."""
    bytes_NMx = bytes_NX.unflatten(1, (-1, size)).int()
    numbers_NM = bytes_NMx[..., 0].clone()
    for place in range(1, size):
        numbers_NM |= bytes_NMx[..., place] << (8 * place)
    return numbers_NM
