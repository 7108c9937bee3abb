"""Left-only targets: q(v) = p(v | clean tokens to the left). One causal pass, whatever the masks.

Unbiased for the posterior of a masked token only where no visible token lies to its right.
Shapes: B batch, L length, N positions asked for.
"""

from __future__ import annotations

import torch

from ..targets import SoftTargets, TargetSettings, keep_top
from .ar import ARTeacher
from .chunks import in_chunks


@torch.no_grad()
def left_only(
    teacher: ARTeacher,
    x0_BL: torch.Tensor,
    wanted_BL: torch.Tensor,
    document_ids_BL: torch.Tensor,
    *,
    settings: TargetSettings,
    temperature: float,
) -> SoftTargets:
    """The teacher's next-token distribution at every wanted position."""
    rows_ND = teacher.rows(x0_BL, wanted_BL, document_ids_BL)

    def target(rows_nD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return keep_top(
            teacher.head(rows_nD),
            top_k=settings.top_k,
            top_p=settings.top_p,
            temperature=temperature,
            conditioned_on="left",
        ).tensors

    ids_NK, log_probs_NK, tail_N = in_chunks(target, teacher.num_tokens, rows_ND)
    return SoftTargets(ids_NK, log_probs_NK, tail_N, temperature, "left")
