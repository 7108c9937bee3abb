"""Reading on in a causal model: new tokens of every row, against keys and values of those before.

The same buffers as for blocks (buffers.py), so that a teacher is compared with a student that has no other
advantage than its own. A row's tokens stand at their own positions, whatever the other rows' lengths.
Shapes: B rows, Q tokens read now, K keys, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from .attention import CLEAN, Tokens
from .buffers import Batch, Prefix, Reader, places, read, settle
from .denoiser import has_sliding_window
from .errors import CheckpointError


@torch.no_grad()
def read_on(
    reader: Reader, rows: Sequence[tuple[Sequence[int], Prefix]], pad_id: int, last: int = 0
) -> tuple[torch.Tensor, list[Prefix]]:
    """(B, D) inputs of the head at the last of the new tokens of each row, and its prefix with them.

    `last`: tokens that the longest row will have, so that its buffer need not grow.
    """
    starts = [prefix.length for _, prefix in rows]
    ends = [prefix.length + len(tokens) for tokens, prefix in rows]
    length, width = max(ends), max(len(tokens) for tokens, _ in rows)
    # One place more: where padding goes.
    buffer, slots = settle(reader, [prefix for _, prefix in rows], length + 1, last + 1)
    order = [slots.index(slot) for slot in range(len(rows))]
    place_BQ, start = places([slice(starts[i], ends[i]) for i in order], buffer)
    shape = (len(rows), width)
    x_BQ = torch.full(shape, pad_id)
    document_BQ, position_BQ = torch.full(shape, -1), torch.zeros(shape, dtype=torch.long)
    for slot, i in enumerate(order):
        own = slice(len(rows[i][0]))
        x_BQ[slot, own] = torch.tensor(list(rows[i][0]))
        document_BQ[slot, own] = 0
        position_BQ[slot, own] = torch.arange(starts[i], ends[i])
    windows = windows_of(reader.model.config.get_text_config())
    alike = len(set(zip(starts, ends, strict=True))) == 1
    # A kernel knows without a mask that one token sees all, and that a text from its start is causal.
    plain = alike and not any(windows.values()) and (width == 1 or not starts[0])
    batch = Batch(
        x_BQ,
        _tokens(document_BQ, position_BQ),
        _keys([ends[i] for i in order], length),
        functools.partial(_visible, windows=windows),
        plain,
        place_BQ,
        start,
        length,
        buffer,
    )
    last_B = torch.tensor(
        [slot * width + len(tokens) - 1 for (tokens, _), slot in zip(rows, slots, strict=True)]
    )
    states_BD = read(reader, batch, last_B)
    prefixes = []
    for end, slot in zip(ends, slots, strict=True):
        buffer.filled[slot] = end
        prefixes.append(Prefix(end, None, buffer, slot))
    return states_BD, prefixes


def windows_of(config: Any) -> dict[str, int | None]:
    """How far back each kind of layer sees; None = to the start. One kind "" if the model names none.

    Raises CheckpointError for layers of other kinds: in chunks, linear, recurrent.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    others = sorted(set(kinds or ()) - {"full_attention", "sliding_attention"})
    if others:
        raise CheckpointError(
            f"{config.model_type} has layers of another kind ({', '.join(others)}); mdm can write with"
            " models whose layers all attend to everything before, or to a sliding window of it"
        )
    if not has_sliding_window(config):
        return {"": None}
    if kinds is None:
        return {"": window}
    return {kind: window if "sliding" in kind else None for kind in set(kinds)}


def _visible(
    queries: Tokens, keys: Tokens, windows: dict[str, int | None]
) -> torch.Tensor | dict[str, torch.Tensor]:
    """(B, Q, K) bool by kind of layer; one for all if there is one kind."""
    distance_BQK = queries.position[:, :, None] - keys.position[:, None]
    seen_BQK = (distance_BQK >= 0) & (queries.document[:, :, None] == keys.document[:, None])
    found = {
        kind: seen_BQK if window is None else seen_BQK & (distance_BQK < window)
        for kind, window in windows.items()
    }
    return found.get("", found)


def _keys(ends: Sequence[int], length: int) -> Tokens:
    position_BK = torch.arange(length).expand(len(ends), -1)
    end_B1 = torch.tensor(ends)[:, None]
    return _tokens((position_BK < end_B1).long() - 1, position_BK)


def _tokens(document_BN: torch.Tensor, position_BN: torch.Tensor) -> Tokens:
    return Tokens(
        document_BN,
        position_BN,
        torch.full_like(position_BN, CLEAN),
        torch.zeros_like(position_BN, dtype=torch.bool),
    )
