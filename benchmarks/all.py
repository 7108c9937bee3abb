"""Every benchmark, one after the other: `mdm bench all`.

Each is a process of its own with a limit on its time, so that one that fails, hangs or eats the memory
leaves the others alone; what it prints goes to a log. Numbers must not disturb each other, hence one at
a time. A smoke run takes tiny models (smoke.py) and settings, to see that everything runs and that every
record has what its table needs; its numbers mean nothing, so it keeps away from the real records.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from mdm.config import require
from mdm.errors import ConfigError, check_known
from mdm.record import append_record, make_record, to_json
from mdm.runs import last_finished

from . import doc_tables, smoke
from .catalogue import CATALOGUE, Benchmark, Record, seconds_in

RESULTS = Path("benchmarks/results")
OWN = "bench-all"  # folder in runs/, and the record's file
KIND = "bench all"
MINUTES = {False: 12 * 60.0, True: 10.0}  # that a benchmark may take, by `smoke`
END_S = 30.0  # from Ctrl-C or the limit to the end: what a benchmark may take to end its servers
LAST_LINES = 12


@dataclasses.dataclass(frozen=True)
class AllBench:
    """What is run; see `mdm bench all --help`. `only` empty = all; None = as the help says."""

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    smoke: bool = False
    model: str | None = None
    teacher: str | None = None
    minutes: float | None = None
    results: str | None = None
    runs: str = "runs"

    def __post_init__(self) -> None:
        for name in (*self.only, *self.skip):
            check_known("benchmark", name, CATALOGUE)
        require(bool(self.chosen), "--only and --skip leave nothing to run")
        require(self.limit_s > 0, f"--minutes must be above 0; got {self.minutes}")
        if self.smoke and self.results and Path(self.results).resolve() == RESULTS.resolve():
            raise ConfigError(
                f"--results {self.results} holds real records, and a smoke run's numbers mean nothing;"
                " choose another folder"
            )

    @property
    def chosen(self) -> list[str]:
        """What is run, in the order of the catalogue."""
        return [
            name for name in CATALOGUE if name in (self.only or CATALOGUE) and name not in self.skip
        ]

    @property
    def folder(self) -> Path:
        """Logs, runs that training benchmarks go on with, and the records of a smoke run."""
        return Path(self.runs) / (f"{OWN}-smoke" if self.smoke else OWN)

    @property
    def records(self) -> Path:
        """The folder of records."""
        return Path(self.results) if self.results else self.folder if self.smoke else RESULTS

    @property
    def limit_s(self) -> float:
        return 60 * (MINUTES[self.smoke] if self.minutes is None else self.minutes)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a benchmark went; `problem` is None if it has a new record that can be shown as a table."""

    name: str
    seconds: float
    problem: str | None
    last_lines: str = ""


def run(settings: AllBench, say: Callable[[str], None]) -> tuple[Record, list[Outcome]]:
    """Run what is chosen, one after the other, and append a record of how it went.

    Raises CheckpointError before anything is run if a benchmark needs a student and there is none.
    """
    outcomes: list[Outcome] = []
    with _places(settings) as places, _signals_interrupt():
        try:
            for number, name in enumerate(settings.chosen, start=1):
                say(f"{number}/{len(settings.chosen)} {name} ({_before(settings, name)}) …")
                outcomes.append(one(settings, name, places))
                say(f"    {outcomes[-1].problem or 'ok'}, {duration(outcomes[-1].seconds)}")
        except KeyboardInterrupt:
            say(f"stopped; done: {', '.join(own.name for own in outcomes) or 'nothing'}")
            raise
    results = {
        "benchmarks": [
            {"name": own.name, "seconds": own.seconds, "problem": own.problem} for own in outcomes
        ]
    }
    record = make_record(KIND, results, settings=dataclasses.asdict(settings), seed=None)
    append_record(settings.records / "all.jsonl", record)
    return record, outcomes


def one(settings: AllBench, name: str, places: Mapping[str, str]) -> Outcome:
    """Run one benchmark in a process of its own; its log is NAME.log in the folder."""
    benchmark = CATALOGUE[name]
    runs = settings.folder / name
    log = settings.folder / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments = benchmark.arguments({**places, "runs": str(runs)}, smoke=settings.smoke)
    before = len(benchmark.records(settings.records))
    began = time.monotonic()
    status = finished([sys.executable, "-m", "mdm.cli", "bench", *arguments], log, settings.limit_s)
    seconds = time.monotonic() - began
    problem = _problem(settings, name, status, before)
    if problem is None and runs.is_dir():
        # Training benchmarks go on where they were stopped; the next time should be a new measurement.
        shutil.rmtree(runs)
    text = log.read_text(encoding="utf-8", errors="replace") if problem else ""
    return Outcome(name, seconds, problem, "\n".join(text.splitlines()[-LAST_LINES:]))


def finished(command: list[str], log: Path, limit_s: float) -> int | None:
    """The exit status of a process, None if it had to be ended; nothing of it is left either way."""
    with open(log, "wb") as file:
        # A session of its own: Ctrl-C in the terminal reaches it through us alone, and once.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does, so that a benchmark ends its own servers; by force if that takes too long."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _problem(settings: AllBench, name: str, status: int | None, before: int) -> str | None:
    if status is None:
        return f"ended after {settings.limit_s / 60:g} minutes (--minutes)"
    if status:
        return f"exit status {status}"
    if len(CATALOGUE[name].records(settings.records)) <= before:
        return f"no new record in {settings.records / CATALOGUE[name].file}"
    try:
        doc_tables.table(name, settings.records)
    except ConfigError as error:
        return str(error)
    return None


@contextlib.contextmanager
def _places(settings: AllBench) -> Iterator[dict[str, str]]:
    """Where arguments find what they name; the small things of a smoke run are deleted afterwards."""
    own = {"results": str(settings.records)}
    if settings.teacher is not None:
        own["teacher"] = settings.teacher
    if settings.model is not None:
        own["student"] = settings.model
    if settings.smoke:
        with tempfile.TemporaryDirectory(prefix="mdm-smoke-") as folder:
            yield {**smoke.make(Path(folder)), **own}
        return
    asked = any(CATALOGUE[name].needs("student", smoke=False) for name in settings.chosen)
    if asked and settings.model is None:
        own["student"] = str(last_finished(settings.runs))
    yield {"teacher": "embedded", **own}


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """A terminal that closes, or `kill`, ends us as Ctrl-C does: with the benchmark that runs."""
    old = {
        number: signal.signal(number, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# --- for people ------------------------------------------------------------------------------------


def describe(record: Record, outcomes: list[Outcome]) -> str:
    """A table of what ran, the last lines of what failed and, last, the record as one JSON line."""
    lines = ["| benchmark | time | |", "|---|--:|---|"]
    lines += [
        f"| {own.name} | {duration(own.seconds)} | {own.problem or 'ok'} |" for own in outcomes
    ]
    for own in outcomes:
        if own.problem:
            lines += ["", f"{own.name}: {own.problem}; its last lines:", own.last_lines]
    return "\n".join([*lines, to_json(record)])


def listed(settings: AllBench) -> str:
    """What would be run, what it needs, and how long it took last time."""
    lines = ["| benchmark | | needs | last time |", "|---|---|---|---|"]
    for name in settings.chosen:
        benchmark = CATALOGUE[name]
        needs = [
            option
            for place, option in (("student", "--model"), ("teacher", "--teacher"))
            if benchmark.needs(place, smoke=settings.smoke)
        ]
        lines.append(
            f"| {name} | {benchmark.about} | {', '.join(needs)} | {_before(settings, name)} |"
        )
    return "\n".join(lines)


def _before(settings: AllBench, name: str) -> str:
    """How long it took: by the newest run of all that was well; else what its record tells."""
    for record in reversed(_own_records(settings)):
        for line in record["results"]["benchmarks"]:
            if line["name"] == name and line["problem"] is None:
                return f"{duration(line['seconds'])}, {str(record['time'])[:10]}"
    records = CATALOGUE[name].records(settings.records)
    told = seconds_in(records[-1]["results"]) if records else 0.0
    if not told:
        return "not known"
    return f"more than {duration(told)}, {str(records[-1]['time'])[:10]}"


def _own_records(settings: AllBench) -> list[Record]:
    own = Benchmark("", "", "", file="all.jsonl", kind=KIND, markdown=str)
    return own.records(settings.records)


def duration(seconds: float) -> str:
    """34 s, 12 min, 2.5 h."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"
