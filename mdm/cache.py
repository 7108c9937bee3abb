"""Reading a block for a block diffusion model, with keys and values of what is clean already.

No token sees a block that comes later, and a noisy block sees clean tokens of earlier ones (attention.py).
So clean tokens are read once: their keys and values are kept, and one forward reads what became clean
since the last one and, after it, the noisy block. That is exact: it is what one pass over [x_t ; x_0]
gives for this block (BD3LM, arXiv 2503.09573, section 3.1), at any length of the prompt.
Nothing here is changed in place, so a forward that fails leaves what was kept as it was.
Shapes: B rows, L length, P tokens kept, Q tokens read now, K = P + Q keys, H heads, W width of a head,
D width of the model, n positions asked for in a row, N in all rows, M outputs that are needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from . import attention
from .attention import CLEAN, Tokens
from .denoiser import Denoiser
from .errors import CheckpointError

if TYPE_CHECKING:
    from transformers import DynamicCache

NOISY = CLEAN + 1  # the stream of the block that is being denoised
KeysAndValues = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Prefix:
    """What is kept of the clean tokens at the start of a row; whole blocks.

    layers  keys and values of every layer, (1, H, P, W)
    last_D  input of the head at the last of them, which predicts the token after it in a shifted model
    """

    layers: tuple[KeysAndValues, ...] = ()
    last_D: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens kept."""
        return self.layers[0][0].shape[2] if self.layers else 0


@dataclasses.dataclass(frozen=True)
class Row:
    """A row whose block is to be read: ids_L is clean before it, and what stands after it is not read.

    block     a block of the model's grid
    wanted_n  positions in it that are asked for
    prefix    clean tokens before it that have been read
    """

    ids_L: torch.Tensor
    block: slice
    wanted_n: torch.Tensor
    prefix: Prefix = Prefix()

    @property
    def read(self) -> slice:
        """Positions that a forward has to read."""
        return slice(self.prefix.length, self.block.stop)

    @property
    def new(self) -> int:
        """Clean tokens among them; they come first."""
        return self.block.start - self.prefix.length


@torch.no_grad()
def read_blocks(denoiser: Denoiser, rows: Sequence[Row]) -> tuple[torch.Tensor, list[Prefix]]:
    """(N, D) inputs of the head for the wanted positions, row by row, and the clean tokens as read.

    One forward for all rows, whatever their lengths. The prefix that comes back ends where the block
    begins, and stands for the one in the row from then on.
    """
    cache = _joined([row.prefix for row in rows])
    x_BQ, queries = _queries(denoiser, rows)
    kept = _kept([row.prefix.length for row in rows], denoiser.device)
    needed_BQ = _needed(rows, x_BQ, denoiser.shift)
    outputs_MD = outputs(denoiser, x_BQ, queries, kept.cat(queries), cache, needed_BQ)
    found, prefixes = [], []
    own = outputs_MD.split(needed_BQ.sum(1).tolist())
    for index, (row, needed_Q, outputs_mD) in enumerate(zip(rows, needed_BQ, own, strict=True)):
        found.append(_wanted(row, needed_Q, outputs_mD, denoiser.shift))
        prefix = row.prefix
        if row.new:
            # Of the outputs that are needed, that of the last clean token comes first.
            last_D = outputs_mD[0].clone() if denoiser.shift else None
            prefix = Prefix(_grown(row, index, kept.position.shape[1], cache), last_D)
        prefixes.append(prefix)
    return torch.cat(found), prefixes


def outputs(
    denoiser: Denoiser,
    x_BQ: torch.Tensor,
    queries: Tokens,
    keys: Tokens,
    cache: DynamicCache,
    needed_BQ: torch.Tensor,
) -> torch.Tensor:
    """(M, D) inputs of the head where they are needed; (M, V) logits if the head is not plain.

    `keys` are the tokens of the cache and, after them, `queries`; the cache grows by the latter. Raises
    CheckpointError if it does not: a model with its own code may ignore it.
    """
    assert denoiser.block_size is not None, "not a block diffusion model"
    visible_BQK = attention.block_visible(queries, keys, denoiser.block_size, denoiser.attention)
    arguments = {
        "attention_mask": attention.float_mask(visible_BQK, denoiser.model.dtype),
        "position_ids": queries.position,
        "past_key_values": cache,
        "use_cache": True,
    }
    if denoiser.plain_head:
        found_MD = denoiser.model.base_model(x_BQ, **arguments)[0][needed_BQ]
    else:
        found_MD = denoiser.model(x_BQ, logits_to_keep=needed_BQ, **arguments).logits
    require_kept(denoiser, cache, keys.position.shape[1])
    return found_MD


def require_kept(denoiser: Denoiser, cache: DynamicCache, length: int) -> None:
    """Raise CheckpointError unless a forward has left keys of `length` tokens in every layer it knows."""
    kept = {cache.get_seq_length(index) for index in range(len(cache.layers))}
    if kept != {length}:
        raise CheckpointError(
            f"{type(denoiser.model).__name__} cannot be read block by block: its code keeps no"
            " DynamicCache (the argument past_key_values) of keys and values"
        )


def cache_of(layers: Iterable[KeysAndValues]) -> DynamicCache:
    """A cache that begins with these keys and values, of any number of rows; they are not copied."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys[:, :, :0], values[:, :, :0], index)  # makes the layer; copies nothing
        cache.layers[index].keys, cache.layers[index].values = keys, values
    return cache


# --- what goes in ----------------------------------------------------------------------------------


def _queries(denoiser: Denoiser, rows: Sequence[Row]) -> tuple[torch.Tensor, Tokens]:
    """(B, Q) tokens to be read, clean ones, then the block, then padding; and where they stand."""
    device = denoiser.device
    positions = [torch.arange(row.read.start, row.read.stop, device=device) for row in rows]
    noisy = [
        (own >= row.block.start).long() * NOISY for own, row in zip(positions, rows, strict=True)
    ]
    x_BQ = _padded([row.ids_L[row.read] for row in rows], denoiser.vocab.pad_id)
    stream_BQ = _padded(noisy, CLEAN)
    return x_BQ, Tokens(
        document=_padded([torch.zeros_like(own) for own in positions], -1),
        position=_padded(positions, 0),
        stream=stream_BQ,
        masked=(x_BQ == denoiser.mask_id) & (stream_BQ == NOISY),
    )


def _padded(parts: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    return pad_sequence(list(parts), batch_first=True, padding_value=value)


def _kept(lengths: Sequence[int], device: torch.device) -> Tokens:
    """(B, P) where the tokens of the joined prefixes stand; shorter ones are padded on the right."""
    position_BP = torch.arange(max(lengths), device=device).expand(len(lengths), -1)
    length_B1 = torch.tensor(lengths, device=device)[:, None]
    return Tokens(
        document=(position_BP < length_B1).long() - 1,
        position=position_BP,
        stream=torch.full_like(position_BP, CLEAN),
        masked=torch.zeros_like(position_BP, dtype=torch.bool),
    )


def _joined(prefixes: Sequence[Prefix]) -> DynamicCache:
    """The prefixes as one cache, padded to the longest; a single one is not copied."""
    if len(prefixes) == 1:
        return cache_of(prefixes[0].layers)
    longest = max(prefixes, key=lambda prefix: prefix.length)

    def layer(index: int, kind: int) -> torch.Tensor:
        like = longest.layers[index][kind]
        joined_BHPW = like.new_zeros(len(prefixes), *like.shape[1:])
        for row_HPW, prefix in zip(joined_BHPW, prefixes, strict=True):
            if prefix.layers:
                row_HPW[:, : prefix.length] = prefix.layers[index][kind][0]
        return joined_BHPW

    return cache_of((layer(index, 0), layer(index, 1)) for index in range(len(longest.layers)))


# --- what comes out --------------------------------------------------------------------------------


def _needed(rows: Sequence[Row], x_BQ: torch.Tensor, shift: bool) -> torch.Tensor:
    """(B, Q) bool: outputs that the wanted positions are read from, and the last clean ones."""
    needed_BQ = torch.zeros_like(x_BQ, dtype=torch.bool)
    for needed_Q, row in zip(needed_BQ, rows, strict=True):
        places_n = _places(row, shift)
        needed_Q[places_n[places_n >= 0]] = True
        if shift and row.new:
            needed_Q[row.new - 1] = True
    return needed_BQ


def _places(row: Row, shift: bool) -> torch.Tensor:
    """(n,) outputs of this forward that the wanted positions are read from; -1 = the one kept."""
    return row.wanted_n - row.read.start - int(shift)


def _wanted(
    row: Row, needed_Q: torch.Tensor, outputs_mD: torch.Tensor, shift: bool
) -> torch.Tensor:
    """(n, D) inputs of the head for the wanted positions of a row."""
    places_n = _places(row, shift)
    number_n = needed_Q.cumsum(0)[places_n]  # from 1; of place -1 it is not used
    if row.prefix.last_D is None:
        assert bool((places_n >= 0).all()), "position 0 of a shifted model has no predecessor"
        return outputs_mD[number_n - 1]
    return torch.cat([row.prefix.last_D[None], outputs_mD])[number_n.masked_fill(places_n < 0, 0)]


def _grown(row: Row, index: int, longest: int, cache: DynamicCache) -> tuple[KeysAndValues, ...]:
    """Keys and values of a row's clean tokens; in the cache new ones stand after the `longest` prefix."""
    new = slice(longest, longest + row.new)

    def own(part_BHKW: torch.Tensor) -> torch.Tensor:
        if len(part_BHKW) == 1:
            return part_BHKW[:, :, : new.stop]  # a view: beside them it holds the noisy block only
        part_1HKW = part_BHKW[index : index + 1]
        return torch.cat([part_1HKW[:, :, : row.prefix.length], part_1HKW[:, :, new]], dim=2)

    return tuple((own(layer.keys), own(layer.values)) for layer in cache.layers)
