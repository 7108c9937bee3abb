"""Forwards of fixed shape, recorded once and played again: CUDA graphs, or compiled code.

A small model spends most of a step on telling the GPU what to do, kernel by kernel. A recorded forward
is told in one go, but only for one shape and one place in memory. So buffers are kept and handed out
again, their capacities and the number of tokens read are rounded up to powers of two, and what the rounding
adds is hidden by the mask. Denoising steps, steps that also store a block, and the single tokens of an AR
model are all recorded, so student and teacher are treated alike; long prompts are read as they are.

    eager     nothing of this
    graphs    recorded on a GPU
    compile   torch.compile, on any device; the first steps take a minute

What could not be recorded is run eagerly, and `Static.reasons` counts why.
Shapes: B rows, Q tokens read, K keys, C capacity, D width.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from .attention import Tokens
from .buffers import EAGER, Batch, Buffer, Reader, Runner, eager_body
from .errors import ConfigError, check_known
from .int8 import is_quantised

log = logging.getLogger("mdm")

LEAST_CAPACITY = 256
MOST_READ = 256  # more tokens than this keep a GPU busy anyway
MOST_IDLE = 4  # buffers that are kept for later though nobody needs them now
REFUSED = "forwards of this shape could not be recorded"

# (function of nothing, device) -> function of nothing that does the same again.
Record = Callable[[Callable[[], torch.Tensor], torch.device], Callable[[], torch.Tensor]]


def accelerate(reader: Reader, mode: str) -> None:
    """Run the forwards of a Denoiser or Autoregressive in this mode from now on.

    Raises ConfigError for an unknown mode, or if the model is one or where it does not work.
    """
    check_known("mode", mode, MODES)
    if mode == "graphs" and reader.device.type != "cuda":
        raise ConfigError(
            f"mode=graphs records what a GPU is told, but this model is on {reader.device.type}; use"
            " mode=eager, or mode=compile"
        )
    if mode != "eager" and not reader.plain_head:
        raise ConfigError(
            f"mode={mode} records the body of a model, but the head of {type(reader.model).__name__} is"
            " more than a matrix and runs inside the model; use mode=eager"
        )
    if mode == "compile" and is_quantised(reader.model):
        raise ConfigError(
            "mode=compile finds nothing to compile in layers of 8 bits; use mode=eager, or no quantization"
        )
    reader.runner = MODES[mode]()


@dataclasses.dataclass
class _Recorded:
    """A forward of fixed shape: its inputs stay where they are.

    queries  (6, rows, width): tokens, places, document, position, stream, masked
    keys     (4, rows, capacity): document, position, stream, masked
    play     None if it could not be recorded
    """

    queries: torch.Tensor
    keys: torch.Tensor
    play: Callable[[], torch.Tensor] | None


@dataclasses.dataclass
class _Storage:
    """Keys and values that outlive a Buffer; `owner` is dead when they can be handed out again."""

    layers: dict[int, tuple[torch.Tensor, torch.Tensor]]
    owner: weakref.ref[Buffer]
    recorded: dict[int, _Recorded] = dataclasses.field(default_factory=dict)


class Static:
    """Runs batches by recorded forwards of the next larger shape.

    reasons  why forwards were run eagerly, and how often
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.reasons: Counter[str] = Counter()
        self.storages: dict[tuple[int, int], list[_Storage]] = {}

    def runner(self) -> Runner:
        """This, as what a model wants."""
        return Runner(self.body, self.make_buffer)

    def make_buffer(self, rows: int, capacity: int) -> Buffer:
        """A buffer whose memory may have served before."""
        room, capacity = _power(rows), max(LEAST_CAPACITY, _power(capacity))
        buffer = Buffer(rows, capacity, room)
        own = self.storages.setdefault((room, capacity), [])
        free = next((storage for storage in own if storage.owner() is None), None)
        if free is None:
            self._forget()
            own.append(_Storage(buffer.layers, weakref.ref(buffer)))
            return buffer
        for parts in free.layers.values():
            for part in parts:
                part.zero_()  # a mask hides any number, but not NaN
        buffer.layers, free.owner = free.layers, weakref.ref(buffer)
        return buffer

    def _forget(self) -> None:
        """Let go of memory that serves nobody, but for some."""
        idle = [
            (own, storage)
            for own in self.storages.values()
            for storage in own
            if storage.owner() is None
        ]
        for own, storage in idle[: max(0, len(idle) - MOST_IDLE)]:
            own.remove(storage)

    def body(self, reader: Reader, batch: Batch) -> torch.Tensor:
        """(B, Q, D) last hidden states."""
        rows, width = batch.x_BQ.shape
        recorded, why = self._find(reader, batch)
        if recorded is None or recorded.play is None:
            self.reasons[why] += 1
            return eager_body(reader, batch)
        _fill(recorded, batch)
        return recorded.play()[:rows, :width]

    def _find(self, reader: Reader, batch: Batch) -> tuple[_Recorded | None, str]:
        """The recorded forward for a batch; None and why if there is none."""
        width, buffer = batch.x_BQ.shape[1], batch.buffer
        if width > MOST_READ:
            return None, f"more than {MOST_READ} tokens are read at once"
        if not buffer.layers:
            return None, "the first forward in a new buffer"
        own = self.storages.get((buffer.room, buffer.capacity), ())
        storage = next((one for one in own if one.layers is buffer.layers), None)
        if storage is None:
            return None, "a buffer of a text that was begun in another mode"
        recorded = storage.recorded.get(_power(width))
        if recorded is None:
            recorded = self._recorded(reader, batch)
            storage.recorded[_power(width)] = recorded
        return recorded, REFUSED

    def _recorded(self, reader: Reader, batch: Batch) -> _Recorded:
        rows, capacity = batch.buffer.room, batch.buffer.capacity
        device = reader.device
        queries = torch.zeros(6, rows, _power(batch.x_BQ.shape[1]), dtype=torch.long, device=device)
        keys = torch.zeros(4, rows, capacity, dtype=torch.long, device=device)
        recorded = _Recorded(queries, keys, None)
        _fill(recorded, batch)
        # Never the buffer itself: its owner is to die when its rows are finished.
        home = Buffer(rows, capacity)
        home.layers = batch.buffer.layers
        fixed = Batch(
            queries[0],
            Tokens(*queries[2:]),
            Tokens(*keys),
            batch.visible,
            False,
            queries[1],
            None,
            capacity,
            home,
        )
        try:
            run = functools.partial(eager_body, reader, fixed)
            recorded.play = self.record(run, device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            why = " ".join(str(error).split())[:200]
            log.warning("%s, so they are run kernel by kernel: %s", REFUSED, why)
        return recorded


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def _fill(recorded: _Recorded, batch: Batch) -> None:
    """Send what is read now to where the recorded forward finds it; what is left over is of no document."""
    (rows, width), keys = batch.x_BQ.shape, batch.length
    queries = torch.zeros(recorded.queries.shape, dtype=torch.long)
    queries[1], queries[2] = recorded.keys.shape[2] - 1, -1
    own = batch.queries
    for place, part in enumerate(
        (batch.x_BQ, batch.place_BQ, own.document, own.position, own.stream, own.masked)
    ):
        queries[place, :rows, :width] = part
    seen = torch.zeros(recorded.keys.shape, dtype=torch.long)
    seen[0] = -1
    own = batch.keys
    for place, part in enumerate((own.document, own.position, own.stream, own.masked)):
        seen[place, :rows, :keys] = part
    recorded.queries.copy_(queries, non_blocking=True)
    recorded.keys.copy_(seen, non_blocking=True)


# --- ways to record ----------------------------------------------------------------------------------


def _graph(
    run: Callable[[], torch.Tensor], device: torch.device, *, pool: list[Any]
) -> Callable[[], torch.Tensor]:
    """A CUDA graph of the call, after three calls that let libraries choose their kernels.

    All graphs of a model share memory for what is between their inputs and outputs: an output is used up
    before the next graph is played.
    """
    with torch.no_grad(), torch.cuda.device(device):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream(device).wait_stream(side)
        if not pool:
            pool.append(torch.cuda.graph_pool_handle())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool[0], stream=side, capture_error_mode="thread_local"):
            states_BQD = run()

    def play() -> torch.Tensor:
        graph.replay()
        return states_BQD

    return play


def _compiled(run: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
    compiled: Callable[[], torch.Tensor] = torch.compile(run)
    with torch.no_grad():
        compiled()  # what cannot be compiled shows now
    return compiled


MODES: dict[str, Callable[[], Runner]] = {
    "eager": lambda: EAGER,
    "graphs": lambda: Static(functools.partial(_graph, pool=[])).runner(),
    "compile": lambda: Static(_compiled).runner(),
}
