"""Run a function of head rows chunk by chunk, so that vocabulary-sized tensors stay small."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mdm.denoiser import row_chunks


def in_chunks(
    function: Callable[..., tuple[torch.Tensor, ...]], width: int, *inputs_N: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """`function(*inputs)` over chunks of rows whose float32 logits of `width` columns stay small."""
    parts = [
        function(*(tensor[chunk] for tensor in inputs_N))
        for chunk in row_chunks(len(inputs_N[0]), width)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
