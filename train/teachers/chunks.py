"""Run a function of head rows chunk by chunk, so that vocabulary-sized tensors stay small.

Shapes: N head rows, n a chunk of them, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mdm.denoiser import row_chunks

from .ar import ARTeacher


def in_chunks(
    function: Callable[..., tuple[torch.Tensor, ...]], width: int, *inputs_N: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """`function(*inputs)` over chunks of rows whose float32 logits of `width` columns stay small."""
    parts = [
        function(*(tensor[chunk] for tensor in inputs_N))
        for chunk in row_chunks(len(inputs_N[0]), width)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def token_log_probs(
    teacher: ARTeacher, rows_ND: torch.Tensor, tokens_N: torch.Tensor
) -> torch.Tensor:
    """(N,) float64 log-probability of a token under the head's row of the same number."""

    def log_prob(rows_nD: torch.Tensor, token_n: torch.Tensor) -> tuple[torch.Tensor]:
        logits_nV = teacher.head(rows_nD)
        log_prob_n = logits_nV.gather(-1, token_n[:, None])[:, 0] - logits_nV.logsumexp(-1)
        return (log_prob_n.double(),)

    (found_N,) = in_chunks(log_prob, teacher.num_tokens, rows_ND, tokens_N)
    return found_N
