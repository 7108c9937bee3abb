"""A request as work for the engine: units that take one forward at a time, events that tell of it.

A unit is one place in the batch: a row of the student that is being filled (rows of all requests
share forwards), or a process of its own (a likelihood, a text the teacher writes) that is moved on
by one forward. Events hold plain numbers and may cross threads.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Sequence

from mdm.canvas import NOTHING_READ, Canvas
from mdm.generate import Filling, Generation
from mdm.grid import BlockGrid
from mdm.likelihood import Likelihood

from .errors import ServeError
from .memory import Reading, highest

FORWARD_KINDS = ("prefill", "store", "refresh", "denoise", "decode", "score")


@dataclasses.dataclass
class Usage:
    """What a request has cost so far.

    queue_s         seconds it waited for its first forward
    compute_s       seconds of the forwards it took part in (others may have shared them)
    forwards        by kind; a guided row counts 2 (one row in a forward counts 1)
    token_forwards  positions computed, padding left out
    passes          forwards it took part in, and rows in them, all requests counted
    peak            highest memory of the process (and the GPU) during its forwards
    """

    queue_s: float = 0.0
    compute_s: float = 0.0
    total_s: float = 0.0
    forwards: dict[str, int] = dataclasses.field(default_factory=dict)
    token_forwards: int = 0
    passes: int = 0
    batch_rows: int = 0
    peak: Reading | None = None

    def note(self, kind: str, forwards: int, tokens: int) -> None:
        """Count the forwards of one row."""
        self.forwards[kind] = self.forwards.get(kind, 0) + forwards
        self.token_forwards += tokens

    def note_pass(self, seconds: float, rows: int, reading: Reading) -> None:
        """Count one forward of the model in which this request had rows."""
        self.compute_s += seconds
        self.passes += 1
        self.batch_rows += rows
        self.peak = highest(self.peak, reading)


# --- events ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Committed:
    """One row's tokens decided in one forward; positions count from the start of the hole.

    forward  number of the row's forward, from 0
    seconds  since the request arrived
    """

    row: int
    forward: int
    seconds: float
    positions: tuple[int, ...]
    tokens: tuple[int, ...]
    confidence: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class RowDone:
    """The text of one row."""

    row: int
    generation: Generation


@dataclasses.dataclass(frozen=True)
class Scored:
    """The likelihood of one pair."""

    index: int
    likelihood: Likelihood


@dataclasses.dataclass(frozen=True)
class JobDone:
    """All units are finished; what they cost."""

    usage: Usage


@dataclasses.dataclass(frozen=True)
class Failed:
    """The request ends without a result."""

    error: ServeError


Event = Committed | RowDone | Scored | JobDone | Failed


# --- units and jobs --------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class FillUnit:
    """One row of the student.

    start       of the hole in the canvas
    length      of its canvas
    rows        rows it takes in a forward: 2 if guided
    outputs     most positions whose tokens a forward can choose
    step_bytes  predicted memory of its largest forward, alone
    held_bytes  predicted memory of what is kept of it between forwards
    last        tokens for which its buffer has room
    block_size  of a model with blocks
    """

    row: int
    filling: Filling
    start: int
    length: int
    rows: int
    outputs: int
    step_bytes: int
    held_bytes: int = 0
    last: int = 0
    block_size: int | None = None
    forward: int = 0

    @property
    def kept(self) -> int:
        """Positions before those of the next forward, read by earlier ones and kept; in blocks."""
        return 0 if self.block_size is None else self.filling.canvas.prefixes[0].length

    @property
    def read(self) -> int:
        """Positions that the next forward reads; while it is not finished."""
        if self.block_size is None:
            return self.length
        canvas = self.filling.canvas
        return block_stop(canvas, canvas.blocks[0], self.block_size) - self.kept

    @property
    def places(self) -> int:
        """Of the texts that may be in work at the same time."""
        return 1

    def close(self) -> None:
        """Let go of what was kept of the canvas."""
        self.filling.canvas.prefixes = NOTHING_READ


def block_stop(canvas: Canvas, part: slice, block_size: int) -> int:
    """Where the model's block ends of which this is a part; the last one may be shorter."""
    return BlockGrid(0, len(canvas.ids_L), block_size).block(part.start // block_size).stop


@dataclasses.dataclass(frozen=True)
class Pass:
    """One forward of a process of its own: its kind, the rows in it, and whether it was the last."""

    kind: str
    rows: int
    last: bool


@dataclasses.dataclass(eq=False)
class StepsUnit:
    """A process that takes one forward every time it is asked for the next item.

    advance  (job) -> generator; it emits the job's events and counts its forwards itself
    places   texts it works on
    """

    advance: Callable[[Job], Generator[Pass, None, None]]
    step_bytes: int
    held_bytes: int = 0
    places: int = 1
    iterator: Generator[Pass, None, None] | None = None

    def close(self) -> None:
        """Let go of what it holds, caches above all."""
        if self.iterator is not None:
            self.iterator.close()
            self.iterator = None


Unit = FillUnit | StepsUnit


@dataclasses.dataclass(eq=False)
class Job:
    """One request in the engine's care.

    kind      generate or score, for the metrics
    model     name of the model that works on it
    units     what is still to be started
    listener  called in the engine's thread with every event; must return at once
    timeout_s seconds from its arrival after which it is given up
    """

    kind: str
    model: str
    units: deque[Unit]
    listener: Callable[[Event], None]
    timeout_s: float
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    usage: Usage = dataclasses.field(default_factory=Usage)
    running: list[Unit] = dataclasses.field(default_factory=list)
    started: float | None = None
    cancelled: bool = False
    ended: bool = False

    @classmethod
    def of(
        cls,
        kind: str,
        model: str,
        units: Sequence[Unit],
        listener: Callable[[Event], None],
        timeout_s: float,
        arrived: float | None = None,
    ) -> Job:
        """A new job; `arrived` is a time of time.monotonic(), by default now."""
        job = cls(kind, model, deque(units), listener, timeout_s)
        if arrived is not None:
            job.arrived = arrived
        return job

    @property
    def age(self) -> float:
        """Seconds since it arrived."""
        return time.monotonic() - self.arrived

    def cancel(self) -> None:
        """Give it up before the next forward; may be called from any thread."""
        self.cancelled = True
