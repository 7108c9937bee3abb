"""Branches of text on top of clean rows: the clean prefix is computed once, for all of them.

One causal pass over the clean rows (the trunk) leaves their keys and values in a cache. A branch goes
on from any position of a row; it sees the clean tokens of its document before that position and its
own tokens. In a forward, branches of one row share its prefix as long as they are shorter than it, and
are kept apart by the mask; more of them become another row of the batch. (All branches in one long row
spent two thirds of the time on attention that is masked away.) A branch can grow again and again, and
a copy of it costs nothing: it holds its own keys and values, which never change.
Shapes: B batch, L length, N positions asked for, D width, J rows of packed branches, O own tokens,
W new tokens of a row, S slots it attends to, Y layers, H key heads, d head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from mdm import attention

from .ar import ARTeacher


@dataclasses.dataclass(frozen=True, eq=False)
class Branch:
    """Text that replaces row `row` from position `start` on.

    memory  keys and values of its own tokens, (2, Y, H, O, d); None before the first
    """

    row: int
    start: int
    memory: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Its own tokens."""
        return 0 if self.memory is None else self.memory.shape[3]


class Tree:
    """The cached clean rows of a batch, and branches on them.

    `asked_BL` marks the positions whose prediction from the clean text will be wanted.
    """

    def __init__(
        self,
        teacher: ARTeacher,
        x0_BL: torch.Tensor,
        document_ids_BL: torch.Tensor,
        asked_BL: torch.Tensor,
    ) -> None:
        from transformers import DynamicCache

        self.teacher = teacher
        self.x0_BL = x0_BL
        self._trunk: Any = DynamicCache()
        # (N, D) head inputs that predict the positions asked for, in row-major order
        self.trunk_rows = teacher.rows(x0_BL, asked_BL, document_ids_BL, self._trunk)
        self._index_BL = torch.full_like(x0_BL, -1)
        self._index_BL[asked_BL] = torch.arange(len(self.trunk_rows), device=x0_BL.device)
        index_L = torch.arange(x0_BL.shape[1], device=x0_BL.device)
        self._first = (index_L - attention.positions(document_ids_BL)).tolist()

    def trunk(self, row: int, position: int) -> torch.Tensor:
        """(1, D) the head's input that predicts this position from the clean tokens to its left."""
        index = int(self._index_BL[row, position])
        assert index >= 0, "this position was not asked for"
        return self.trunk_rows[index : index + 1]

    def branch(self, row: int, start: int) -> Branch:
        """A branch without tokens. Something must stand before it in its document."""
        assert start > self._first[row][start], "nothing stands to the left of this branch"
        return Branch(row, start)

    def extend(
        self, branches: Sequence[Branch], tokens: Sequence[torch.Tensor]
    ) -> tuple[list[Branch], list[torch.Tensor]]:
        """Append tokens (W,), at least one, to branches: the grown branches, and (W, D) of each.

        Output w of a branch predicts the token after its w-th new one. A branch may be given several
        times: its copies grow apart. Copies that are given the same tokens stay one branch, fed once.
        """
        given = [(id(branch), *new.tolist()) for branch, new in zip(branches, tokens, strict=True)]
        first_of: dict[tuple[int, ...], int] = {}
        for place, key in enumerate(given):
            first_of.setdefault(key, place)
        # Branches that grow by like lengths share a forward: less than half of it is padding.
        groups: dict[int, list[int]] = {}
        for place in first_of.values():
            groups.setdefault(len(tokens[place]).bit_length(), []).append(place)
        grown: dict[tuple[int, ...], tuple[Branch, torch.Tensor]] = {}
        for places in groups.values():
            found = self._forward([branches[p] for p in places], [tokens[p] for p in places])
            grown.update(zip([given[p] for p in places], found, strict=True))
        return [grown[key][0] for key in given], [grown[key][1] for key in given]

    def _forward(
        self, branches: Sequence[Branch], tokens: Sequence[torch.Tensor]
    ) -> list[tuple[Branch, torch.Tensor]]:
        """One forward over all these branches."""
        device = self.x0_BL.device
        packed = _pack(branches, tokens)
        prefix = max(branch.start for branch in branches)
        own = max(sum(branches[p].length for p in row) for row in packed)
        width = max(sum(len(tokens[p]) for p in row) for row in packed)
        tokens_JW = torch.zeros(len(packed), width, dtype=torch.long, device=device)
        positions_JW = torch.zeros_like(tokens_JW)
        outputs_JW = torch.zeros_like(tokens_JW, dtype=torch.bool)
        slots = prefix + own + width
        visible_JWS = torch.zeros(len(packed), width, slots, dtype=torch.bool, device=device)
        layers = self._trunk.layers
        shape = (2, len(layers), len(packed), layers[0].keys.shape[1], own)
        memory = layers[0].keys.new_zeros(*shape, layers[0].keys.shape[3])
        for j, row in enumerate(packed):
            old_end = new_end = 0
            for branch, new in ((branches[p], tokens[p]) for p in row):
                old = slice(old_end, old_end := old_end + branch.length)
                fed = slice(new_end, new_end := new_end + len(new))
                first = self._first[branch.row][branch.start]
                place = branch.start - first + branch.length
                tokens_JW[j, fed] = new
                positions_JW[j, fed] = torch.arange(place, place + len(new), device=device)
                outputs_JW[j, fed] = True
                visible_JWS[j, fed, first : branch.start] = True
                visible_JWS[j, fed, prefix + old.start : prefix + old.stop] = True
                below = torch.ones(len(new), len(new), dtype=torch.bool, device=device).tril()
                visible_JWS[j, fed, prefix + own + fed.start : prefix + own + fed.stop] = below
                if branch.memory is not None:
                    memory[:, :, j, :, old] = branch.memory
        cache = _branch_cache(self._trunk, [branches[row[0]].row for row in packed], prefix, memory)
        rows_ND = self.teacher.call(
            tokens_JW,
            outputs_JW,
            cache,
            attention_mask=attention.float_mask(visible_JWS, self.teacher.model.dtype),
            position_ids=positions_JW,
        )
        fresh = torch.stack(
            [torch.stack([layer.fresh[kind] for layer in cache.layers]) for kind in (0, 1)]
        )
        order = [p for row in packed for p in row]
        outputs = dict(zip(order, rows_ND.split([len(tokens[p]) for p in order]), strict=True))
        grown: dict[int, Branch] = {}
        for j, row in enumerate(packed):
            new_end = 0
            for p in row:
                part = fresh[:, :, j, :, new_end : (new_end := new_end + len(tokens[p]))]
                known = branches[p].memory
                # A copy: a view would keep the memory of all the others alive.
                parts = [part] if known is None else [known, part]
                grown[p] = dataclasses.replace(branches[p], memory=torch.cat(parts, dim=3))
        return [(grown[p], outputs[p]) for p in range(len(branches))]


def _pack(branches: Sequence[Branch], tokens: Sequence[torch.Tensor]) -> list[list[int]]:
    """Places of the branches, those of one trunk row together while they are shorter than a prefix.

    Reading the prefix is then shared, and what is masked away costs no more than the prefix. All rows
    have the room of the longest one, or they would differ in length and be filled up with padding.
    """
    rows: list[list[int]] = []
    room, most = 0, max(branch.start for branch in branches)
    for place in sorted(range(len(branches)), key=lambda p: branches[p].row):
        branch = branches[place]
        needed = branch.length + len(tokens[place])
        if not rows or branches[rows[-1][0]].row != branch.row or needed > room:
            rows.append([])
            room = most
        rows[-1].append(place)
        room -= needed
    return rows


def _branch_cache(trunk: Any, rows: list[int], prefix: int, memory: torch.Tensor) -> Any:
    """A cache in which every row reads a row of the trunk, then its own memory, then what is new.

    The long tensors exist for one layer at a time; `layers[y].fresh` keeps the new keys and values.
    """
    from transformers import Cache
    from transformers.cache_utils import DynamicLayer

    class BranchLayer(DynamicLayer):
        """One layer of it."""

        def __init__(self, layer: int) -> None:
            super().__init__()
            self.layer = layer
            self.fresh: tuple[torch.Tensor, torch.Tensor]

        def get_seq_length(self) -> int:
            return prefix + memory.shape[4]

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            self.fresh = key_states, value_states
            below = trunk.layers[self.layer]
            old = (below.keys, below.values)
            keys, values = (
                torch.cat([old[kind][rows, :, :prefix], memory[kind, self.layer], new], dim=2)
                for kind, new in enumerate(self.fresh)
            )
            return keys, values

    return Cache(layers=[BranchLayer(layer) for layer in range(len(trunk.layers))])
