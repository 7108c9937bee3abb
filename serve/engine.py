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
from collections.abc import Sequence

import torch

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
from .memory import Footprint, PeakMeter
from .telemetry import Telemetry

log = logging.getLogger("mdm.serve")

# Rows of unlike length share a forward while no more than this part of it is padding.
MAX_PADDING = 0.25
# So many forwards in a row that fail, and the engine calls itself ill.
ILL_AFTER = 5


class Engine:
    """Runs jobs. `submit`, `drain`, `stop` and the properties may be used from any thread.

    denoiser   the student
    footprint  its sizes, for planning forwards
    workspace  bytes that forwards and caches may take
    """

    def __init__(
        self,
        denoiser: Denoiser,
        footprint: Footprint,
        limits: Limits,
        workspace: int,
        telemetry: Telemetry,
    ) -> None:
        self.denoiser, self.footprint = denoiser, footprint
        self.limits, self.workspace = limits, workspace
        self.telemetry = telemetry
        self.meter = PeakMeter(denoiser.device)
        telemetry.watch(lambda: self.waiting, lambda: self.rows_in_work)
        self.draining = False
        self.failures = 0  # forwards that failed since the last one that did not
        self._jobs: list[Job] = []  # in order of arrival
        self._stopping = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="mdm-engine", daemon=True)

    # --- from any thread ---------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Take on a job. Raises ServeError if the queue is full or the server shuts down."""
        with self._wake:
            self.check_room()
            self._jobs.append(job)
            self._wake.notify()

    def check_room(self) -> None:
        """Raise ServeError if a job would not be taken on now."""
        if self.draining:
            raise shutting_down()
        jobs = list(self._jobs)
        waiting = sum(job.started is None for job in jobs)
        places = sum(len(job.running) + len(job.units) for job in jobs)
        if waiting >= self.limits.max_queue and places >= self.limits.max_rows:
            raise queue_full(waiting, self.limits.max_queue, self._retry_after(waiting))

    def drain(self) -> None:
        """Refuse new jobs; those that are here are finished."""
        with self._wake:
            self.draining = True

    def stop(self, grace_s: float = 0.0) -> None:
        """Refuse new jobs, give the others `grace_s` seconds to finish, end the thread."""
        self.drain()
        until = time.monotonic() + grace_s
        while self._jobs and time.monotonic() < until and self._thread.is_alive():
            time.sleep(0.01)
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def illness(self) -> str | None:
        """Why the engine cannot work, or None."""
        if not self._thread.is_alive():
            return "the engine's thread has ended"
        if self.failures >= ILL_AFTER:
            return f"the last {self.failures} forwards failed"
        return None

    @property
    def waiting(self) -> int:
        """Requests that have not had their first forward."""
        return sum(job.started is None for job in list(self._jobs))

    @property
    def rows_in_work(self) -> int:
        """Texts and likelihoods in work now."""
        return sum(len(job.running) for job in list(self._jobs))

    def _retry_after(self, waiting: int) -> int:
        """Seconds until the queue has moved on by as much as is waiting, as far as one can tell."""
        mean = self.telemetry.mean_seconds() or 1.0
        return max(1, min(60, math.ceil(mean * waiting / self.limits.max_rows)))

    # --- the engine's thread -----------------------------------------------------------------------

    def _work(self) -> None:
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
                self.failures += 1
                for job in list(self._jobs):
                    self._end(job, Failed(as_serve_error(error)))

    def _round(self) -> None:
        """One forward for every row in work."""
        for job in list(self._jobs):
            if self._stopping:
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

        One that does not fit into memory now is waited for, so that small ones cannot keep it out.
        """
        while True:
            with_more = [job for job in self._jobs if job.units]
            running = [unit for job in self._jobs for unit in job.running]
            if not with_more or len(running) >= self.limits.max_rows:
                return
            job = min(with_more, key=lambda job: len(job.running))
            unit = job.units[0]
            held = unit.held_bytes + sum(one.held_bytes for one in running)
            step = max(unit.step_bytes, max((one.step_bytes for one in running), default=0))
            if running and held + step > self.workspace:
                return
            job.units.popleft()
            job.running.append(unit)
            if job.started is None:
                job.started = time.monotonic()
                job.usage.queue_s = job.started - job.arrived

    def _groups(self, units: Sequence[tuple[Job, FillUnit]]) -> list[list[tuple[Job, FillUnit]]]:
        """Rows that go into one forward: of like length, within the memory and the tokens allowed."""
        held = sum(unit.held_bytes for job in self._jobs for unit in job.running)
        groups: list[list[tuple[Job, FillUnit]]] = []
        for job, unit in sorted(units, key=lambda pair: -pair[1].length):
            last = groups[-1] if groups else None
            if last is not None and self._fits([one for _, one in last] + [unit], held):
                last.append((job, unit))
            else:
                groups.append([(job, unit)])
        return groups

    def _fits(self, units: Sequence[FillUnit], held: int) -> bool:
        longest = max(unit.length for unit in units)
        rows = sum(unit.rows for unit in units)
        used = sum(unit.rows * unit.length for unit in units)
        if rows * longest > self.limits.batch_tokens or used < (1 - MAX_PADDING) * rows * longest:
            return False
        largest = max(units, key=lambda unit: unit.choice_bytes)
        needed = self.footprint.step_bytes(
            rows,
            longest,
            sum(unit.logits for unit in units),
            largest.outputs,
            largest.filling.canvas.settings,
            padded=any(unit.length < longest for unit in units),
        )
        return held + needed <= self.workspace

    def _fill(self, group: Sequence[tuple[Job, FillUnit]]) -> None:
        """One forward for these rows. If it fails, each is tried alone, and fails alone."""
        group = [(job, unit) for job, unit in group if not job.ended]
        if not group:
            return
        canvases = {number: unit.filling.canvas for number, (_, unit) in enumerate(group)}
        before = [unit.filling.canvas.nfe for _, unit in group]
        self.meter.reset()
        began = time.monotonic()
        try:
            commits = take_step(self.denoiser, canvases)
        except Exception as error:  # noqa: BLE001  the edge: it fails this row's request only
            self._recover(error)
            if len(group) > 1:
                for pair in group:
                    self._fill([pair])
            else:
                self._fail(group[0][0], error)
            return
        seconds, reading = time.monotonic() - began, self.meter.read()
        self.failures = 0
        self.telemetry.forward("denoise", len(group), seconds, reading)
        for job in {id(job): job for job, _ in group}.values():
            job.usage.note_pass(seconds, len(group), reading)
        decided = {commit.row: commit for commit in commits}
        for number, (job, unit) in enumerate(group):
            canvas, commit = unit.filling.canvas, decided[number]
            forwards = canvas.nfe - before[number]
            job.usage.note("denoise", forwards, forwards * unit.length)
            self.telemetry.count_forwards(job.model, "denoise", forwards, forwards * unit.length)
            self._tell(
                job,
                Committed(
                    unit.row,
                    unit.forward,
                    job.age,
                    tuple(place - unit.start for place in commit.positions_k.tolist()),
                    tuple(commit.tokens_k.tolist()),
                    tuple(commit.confidence_k.tolist()),
                ),
            )
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
        try:
            if unit.iterator is None:
                unit.iterator = unit.advance(job)
            next(unit.iterator)
        except StopIteration:
            self._finish(job, unit)
            return
        except Exception as error:  # noqa: BLE001  the edge: it fails this request only
            self._recover(error)
            self._fail(job, error)
            return
        self.failures = 0
        seconds, reading = time.monotonic() - began, self.meter.read()
        job.usage.note_pass(seconds, 1, reading)
        self.telemetry.forward(job.kind, 1, seconds, reading)

    # --- ends --------------------------------------------------------------------------------------

    def _finish(self, job: Job, unit: Unit) -> None:
        job.running.remove(unit)
        if not job.running and not job.units:
            job.usage.total_s = job.age
            self._end(job, JobDone(job.usage))

    def _fail(self, job: Job, error: Exception) -> None:
        answer = as_serve_error(error)
        if answer.status >= 500:
            self.failures += 1
            log.error("request %s failed", job.id, exc_info=error)
        self._end(job, Failed(answer))

    def _recover(self, error: Exception) -> None:
        """Give memory back before anything is tried again."""
        if is_out_of_memory(error) and self.denoiser.device.type == "cuda":
            torch.cuda.empty_cache()

    def _end(self, job: Job, event: Event) -> None:
        """Forget the job: its places are free for the next round."""
        job.ended = True
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
