"""The exact likelihood of a decoder that decides the surest position next.

When the next position depends on what is visible alone, and its token is drawn from the model's
distribution there, an answer can arise in exactly one order; its probability is the product along
that order (DUEL, arXiv 2603.01367). Sums to 1 over all answers of a length.
Shapes: n open positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch

from .denoiser import Denoiser
from .grid import BlockGrid
from .proposals import guide
from .remasking import REMASKING
from .scoring import by_length

RULES = tuple(name for name in REMASKING if name != "random")


@dataclasses.dataclass
class _Walk:
    """One answer on its way from masks to tokens."""

    index: int
    ids_L: torch.Tensor
    answer_L: torch.Tensor
    given_L: torch.Tensor
    blocks: list[slice]
    value: float = 0.0
    steps: int = 0
    greedy: bool = True

    def open_positions(self) -> torch.Tensor:
        """Undecided positions of the current block."""
        block = self.blocks[0]
        return self.open_L[block].nonzero()[:, 0] + block.start

    def __post_init__(self) -> None:
        self.open_L = ~self.given_L


def decoding_order_steps(
    denoiser: Denoiser,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    rule: str = "low_confidence",
    block_length: int | None = None,
    cfg_scale: float = 0.0,
    batch_tokens: int = 4096,
    done: Callable[[int, float, int, bool], None],
) -> Iterator[int]:
    """`done(i, log p in nats, forwards, greedy)` for each (prompt, answer); one forward a token.

    Yields the rows of every forward. `rule` (low_confidence, margin, entropy) rates positions by their
    greedy proposal; ties go to the left. `greedy`: every token was the likeliest when its position came up.
    """
    walks = []
    for index, (prompt, answer) in enumerate(pairs):
        ids_L = torch.tensor([*prompt, *answer])
        given_L = torch.arange(len(ids_L)) < len(prompt)
        grid = BlockGrid(len(prompt), len(ids_L), block_length or len(answer))
        blocks = [grid.block(i) for i in range(grid.num_blocks)]
        masked_L = ids_L.masked_fill(~given_L, denoiser.mask_id)
        walks.append(_Walk(index, masked_L, ids_L, given_L, blocks))
    passes = 2 if cfg_scale > 0 else 1
    for batch in by_length([len(walk.ids_L) for walk in walks], batch_tokens // passes):
        active = [walks[index] for index in batch]
        while active:
            rows = len(active)
            _step(denoiser, active, rule, cfg_scale)
            for walk in [walk for walk in active if not walk.blocks]:
                active.remove(walk)
                done(walk.index, walk.value, walk.steps * passes, walk.greedy)
            yield rows


@torch.no_grad()
def _step(denoiser: Denoiser, walks: Sequence[_Walk], rule: str, cfg_scale: float) -> None:
    """One forward: each walk reveals the true token of its surest open position."""
    opens = [walk.open_positions() for walk in walks]
    logits = _open_logits(denoiser, walks, opens, cfg_scale)
    for walk, open_n, logits_nV in zip(walks, opens, logits, strict=True):
        log_probs_nV = logits_nV.log_softmax(-1)
        proposals_n = log_probs_nV.argmax(-1)
        confidence_n = REMASKING[rule](log_probs_nV, proposals_n, None)
        best = int(confidence_n.argmax())
        position = int(open_n[best])
        token = int(walk.answer_L[position])
        walk.value += float(log_probs_nV[best, token])
        walk.greedy &= int(proposals_n[best]) == token
        walk.ids_L[position] = token
        walk.open_L[position] = False
        walk.steps += 1
        if len(open_n) == 1:
            walk.blocks.pop(0)


def _open_logits(
    denoiser: Denoiser, walks: Sequence[_Walk], opens: Sequence[torch.Tensor], cfg_scale: float
) -> list[torch.Tensor]:
    """(n, V) logits of each walk's open positions, guided where asked."""
    length = max(len(walk.ids_L) for walk in walks)
    xt_BL = torch.full((len(walks), length), denoiser.vocab.pad_id)
    document_ids_BL = torch.full_like(xt_BL, -1)
    wanted_BL = torch.zeros_like(xt_BL, dtype=torch.bool)
    for i, (walk, open_n) in enumerate(zip(walks, opens, strict=True)):
        xt_BL[i, : len(walk.ids_L)] = walk.ids_L
        document_ids_BL[i, : len(walk.ids_L)] = 0
        wanted_BL[i, open_n] = True
    device = denoiser.device
    xt_BL, document_ids_BL = xt_BL.to(device), document_ids_BL.to(device)
    wanted_BL = wanted_BL.to(device)
    logits_NV = denoiser(xt_BL, wanted_BL, document_ids_BL=document_ids_BL)
    if cfg_scale > 0:
        without_BL = xt_BL.clone()
        for i, walk in enumerate(walks):
            without_BL[i, : len(walk.ids_L)][walk.given_L.to(device)] = denoiser.mask_id
        guided_NV = denoiser(without_BL, wanted_BL, document_ids_BL=document_ids_BL)
        logits_NV = guide(logits_NV, guided_NV, cfg_scale)
    return [part.cpu() for part in logits_NV.split([len(open_n) for open_n in opens])]
