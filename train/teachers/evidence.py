"""What counts as evidence for a masked position, and which masks are filled together.

The student sees the visible tokens of its document (of its block, if it works in blocks). Evidence for
position i ends at the last *visible* token within these limits: masks beyond it say nothing. Where no
visible token stands to the right of i, the next-token distribution p(v | left) needs no correction.
Shapes: B batch, L length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from mdm import attention

from ..targets import Question, TargetSettings


def last_scored(document_ids_BL: torch.Tensor, window: int, block: int = 0) -> torch.Tensor:
    """(B, L) last position whose token may be evidence for position i.

    The end of its document, or before that i + window, or the end of its block; 0 = no such limit.
    """
    length = document_ids_BL.shape[1]
    index_L = torch.arange(length, device=document_ids_BL.device)
    ends_BL = torch.ones_like(document_ids_BL, dtype=torch.bool)
    ends_BL[:, :-1] = document_ids_BL[:, 1:] != document_ids_BL[:, :-1]
    end_BL = torch.where(ends_BL, index_L, torch.full_like(document_ids_BL, length))
    end_BL = end_BL.flip(1).cummin(1).values.flip(1)
    if window:
        end_BL = end_BL.minimum(index_L + window)
    if block:
        left_in_block_BL = block - 1 - attention.positions(document_ids_BL) % block
        end_BL = end_BL.minimum(index_L + left_in_block_BL)
    return end_BL


def evidence_end(question: Question, settings: TargetSettings) -> torch.Tensor:
    """(B, L) last visible position that is evidence for position i; i itself if there is none."""
    last_BL = last_scored(question.document_ids_BL, settings.window, settings.block)
    index_L = torch.arange(last_BL.shape[1], device=last_BL.device)
    visible_BL = ~question.masked_BL & (question.document_ids_BL >= 0)
    seen_BL = torch.where(visible_BL, index_L, torch.full_like(last_BL, -1)).cummax(1).values
    return seen_BL.gather(1, last_BL).maximum(index_L)


def describe(settings: TargetSettings, *, others: bool) -> str:
    """The limits of the right side, and whether other masks hold the text, for `conditioned_on`."""
    limits = {"window": settings.window, "block": settings.block}
    stated = ", ".join(f"{name} {value}" for name, value in limits.items() if value)
    return f"left+right({stated or 'document'}{'; other masks as in the text' if others else ''})"


def in_groups(todo: list[Region], settings: TargetSettings) -> Iterator[list[Region]]:
    """Regions in groups whose fills have at most settings.branch_tokens tokens; at least one each."""
    group: list[Region] = []
    total = 0
    for region in todo:
        size = settings.fills * (region.end - region.holes[0] + 1)
        if group and total + size > settings.branch_tokens:
            yield group
            group, total = [], 0
        group.append(region)
        total += size
    if group:
        yield group


@dataclasses.dataclass(frozen=True)
class Region:
    """Masks of one row that are filled together, left to right.

    holes   positions that are filled, ascending; all else holds its true token
    wanted  the holes that are asked for → (index among all positions asked for, end of evidence)
    """

    row: int
    holes: tuple[int, ...]
    wanted: dict[int, tuple[int, int]]

    @property
    def end(self) -> int:
        """The last position that matters to any of the wanted ones."""
        return max(end for _, end in self.wanted.values())


def regions(question: Question, settings: TargetSettings) -> list[Region]:
    """The wanted positions grouped by what is filled with them.

    settings.fill="region": all masks of the document (of the block) up to the end of the evidence;
    "span": only the run of neighbouring masks a position lies in, the others hold their true tokens.
    """
    ids_BL = question.document_ids_BL
    new_BL = torch.ones_like(question.masked_BL)
    new_BL[:, 1:] = ids_BL[:, 1:] != ids_BL[:, :-1]
    if settings.block:
        new_BL |= attention.positions(ids_BL) % settings.block == 0
    if settings.fill == "span":
        new_BL[:, 1:] |= question.masked_BL[:, 1:] & ~question.masked_BL[:, :-1]
    group_BL = new_BL.cumsum(1)
    end_BL = evidence_end(question, settings)
    found: dict[tuple[int, int], dict[int, tuple[int, int]]] = {}
    for index, (row, position) in enumerate(question.wanted_BL.nonzero().tolist()):
        wanted = found.setdefault((row, int(group_BL[row, position])), {})
        wanted[position] = (index, int(end_BL[row, position]))
    result = []
    for (row, group), wanted in found.items():
        masked_L = question.masked_BL[row] & (group_BL[row] == group)
        end = max(end for _, end in wanted.values())
        holes = tuple(p for p in masked_L.nonzero()[:, 0].tolist() if p <= end)
        result.append(Region(row, holes, wanted))
    return result
