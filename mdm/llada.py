"""One denoising step exactly as the published LLaDA sampler takes it, oddities included.

For comparison, not for use: `SamplerSettings(compat="llada")` selects it inside the same loop. What
differs from the default step, and why, is listed in DECISIONS.md. It needs canvases of one length
with one set of settings (prompts padded on the left), as the published code does.
Source: LLaDA (arXiv 2502.09992) and its released `generate`. Shapes: B canvases, L length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .canvas import Canvas, Commit
from .denoiser import Denoiser
from .errors import ConfigError

Uniforms = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


def published_commits(
    denoiser: Denoiser,
    canvases: dict[int, Canvas],
    *,
    end_of_turn_id: int | None = None,
    uniforms: Uniforms | None = None,
) -> list[Commit]:
    """What the published sampler decides in one step; the canvases are left as they are.

    `end_of_turn_id` is LLaDA's EoT, which `eos_last` treats differently from the end token (the end
    token itself if None). `uniforms(shape, dtype)` draws the noise; default: the first canvas' own.
    """
    rows = list(canvases.values())
    settings = rows[0].settings
    if any(row.settings != settings or len(row.ids_L) != len(rows[0].ids_L) for row in rows):
        raise ConfigError(
            "compat=llada needs canvases of one length with one set of settings; pad prompts left"
        )
    draw = uniforms or (
        lambda shape, dtype: torch.rand(shape, dtype=dtype, generator=rows[0].random)
    )
    eos_id = denoiser.vocab.eos_id
    turn_id = eos_id if end_of_turn_id is None else end_of_turn_id
    x_BL = torch.stack([row.ids_L for row in rows]).to(denoiser.device)
    masked_BL = x_BL == denoiser.mask_id  # over the whole canvas: a mask id in a prompt is open too
    logits_BLV = _all_logits(denoiser, rows, x_BL)
    if settings.suppress_eos:
        logits_BLV[..., eos_id] = float("-inf")
    noisy_BLV = logits_BLV  # at temperature 0 the same tensor, not a copy
    if settings.temperature > 0:
        uniform_BLV = draw(tuple(logits_BLV.shape), torch.float64).to(x_BL.device)
        # exp(logits) / (-log u)^T has the same argmax as this and overflows earlier
        noisy_BLV = logits_BLV.double() - settings.temperature * (-uniform_BLV.log()).log()
    proposals_BL = noisy_BLV.argmax(-1)
    if settings.eos_last:
        noisy_BLV[..., eos_id] = logits_BLV[..., turn_id] = float("-inf")
    if settings.remasking == "random":
        confidence_BL = draw(tuple(x_BL.shape), torch.float32).to(x_BL.device)
    elif settings.remasking == "low_confidence":
        probabilities_BLV = logits_BLV.softmax(-1)
        confidence_BL = probabilities_BLV.gather(-1, proposals_BL[..., None])[..., 0]
    else:
        raise ConfigError(
            f"the published sampler knows no remasking={settings.remasking!r}; use low_confidence,"
            " random, or compat=default"
        )
    confidence_BL = confidence_BL.masked_fill(~masked_BL, float("-inf"))
    commits = []
    for i, (number, row) in enumerate(canvases.items()):
        confidence_L = confidence_BL[i].clone()
        confidence_L[row.blocks[0].stop :] = float("-inf")  # only the future is excluded
        top_k = confidence_L.topk(row.due[0]).indices
        top_k = top_k[masked_BL[i, top_k]]
        tokens_k, confidence_k = proposals_BL[i, top_k].cpu(), confidence_L[top_k].cpu()
        commits.append(
            Commit(number, top_k.cpu(), tokens_k, confidence_k, tokens_read=len(row.ids_L))
        )
    return commits


def _all_logits(denoiser: Denoiser, rows: list[Canvas], x_BL: torch.Tensor) -> torch.Tensor:
    """(B, L, V) guided logits of the whole canvas, the mask token included.

    The first position of a shifted model has no logits; zeros stand in, it is never open.
    """
    cfg_scale = rows[0].settings.cfg_scale
    document_ids_BL = torch.stack([row.valid_L.long() - 1 for row in rows]).to(x_BL.device)
    if cfg_scale > 0:
        given_BL = torch.stack([row.given_L for row in rows]).to(x_BL.device)
        x_BL = torch.cat([x_BL, x_BL.masked_fill(given_BL, denoiser.mask_id)])
        document_ids_BL = document_ids_BL.repeat(2, 1)
    wanted_BL = torch.ones_like(x_BL, dtype=torch.bool)
    wanted_BL[:, 0] = not denoiser.shift
    rows_ND = denoiser.rows(x_BL, wanted_BL, document_ids_BL=document_ids_BL)
    logits_NV = denoiser.raw_head(rows_ND)
    logits_BLV = logits_NV.new_zeros(*x_BL.shape, logits_NV.shape[-1])
    logits_BLV[wanted_BL] = logits_NV
    if cfg_scale > 0:
        conditional_BLV, unconditional_BLV = logits_BLV.chunk(2)
        return unconditional_BLV + (cfg_scale + 1) * (conditional_BLV - unconditional_BLV)
    return logits_BLV
