"""Keys and values where they stay: the place of a token in its row's buffer is its position in the text.

A batch of rows has one buffer. A forward writes the keys and values of what it reads in place and attends
to the buffer as it stands; nothing is copied from step to step. What a row has read for good is its
`Prefix`; what stands behind that is scratch, so a forward that fails, or tokens that were masks, leave
nothing behind. Only when other rows share a forward than before are they moved to a new buffer (`settle`).
Positions, masks and places are worked out from numbers on the host and sent in two small tensors, so a step
waits for the device only when it asks for the result.
Shapes: B rows, Q tokens read now, K keys, C capacity, H heads, W width of a head, D width of the model,
N outputs that are asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from . import attention
from .attention import Tokens
from .errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GRAIN = 64  # buffers are made in multiples of so many tokens, so that few are made


class Reader(Protocol):
    """What reads: a Denoiser or an Autoregressive."""

    model: PreTrainedModel
    plain_head: bool
    runner: Runner

    @property
    def device(self) -> torch.device: ...


class Buffer:
    """Keys and values of all layers, (room, H, capacity, W) each; made by the first forward.

    room    rows there is room for, at least `rows`; by default as many
    filled  tokens of each row that are read for good
    """

    def __init__(self, rows: int, capacity: int, room: int | None = None) -> None:
        self.rows, self.capacity, self.room = rows, capacity, room or rows
        self.filled = [0] * rows
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(
        self, index: int, keys_BHQW: torch.Tensor, values_BHQW: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of a layer, made like these if there are none yet."""
        if index not in self.layers:
            self.layers[index] = (self._like(keys_BHQW), self._like(values_BHQW))
        return self.layers[index]

    def _like(self, part_BHQW: torch.Tensor) -> torch.Tensor:
        # Zeros, not whatever was in memory: what is hidden by a mask still must be a number.
        _, heads, _, width = part_BHQW.shape
        return part_BHQW.new_zeros(self.room, heads, self.capacity, width)


@dataclasses.dataclass(frozen=True)
class Prefix:
    """What is kept of the tokens at the start of a row.

    length  tokens kept
    last_D  input of the head at the last of them, which predicts the token after it in a shifted model
    buffer  where their keys and values are, in row `slot`
    stamp   of an approximate cache: the block and the step it was made at
    """

    length: int = 0
    last_D: torch.Tensor | None = None
    buffer: Buffer | None = None
    slot: int = 0
    stamp: tuple[int, int] | None = None

    @property
    def layers(self) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """Keys and values of every layer, (1, H, length, W); views."""
        if self.buffer is None:
            return ()
        row, own = slice(self.slot, self.slot + 1), slice(self.length)
        return tuple(
            (keys[row, :, own], values[row, :, own]) for keys, values in self.buffer.layers.values()
        )

    @property
    def indices(self) -> tuple[int, ...]:
        """Which layers these are."""
        return () if self.buffer is None else tuple(self.buffer.layers)

    @property
    def in_place(self) -> bool:
        """Is it all that its row of the buffer keeps? A continuation of its own may have come after it."""
        return self.buffer is not None and self.buffer.filled[self.slot] == self.length


def settle(
    reader: Reader, prefixes: Sequence[Prefix], capacity: int, last: int
) -> tuple[Buffer, list[int]]:
    """A buffer of at least this capacity with these rows and no others, and the place of each in it.

    If they are where they have to be, nothing is done; otherwise they are copied into a new buffer, which
    has room for `last` tokens, as many as there will be, so that it need not grow.
    """
    buffer, slots = prefixes[0].buffer, [prefix.slot for prefix in prefixes]
    if (
        buffer is not None
        and buffer.capacity >= capacity
        and all(prefix.buffer is buffer and prefix.in_place for prefix in prefixes)
        and sorted(slots) == list(range(buffer.rows))
    ):
        return buffer, slots
    buffer = reader.runner.make_buffer(len(prefixes), max(capacity, last))
    for slot, prefix in enumerate(prefixes):
        for index, (keys, values) in zip(prefix.indices, prefix.layers, strict=True):
            to_keys, to_values = buffer.layer(index, keys, values)
            to_keys[slot, :, : prefix.length] = keys[0]
            to_values[slot, :, : prefix.length] = values[0]
        buffer.filled[slot] = prefix.length
    return buffer, list(range(len(prefixes)))


# --- a forward -------------------------------------------------------------------------------------


# Of queries and keys: (B, Q, K) bool, or one for each kind of layer.
Visible = Callable[[Tokens, Tokens], torch.Tensor | dict[str, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one forward reads; tensors on the host.

    x_BQ      tokens, with padding behind those of a row
    queries   where they stand; padding is document -1
    keys      (B, K) what stands in the buffer after this forward has written
    visible   which query may see which key
    plain     the kernel finds that out by itself: everything sees everything, or a text is read causally
    place_BQ  where keys and values are written
    start     the same, if it is one slice for all rows
    length    K
    buffer    of these rows
    """

    x_BQ: torch.Tensor
    queries: Tokens
    keys: Tokens
    visible: Visible
    plain: bool
    place_BQ: torch.Tensor
    start: int | None
    length: int
    buffer: Buffer


@dataclasses.dataclass(frozen=True)
class Runner:
    """How forwards are run (acceleration.py).

    body         (reader, batch) -> (B, Q, D) last hidden states
    make_buffer  (rows, capacity) -> a buffer of at least this capacity
    """

    body: Callable[[Any, Batch], torch.Tensor]
    make_buffer: Callable[[int, int], Buffer]


def places(reads: Sequence[slice], buffer: Buffer) -> tuple[torch.Tensor, int | None]:
    """(B, Q) places of the tokens read of each row, and where they begin if it is one slice for all.

    Padding goes to the last place, which no row uses.
    """
    start_B1 = torch.tensor([[own.start] for own in reads])
    count_B1 = torch.tensor([[own.stop - own.start] for own in reads])
    column_Q = torch.arange(int(count_B1.max()))
    place_BQ = torch.where(column_Q < count_B1, start_B1 + column_Q, buffer.capacity - 1)
    alike = all((own.start, own.stop) == (reads[0].start, reads[0].stop) for own in reads)
    return place_BQ, reads[0].start if alike else None


def read(
    reader: Reader, batch: Batch, wanted_N: torch.Tensor, kept_MD: torch.Tensor | None = None
) -> torch.Tensor:
    """(N, D) inputs of the head; (N, V) logits if the head is not plain.

    `wanted_N` (host) numbers the rows of `kept_MD`, if there are any, and after them the batch's B · Q
    outputs. Raises CheckpointError if the model keeps no keys: one with its own code may not.
    """
    before = 0 if kept_MD is None else len(kept_MD)
    # Sent before the forward: a copy that is asked for behind it would wait for it.
    index_N = wanted_N.to(reader.device, non_blocking=True)
    if reader.plain_head:
        outputs_MD = reader.runner.body(reader, batch).flatten(0, 1)
    else:
        # This head runs inside the model, so it is told where; the device waits for a count here.
        needed_M = torch.zeros(before + batch.x_BQ.numel(), dtype=torch.bool)
        needed_M[wanted_N] = True
        number_M = needed_M[before:].cumsum(0) - 1
        inside_N = (wanted_N - before).clamp(min=0)
        needed_BQ = needed_M[before:].view_as(batch.x_BQ).to(reader.device)
        outputs_MD = call(reader, batch, reader.model, logits_to_keep=needed_BQ).logits
        wanted_N = torch.where(wanted_N < before, wanted_N, before + number_M[inside_N])
        index_N = wanted_N.to(reader.device)
    table_MD = outputs_MD if kept_MD is None else torch.cat([kept_MD, outputs_MD])
    return table_MD[index_N]


def eager_body(reader: Reader, batch: Batch) -> torch.Tensor:
    """(B, Q, D) last hidden states, kernel by kernel."""
    states_BQD: torch.Tensor = call(reader, batch, reader.model.base_model)[0]
    return states_BQD


def new_buffer(rows: int, capacity: int) -> Buffer:
    """One that lasts for a while."""
    return Buffer(rows, -(-capacity // GRAIN) * GRAIN)


EAGER = Runner(eager_body, new_buffer)


def call(reader: Reader, batch: Batch, module: Any, **options: Any) -> Any:
    """What the model (or its body) says of a batch; its keys and values are in the buffer then.

    Raises CheckpointError if they are not.
    """
    from transformers.cache_utils import Cache

    if not _REGISTERED:
        _register()
    device = reader.device
    x_BQ, queries = sent(batch.x_BQ, batch.queries, device)
    mask: Any = None
    if not batch.plain:
        _, keys = sent(None, batch.keys, device)
        seen, dtype = batch.visible(queries, keys), reader.model.dtype
        if isinstance(seen, dict):
            mask = {kind: attention.float_mask(one, dtype) for kind, one in seen.items()}
        else:
            mask = attention.float_mask(seen, dtype)
    where = None
    if batch.start is None:
        row_B1 = torch.arange(len(x_BQ), device=device)[:, None]
        where = (row_B1, batch.place_BQ.to(device, non_blocking=True))
    config = reader.model.config.get_text_config()
    layers = [Layer(batch, index, where) for index in range(config.num_hidden_layers)]
    found = module(
        x_BQ,
        attention_mask=mask,
        position_ids=queries.position,
        past_key_values=Cache(layers=layers),
        use_cache=True,
        **options,
    )
    if not any(layer.is_initialized for layer in layers):
        raise CheckpointError(
            f"{type(reader.model).__name__} cannot be read block by block: its code keeps no keys and"
            " values in the cache it is given (the argument past_key_values)"
        )
    return found


def sent(
    x_BQ: torch.Tensor | None, tokens: Tokens, device: torch.device
) -> tuple[torch.Tensor, Tokens]:
    """Token ids and where they stand, on the device, by one copy."""
    fields = [tokens.document, tokens.position, tokens.stream, tokens.masked.long()]
    packed = torch.stack([fields[0] if x_BQ is None else x_BQ, *fields])
    packed = packed.to(device, non_blocking=True)
    return packed[0], Tokens(packed[1], packed[2], packed[3], packed[4].bool())


class Layer:
    """A layer of the buffer as `transformers` expects it for the time of a forward (CacheLayerMixin)."""

    is_compileable = False
    is_sliding = False
    is_croppable = False

    def __init__(
        self, batch: Batch, index: int, where: tuple[torch.Tensor, torch.Tensor] | None
    ) -> None:
        """`where`: rows (B, 1) and places (B, Q), unless all are one slice."""
        self.batch, self.index, self.where = batch, index, where
        self.is_initialized = False  # becomes true when the model has written

    def update(
        self, keys_BHQW: torch.Tensor, values_BHQW: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write what is new; all keys and values that may be seen, (B, H, K, W)."""
        batch, rows, width = self.batch, len(keys_BHQW), keys_BHQW.shape[2]
        self.is_initialized = True
        seen = []
        parts = batch.buffer.layer(self.index, keys_BHQW, values_BHQW)
        for part, new_BHQW in zip(parts, (keys_BHQW, values_BHQW), strict=True):
            if self.where is None:
                assert batch.start is not None
                part[:rows, :, batch.start : batch.start + width] = new_BHQW
            else:
                row_B1, place_BQ = self.where
                part[row_B1, :, place_BQ] = new_BHQW.transpose(1, 2).to(part.dtype)
            seen.append(part[:rows, :, : batch.length])
        return seen[0], seen[1]

    def get_seq_length(self) -> int:
        """Tokens before those that are read now."""
        return self.batch.length - self.batch.x_BQ.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys, and where they begin."""
        return self.batch.length, 0

    def get_max_length(self) -> int:
        """No more fit."""
        return self.batch.buffer.capacity


_REGISTERED = False


def _register() -> None:
    """Tell `transformers` that Layer is one of its layers; not at import, which would take a second."""
    from transformers.cache_utils import CacheLayerMixin

    global _REGISTERED
    CacheLayerMixin.register(Layer)
    _REGISTERED = True
