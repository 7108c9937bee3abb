"""Run a function of head rows chunk by chunk, so that vocabulary-sized tensors stay small."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mdm.denoiser import CHUNK_BYTES


def in_chunks(
    function: Callable[..., tuple[torch.Tensor, ...]], width: int, *inputs_N: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """`function(*inputs)` over chunks of rows whose float32 logits of `width` columns stay small."""
    size = max(1, CHUNK_BYTES // (4 * width))
    total = max(1, len(inputs_N[0]))
    parts = [
        function(*(tensor[first : first + size] for tensor in inputs_N))
        for first in range(0, total, size)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
