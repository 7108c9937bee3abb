"""The engine: one thread that owns the models and takes one forward after the other.

Every forward is put together anew from all rows that are in work, whatever their lengths, steps,
temperatures, seeds and guidance; a request joins at the next forward and leaves with its last. The
sampler's `take_step` is the only way a canvas moves, so a faster step there is a faster server.
Every row in work gets one forward a round. What a row becomes does not depend on the others.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections.abc import Sequence

import torch

from mdm.canvas import Commit
from mdm.denoiser import Denoiser
from mdm.sampler import take_step

from .errors import (
    as_serve_error,
    cancelled,
    deadline_exceeded,
    is_out_of_memory,
    queue_full,
    shutting_down,
)
from .jobs import Committed, Event, Failed, FillUnit, Job, JobDone, RowDone, StepsUnit, Unit
from .limits import Limits
from .memory import Footprint, PeakMeter, bytes_per_choice
from .telemetry import Telemetry

log = logging.getLogger("mdm.serve")

# Rows of unlike length share a forward while no more than this part of it is padding.
MAX_PADDING = 0.25
# Of a model with blocks, which reads few tokens of a row: no matter how large a part, if it is no more
# than so many tokens. Below about a hundred a forward costs what reading the weights costs.
FREE_PADDING = 64
# So many forwards in a row that fail, and the engine calls itself ill; for so long.
ILL_AFTER = 5
ILL_FOR_S = 30.0
# After running out of memory forwards are planned half as large, and grow again by so much each.
GROW = 1.005

Row = tuple[Job, FillUnit]


class Engine:
    """Runs jobs. `submit`, `drain`, `stop` and the properties may be used from any thread.

    denoiser   the student
    footprint  its sizes, for planning forwards
    workspace  bytes that forwards and caches may take
    threads    CPU threads of a forward
    """

    def __init__(
        self,
        denoiser: Denoiser,
        footprint: Footprint,
        limits: Limits,
        workspace: int,
        telemetry: Telemetry,
        threads: int,
    ) -> None:
        self.threads = threads
        self.denoiser, self.footprint = denoiser, footprint
        self.limits, self.workspace = limits, workspace
        self.share = 1.0  # of the workspace that forwards are planned for; less after a failure
        self.telemetry = telemetry
        self.meter = PeakMeter(denoiser.device)
        telemetry.watch(lambda: self.waiting, lambda: self.rows_in_work)
        self.failures = 0  # forwards that failed since the last one that did not
        self.failed_at = -math.inf
        self._end_by = math.inf  # when those in work are given up; finite while draining
        self._jobs: list[Job] = []  # in order of arrival
        self._stopping = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="mdm-engine", daemon=True)

    # --- from any thread ---------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, job: Job, *, follows: bool = False) -> None:
        """Take on a job. Raises ServeError if the queue is full or the server shuts down.

        `follows`: it is the second half of a request that was taken on.
        """
        with self._wake:
            if self._stopping:
                raise shutting_down()
            if not follows:
                self.check_room()
            self._jobs.append(job)
            self._wake.notify()

    def check_room(self) -> None:
        """Raise ServeError if a job would not be taken on now."""
        if self.draining:
            raise shutting_down()
        jobs = list(self._jobs)
        waiting = sum(job.started is None for job in jobs)
        places = sum(unit.places for job in jobs for unit in (*job.running, *job.units))
        if waiting >= self.limits.max_queue and places >= self.limits.max_rows:
            raise queue_full(waiting, self.limits.max_queue, self._retry_after(waiting))

    @property
    def draining(self) -> bool:
        """Are new jobs refused?"""
        return self._end_by < math.inf

    def drain(self, seconds: float) -> None:
        """Refuse new jobs; those that are here may go on for so long.

        Takes no lock, so that a signal handler can call it.
        """
        self._end_by = min(self._end_by, time.monotonic() + seconds)

    def stop(self) -> None:
        """End the thread; who is still in work is told."""
        self.drain(0)
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def illness(self) -> str | None:
        """Why the engine cannot work, or None. It is tried again after a while."""
        if not self._thread.is_alive():
            return "the engine's thread has ended"
        if self.failures >= ILL_AFTER and time.monotonic() - self.failed_at < ILL_FOR_S:
            return f"the last {self.failures} forwards failed"
        return None

    @property
    def waiting(self) -> int:
        """Requests that have not had their first forward."""
        return sum(job.started is None for job in list(self._jobs))

    @property
    def rows_in_work(self) -> int:
        """Texts and likelihoods in work now."""
        return sum(unit.places for job in list(self._jobs) for unit in list(job.running))

    def _retry_after(self, waiting: int) -> int:
        """Seconds until the queue has moved on by as much as is waiting, as far as one can tell."""
        mean = self.telemetry.mean_seconds() or 1.0
        return max(1, min(60, math.ceil(mean * waiting / self.limits.max_rows)))

    # --- the engine's thread -----------------------------------------------------------------------

    def _work(self) -> None:
        # Set in this thread: OpenMP's settings and helpers belong to the thread that uses them.
        torch.set_num_threads(self.threads)
        while True:
            with self._wake:
                while not self._jobs and not self._stopping:
                    self._wake.wait()
                if self._stopping and not self._jobs:
                    return
            try:
                self._round()
            except Exception as error:  # the edge: no request may take the server down
                log.exception("a round of the engine failed")
                self._note_failure()
                for job in list(self._jobs):
                    self._end(job, Failed(as_serve_error(error)))

    def _round(self) -> None:
        """One forward for every row in work."""
        for job in list(self._jobs):
            if self._stopping or time.monotonic() > self._end_by:
                self._end(job, Failed(shutting_down()))
            elif job.cancelled:
                self._end(job, Failed(cancelled()))
            elif job.age > job.timeout_s:
                where = "waiting" if job.started is None else "in work"
                self._end(job, Failed(deadline_exceeded(job.timeout_s, where)))
        self._admit()
        running = [(job, unit) for job in self._jobs for unit in job.running]
        fills = [(job, unit) for job, unit in running if isinstance(unit, FillUnit)]
        for group in self._groups(fills):
            self._fill(group)
        for job, unit in running:
            if isinstance(unit, StepsUnit):
                self._advance(job, unit)

    def _admit(self) -> None:
        """Start units while there is room: first of the request with the fewest in work, then the oldest.

        One that does not fit now is waited for, so that small ones cannot keep it out.
        """
        while True:
            with_more = [job for job in self._jobs if job.units]
            if not with_more:
                return
            job = min(with_more, key=lambda job: len(job.running))
            if not self._has_room(job.units[0]):
                return
            job.running.append(job.units.popleft())
            if job.started is None:
                job.started = time.monotonic()
                job.usage.queue_s = job.started - job.arrived

    def _has_room(self, unit: Unit) -> bool:
        """Is there a place and memory for it? For one that is alone there always is."""
        running = [one for job in self._jobs for one in job.running]
        if not running:
            return True
        if sum(one.places for one in running) + unit.places > self.limits.max_rows:
            return False
        together = (*running, unit)
        return _held(together) + max(one.step_bytes for one in together) <= self.workspace

    def _groups(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows that go into one forward: of like length, within the memory and the tokens allowed."""
        held = _held([unit for job in self._jobs for unit in job.running])
        groups: list[list[Row]] = []
        for row in sorted(rows, key=lambda row: -row[1].read):
            if groups and self._fits([unit for _, unit in (*groups[-1], row)], held):
                groups[-1].append(row)
            else:
                groups.append([row])
        return groups

    def _fits(self, units: Sequence[FillUnit], held: int) -> bool:
        longest = max(unit.read for unit in units)
        rows = sum(unit.rows for unit in units)
        padding = rows * longest - sum(unit.rows * unit.read for unit in units)
        free = 0 if self.denoiser.block_size is None else FREE_PADDING
        if rows * longest > self.limits.batch_tokens:
            return False
        if padding > max(MAX_PADDING * rows * longest, free):
            return False
        return held + self._step_bytes(units) <= self.share * self.workspace

    def _step_bytes(self, units: Sequence[FillUnit]) -> int:
        """Predicted memory of one forward for all of them."""
        longest = max(unit.read for unit in units)
        settings = [unit.filling.canvas.settings for unit in units]
        keeps = any(unit.held_bytes for unit in units)
        return self.footprint.step_bytes(
            sum(unit.rows for unit in units),
            longest,
            sum(unit.outputs for unit in units),
            max(settings, key=lambda own: (own.cfg_scale > 0, bytes_per_choice(own))),
            padded=any(unit.read < longest for unit in units),
            kept=max(unit.kept for unit in units) if keeps else None,
            last=max(unit.last for unit in units),
        )

    def _fill(self, group: Sequence[Row]) -> None:
        """One forward for these rows. If it fails, it is tried in halves; a row fails alone."""
        group = [(job, unit) for job, unit in group if not job.ended]
        if not group:
            return
        canvases = {number: unit.filling.canvas for number, (_, unit) in enumerate(group)}
        before = [unit.filling.canvas.nfe for _, unit in group]
        self.meter.reset()
        began = time.monotonic()
        problem: Exception | None = None
        try:
            commits = take_step(self.denoiser, canvases)
        except Exception as error:  # noqa: BLE001  the edge: it fails this row's request only
            problem = _without_frames(error)
        if problem is not None:  # out here nothing holds the tensors of the failed forward
            self._recover(problem, group)
            half = len(group) // 2
            if half:
                self._fill(group[:half])
                self._fill(group[half:])
            else:
                self._fail(group[0][0], problem)
            return
        seconds, reading = time.monotonic() - began, self.meter.read()
        self.failures = 0
        self.share = min(1.0, self.share * GROW)
        self.telemetry.forward("denoise", len(group), seconds, reading)
        for job in {id(job): job for job, _ in group}.values():
            job.usage.note_pass(seconds, len(group), reading)
        decided = {commit.row: commit for commit in commits}
        for number, (job, unit) in enumerate(group):
            try:
                forwards = canvases[number].nfe - before[number]
                self._deliver(job, unit, decided[number], forwards)
            except Exception as error:  # noqa: BLE001  the edge, as above
                self._fail(job, _without_frames(error))

    def _deliver(self, job: Job, unit: FillUnit, commit: Commit, forwards: int) -> None:
        """Tell what one forward (of a guided row, two) decided in one row; its text if it was the last."""
        if job.ended:
            return
        job.usage.note(commit.kind, forwards, commit.tokens_read)
        self.telemetry.count_forwards(job.model, commit.kind, forwards, commit.tokens_read)
        positions = tuple(place - unit.start for place in commit.positions_k.tolist())
        tokens, confidence = tuple(commit.tokens_k.tolist()), tuple(commit.confidence_k.tolist())
        self._tell(job, Committed(unit.row, unit.forward, job.age, positions, tokens, confidence))
        unit.forward += 1
        generation = unit.filling.follow(self.denoiser.vocab, commit)
        if generation is not None:
            self._tell(job, RowDone(unit.row, generation))
            self._finish(job, unit)

    def _advance(self, job: Job, unit: StepsUnit) -> None:
        """One forward of a process of its own."""
        if job.ended:
            return
        self.meter.reset()
        began = time.monotonic()
        problem: Exception | None = None
        try:
            if unit.iterator is None:
                unit.iterator = unit.advance(job)
            one = next(unit.iterator)
        except Exception as error:  # noqa: BLE001  the edge: it fails this request only
            problem = _without_frames(error)
        if problem is not None:
            self._recover(problem, ())
            self._fail(job, problem)
            return
        self.failures = 0
        seconds, reading = time.monotonic() - began, self.meter.read()
        job.usage.note_pass(seconds, one.rows, reading)
        self.telemetry.forward(one.kind, one.rows, seconds, reading)
        if one.last:
            self._finish(job, unit)

    # --- ends --------------------------------------------------------------------------------------

    def _finish(self, job: Job, unit: Unit) -> None:
        job.running.remove(unit)
        unit.close()
        if not job.running and not job.units:
            job.usage.total_s = job.age
            self._end(job, JobDone(job.usage))

    def _fail(self, job: Job, error: Exception) -> None:
        answer = as_serve_error(error)
        if is_out_of_memory(error):  # the fault of what was asked, not of the engine
            log.error("request %s ran out of memory", job.id)
        elif answer.status >= 500:
            self._note_failure()
            log.error("request %s failed: %s", job.id, "".join(_told(error)))
        self._end(job, Failed(answer))

    def _note_failure(self) -> None:
        self.failures += 1
        self.failed_at = time.monotonic()

    def _recover(self, error: Exception, group: Sequence[Row]) -> None:
        """Give memory back before anything is tried again, and plan smaller forwards for a while."""
        if not is_out_of_memory(error):
            return
        if len(group) > 1:
            half = self._step_bytes([unit for _, unit in group[: (len(group) + 1) // 2]])
            held = _held([unit for job in self._jobs for unit in job.running])
            self.share = min(self.share, (held + half) / self.workspace)
        if self.denoiser.device.type == "cuda":
            torch.cuda.empty_cache()

    def _end(self, job: Job, event: Event) -> None:
        """Forget the job: its places are free for the next round."""
        job.ended = True
        for unit in job.running:
            unit.close()
        job.running.clear()
        job.units.clear()
        with self._wake:
            if job in self._jobs:
                self._jobs.remove(job)
        self._tell(job, event)

    def _tell(self, job: Job, event: Event) -> None:
        try:
            job.listener(event)
        except RuntimeError:  # its event loop is closed; nobody listens any more
            job.cancel()


def _without_frames(error: Exception) -> Exception:
    """The error, its traceback as text; the frames would keep the tensors of a failed forward."""
    error.add_note("".join(traceback.format_tb(error.__traceback__)))
    traceback.clear_frames(error.__traceback__)
    return error.with_traceback(None)


def _told(error: Exception) -> list[str]:
    """Type, text and notes of an error, for the log of the server."""
    return [*getattr(error, "__notes__", []), f"{type(error).__name__}: {error}"]


def _held(units: Sequence[Unit]) -> int:
    """Predicted memory of what these keep between forwards.

    Texts that share a forward share a buffer whose rows are as long as the longest of them.
    """
    fills = [unit.held_bytes for unit in units if isinstance(unit, FillUnit)]
    others = sum(unit.held_bytes for unit in units if not isinstance(unit, FillUnit))
    return others + len(fills) * max(fills, default=0)
