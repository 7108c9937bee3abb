"""Forwards of fixed shape, recorded once and played again: CUDA graphs, or compiled code.

A small model spends most of a step on telling the GPU what to do, kernel by kernel. A recorded forward
is told in one go, but only for one shape and one place in memory. So buffers are kept and handed out
again, their capacities and the number of tokens read are rounded up to powers of two, and what the rounding
adds is hidden by the mask. Denoising steps, steps that also store a block, and the single tokens of an AR
model are all recorded, so student and teacher are treated alike; long prompts are read as they are.

    eager     nothing of this
    graphs    recorded on a GPU
    compile   torch.compile, on any device; the first step of each shape takes a minute

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

import torch

from .attention import Tokens
from .buffers import EAGER, Batch, Buffer, Reader, Runner, eager_body
from .errors import ConfigError, check_known

log = logging.getLogger("mdm")

LEAST_CAPACITY = 256
MOST_READ = 256  # more tokens than this keep a GPU busy anyway

# (function of nothing, device) -> function of nothing that does the same again.
Record = Callable[[Callable[[], torch.Tensor], torch.device], Callable[[], torch.Tensor]]


def accelerate(reader: Reader, mode: str) -> None:
    """Run the forwards of a Denoiser or Autoregressive in this mode from now on.

    Raises ConfigError for an unknown mode, or if the model is where it does not work.
    """
    check_known("mode", mode, MODES)
    if mode == "graphs" and reader.device.type != "cuda":
        raise ConfigError(
            f"mode=graphs records what a GPU is told, but this model is on {reader.device.type}; use"
            " mode=eager, or mode=compile"
        )
    record = MODES[mode]
    reader.runner = EAGER if record is None else Static(record).runner()


@dataclasses.dataclass
class _Recorded:
    """A forward of fixed shape: its inputs stay where they are."""

    batch: Batch
    play: Callable[[], torch.Tensor]


@dataclasses.dataclass
class _Storage:
    """Keys and values that outlive a Buffer; `owner` is dead when they can be handed out again."""

    layers: dict[int, tuple[torch.Tensor, torch.Tensor]]
    owner: weakref.ref[Buffer]
    recorded: dict[tuple[int, int], _Recorded] = dataclasses.field(default_factory=dict)


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
        capacity = max(LEAST_CAPACITY, _power(capacity))
        buffer = Buffer(rows, capacity)
        for storage in self.storages.setdefault((rows, capacity), []):
            if storage.owner() is None:
                # What is left there from others is hidden like all that is not a row's own.
                buffer.layers, storage.owner = storage.layers, weakref.ref(buffer)
                return buffer
        self.storages[rows, capacity].append(_Storage(buffer.layers, weakref.ref(buffer)))
        return buffer

    def body(self, reader: Reader, batch: Batch) -> torch.Tensor:
        """(B, Q, D) last hidden states."""
        why = self._why_not(batch)
        if why is not None:
            self.reasons[why] += 1
            return eager_body(reader, batch)
        storage = next(
            one
            for one in self.storages[batch.buffer.rows, batch.buffer.capacity]
            if one.layers is batch.buffer.layers
        )
        width = batch.x_BQ.shape[1]
        key = (len(batch.x_BQ), _power(width))
        recorded = storage.recorded.get(key)
        if recorded is None:
            recorded = self._recorded(reader, batch)
            storage.recorded[key] = recorded
        _fill(recorded.batch, batch)
        return recorded.play()[:, :width]

    def _why_not(self, batch: Batch) -> str | None:
        if batch.x_BQ.shape[1] > MOST_READ:
            return f"more than {MOST_READ} tokens are read at once"
        if not batch.buffer.layers:
            return "the first forward in a new buffer"
        return None

    def _recorded(self, reader: Reader, batch: Batch) -> _Recorded:
        fixed = _fixed(batch, _power(batch.x_BQ.shape[1]), reader.device)
        _fill(fixed, batch)
        run = functools.partial(eager_body, reader, fixed)
        try:
            return _Recorded(fixed, self.record(run, reader.device))
        except RuntimeError as error:
            why = f"it could not be recorded ({' '.join(str(error).split())[:200]})"
            log.warning("forwards of this shape are run kernel by kernel: %s", why)
            self.reasons[why] += 1
            return _Recorded(fixed, run)


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def _fixed(batch: Batch, width: int, device: torch.device) -> Batch:
    """A batch of the same rows with `width` tokens each and all keys of the buffer, to be filled in."""
    rows, capacity = len(batch.x_BQ), batch.buffer.capacity
    # Never the buffer itself: its owner is to die when its rows are finished.
    home = Buffer(batch.buffer.rows, capacity)
    home.layers = batch.buffer.layers
    return Batch(
        torch.zeros(rows, width, dtype=torch.long, device=device),
        _nothing(rows, width, device),
        _nothing(rows, capacity, device),
        batch.visible,
        False,
        torch.zeros(rows, width, dtype=torch.long, device=device),
        None,
        capacity,
        home,
    )


def _nothing(rows: int, length: int, device: torch.device) -> Tokens:
    zeros = torch.zeros(4, rows, length, dtype=torch.long, device=device)
    return Tokens(zeros[0], zeros[1], zeros[2], zeros[3].bool())


def _fill(fixed: Batch, batch: Batch) -> None:
    """Write what is read now where the recorded forward finds it; what is left over is of no document."""
    width, keys = batch.x_BQ.shape[1], batch.length
    fixed.x_BQ[:, :width] = batch.x_BQ.to(fixed.x_BQ.device, non_blocking=True)
    fixed.place_BQ[:, width:] = fixed.length - 1
    fixed.place_BQ[:, :width] = batch.place_BQ.to(fixed.x_BQ.device, non_blocking=True)
    for own, new, stop in (
        (fixed.queries, batch.queries, width),
        (fixed.keys, batch.keys, keys),
    ):
        own.document[:, stop:] = -1
        for name in ("document", "position", "stream", "masked"):
            part: torch.Tensor = getattr(own, name)
            part[:, :stop] = getattr(new, name).to(part.device, non_blocking=True)


# --- ways to record ----------------------------------------------------------------------------------


def _graph(run: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
    """A CUDA graph of the call, after three calls that let libraries choose their kernels."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        states_BQD = run()

    def play() -> torch.Tensor:
        graph.replay()
        return states_BQD

    return play


def _compiled(run: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
    compiled: Callable[[], torch.Tensor] = torch.compile(run)
    return compiled


MODES: dict[str, Record | None] = {"eager": None, "graphs": _graph, "compile": _compiled}
