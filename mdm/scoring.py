"""Log-probabilities of masked tokens for many rows: batches of like length, logits in chunks.

Shapes: B rows of a batch, L length, N masked tokens of a row, n rows of the head, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch

from .denoiser import Denoiser
from .proposals import guide


@dataclasses.dataclass(frozen=True)
class Row:
    """One forward's row.

    index     whose row it is
    x0_L      all tokens
    masked_L  bool; hidden, to be scored
    given_L   bool; replaced by masks in the unconditional pass
    """

    index: int
    x0_L: torch.Tensor
    masked_L: torch.Tensor
    given_L: torch.Tensor


@torch.no_grad()
def token_log_probs(
    denoiser: Denoiser, rows: Iterable[Row], *, cfg_scale: float = 0.0, batch_tokens: int = 4096
) -> Iterator[list[tuple[int, torch.Tensor]]]:
    """(index, (N,) log p of the masked tokens, float32 on the CPU) of the rows, in order.

    One list a forward. A batch holds as many rows as fit into `batch_tokens`, padding included; at
    least one.
    """
    for batch in batches(rows, batch_tokens // (2 if cfg_scale > 0 else 1)):
        xt_BL, document_ids_BL, masked_BL, targets_N = collate(denoiser, batch)
        heads = [denoiser.rows(xt_BL, masked_BL, document_ids_BL=document_ids_BL)]
        if cfg_scale > 0:
            given_BL = torch.zeros_like(masked_BL)
            for i, row in enumerate(batch):
                given_BL[i, : len(row.x0_L)] = row.given_L
            without_BL = xt_BL.masked_fill(given_BL, denoiser.mask_id)
            heads.append(denoiser.rows(without_BL, masked_BL, document_ids_BL=document_ids_BL))
        parts = []
        for chunk in denoiser.chunks(len(targets_N)):
            logits_nV = denoiser.head(heads[0][chunk])
            if cfg_scale > 0:
                logits_nV = guide(logits_nV, denoiser.head(heads[1][chunk]), cfg_scale)
            chosen_n = logits_nV.gather(1, targets_N[chunk, None])[:, 0]
            parts.append((chosen_n - logits_nV.logsumexp(-1)).cpu())
        counts = [int(row.masked_L.sum()) for row in batch]
        log_probs = torch.cat(parts).split(counts)
        yield [(row.index, log_probs_N) for row, log_probs_N in zip(batch, log_probs, strict=True)]


def batches(rows: Iterable[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Consecutive rows, as many as fit when padded to the longest."""
    batch: list[Row] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row.x0_L))
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, longest = [], len(row.x0_L)
        batch.append(row)
    if batch:
        yield batch


def by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices in batches of like length, as many as fit when padded; at least one a batch."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and lengths[i] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def collate(
    denoiser: Denoiser, batch: Sequence[Row]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Padded xt, document ids and masks (B, L), and the hidden tokens (N of all rows)."""
    length = max(len(row.x0_L) for row in batch)
    xt_BL = torch.full((len(batch), length), denoiser.vocab.pad_id)
    document_ids_BL = torch.full_like(xt_BL, -1)
    masked_BL = torch.zeros_like(xt_BL, dtype=torch.bool)
    for i, row in enumerate(batch):
        own = slice(len(row.x0_L))
        xt_BL[i, own] = row.x0_L.masked_fill(row.masked_L, denoiser.mask_id)
        document_ids_BL[i, own] = 0
        masked_BL[i, own] = row.masked_L
    targets_N = torch.cat([row.x0_L[row.masked_L] for row in batch])
    device = denoiser.device
    return xt_BL.to(device), document_ids_BL.to(device), masked_BL.to(device), targets_N.to(device)
