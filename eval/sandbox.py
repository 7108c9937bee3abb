"""Runs generated programs against their tests, where they can neither do harm nor forge the verdict.

Each check gets three processes of its own (sandbox_child.py): the tests do not run in the process
of the program, so a program that rewrites `assert`, prints "passed" or walks frames finds nothing.
What keeps it from the rest of the machine depends on what the machine can do, from weak to strong:

    process      own session, limits on time, memory, files; no privileges. Not against malice:
                 the program may read and write whatever its user may, use the network, send signals
    landlock     and no files but libraries and one temporary folder, no programs run, no TCP,
                 no signals and abstract sockets. Open: UDP, chmod, the names of the host's files
    namespaces   own users, processes, network, IPC, and a file tree with the libraries alone
    full         landlock inside namespaces

Never contained: errors of the kernel; several processes that each use the memory limit; load on
the machine within the limits. Without namespaces the kernel does not bound the number of processes
of the superuser. Linux only.

What a verdict says: the tests ran through in their own interpreter, with the builtins and their own
names as they are, and what they had of the program was plain data, copied. Programs have the
standard library; site-packages are not there. Objects of the program are stubs to the tests
(sandbox_trial.py): arithmetic, `==` between them and asking whether one is true fail.

What it does not say: that the program computed anything. It sees the arguments of each call, may
remember them, and may answer differently each time. Names that tests use but do not define are the
program's, except builtins and a short list of the standard library: tests that check one function
with another of the program (`abs(poly(xs, find_zero(xs))) < 1e-4`), or with a name that they take
for an import (`isclose(f(1), 2)`, with an `isclose` of the program's own), trust the program.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from mdm.config import require
from mdm.errors import SandboxError, check_known

LEVELS = ("process", "landlock", "namespaces", "full")
DEFAULT_LEVEL = "landlock"  # the least to accept; whatever more this machine has is used
CHILD = Path(__file__).resolve().with_name("sandbox_child.py")
START_S = 10.0  # to start and to end, on top of the time of the program; on a busy machine
ATTEMPTS = 3  # the kernel can be short of namespaces for a moment


# --- what is asked, what comes back --------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What one program may use. Memory is for each of its processes."""

    seconds: float = 10.0  # wall time for program and tests together
    memory_mib: int = 1024
    file_mib: int = 16  # largest file written
    processes: int = 32
    output_kib: int = 64  # stdout and stderr that tests can see; the rest is thrown away

    def __post_init__(self) -> None:
        require(
            0 < self.seconds <= 3600, f"seconds must be above 0, at most 3600; got {self.seconds}"
        )
        require(self.memory_mib >= 64, f"memory_mib must be at least 64; got {self.memory_mib}")
        require(self.file_mib >= 1, f"file_mib must be at least 1; got {self.file_mib}")
        require(self.processes >= 1, f"processes must be at least 1; got {self.processes}")
        require(self.output_kib >= 0, f"output_kib must not be negative; got {self.output_kib}")


@dataclass(frozen=True)
class Check:
    """One program and the tests it should pass."""

    program: str  # untrusted
    tests: str  # code that uses names the program defines; trusted


@dataclass(frozen=True)
class Verdict:
    passed: bool
    reason: str  # "passed", or what went wrong, in one line
    seconds: float  # wall time with start and end


# --- running -------------------------------------------------------------------------------------


def run_checks(
    checks: Sequence[Check],
    limits: Limits = Limits(),
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Verdict]:
    """The verdicts, in the order of the checks; `workers` (default: one a core) run at a time.

    `progress(done)` is called after each. An interrupt or an error ends all that is running.
    Raises SandboxError if the sandbox itself fails: that is no verdict on a program.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    require(workers >= 1, f"workers must be at least 1; got {workers}")
    return _run_all(checks, limits, reached_level(), workers, progress)


def _run_all(
    checks: Sequence[Check],
    limits: Limits,
    level: str,
    workers: int,
    progress: Callable[[int], None] | None = None,
) -> list[Verdict]:
    verdicts = []
    with _Hosts() as hosts, ThreadPoolExecutor(workers) as pool:
        try:
            futures = [pool.submit(_run_one, check, limits, level, hosts) for check in checks]
            for future in futures:
                verdicts.append(future.result())
                if progress is not None:
                    progress(len(verdicts))
        finally:  # also after an interrupt; the pool then waits for threads that wait for nothing
            pool.shutdown(wait=False, cancel_futures=True)
            hosts.end()
    return verdicts


def _run_one(check: Check, limits: Limits, level: str, hosts: _Hosts) -> Verdict:
    for attempt in range(ATTEMPTS):
        try:
            with hosts.borrow() as host:
                return host.run(check, limits, level)
        except SandboxError:
            if attempt == ATTEMPTS - 1 or hosts.ended:
                raise
            time.sleep(0.1 * 4**attempt)
    raise AssertionError("unreachable")


class _Hosts:
    """The interpreters that checks are forked from; after `end` there are none, and no new one."""

    def __init__(self) -> None:
        self.ended = False
        self._lock = threading.Lock()
        self._all: list[_Host] = []
        self._idle: list[_Host] = []

    def __enter__(self) -> _Hosts:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()
        for host in self._all:
            host.close()

    @contextlib.contextmanager
    def borrow(self) -> Iterator[_Host]:
        with self._lock:
            if self.ended:
                raise SandboxError("the checks were stopped")
            if not self._idle:
                self._idle.append(_Host())
                self._all.append(self._idle[-1])
            host = self._idle.pop()
        yield host
        with self._lock:  # not reached after an error: then it is not used again
            if not host.ended:
                self._idle.append(host)

    def end(self) -> None:
        with self._lock:
            self.ended = True
        for host in self._all:
            host.end()


class _Host:
    """One interpreter (Z of sandbox_child.py) and the line to it; one check at a time."""

    def __init__(self) -> None:
        self.ended = False
        self.unread = b""
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self.line, theirs = socket.socketpair()
        # -P -s are -I without -E: of the environment we need the hash seed, and give little else.
        command = [sys.executable, "-P", "-s", "-S", "-B", str(CHILD), str(os.getpid())]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self.errors,
                cwd="/",
                # Sets have the same order in every run, so verdicts can be repeated.
                env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "PATH": os.defpath},
                start_new_session=True,
            )
        except OSError as error:
            self.close()
            raise SandboxError(f"cannot start {sys.executable}: {error}") from error
        finally:
            theirs.close()

    def run(self, check: Check, limits: Limits, level: str) -> Verdict:
        """Raises SandboxError if the sandbox failed, which says nothing about the program."""
        nonce = secrets.token_hex(16)
        started = time.monotonic()
        with _folder() as folder:
            setup = {
                **asdict(limits),
                "folder": folder,
                "namespaces": level in ("namespaces", "full"),
                "landlock": level in ("landlock", "full"),
            }
            lines = self._talk(setup, {"nonce": nonce, **asdict(check)}, limits.seconds)
        seconds = time.monotonic() - started
        for line in lines:
            if line.startswith("setup "):
                raise SandboxError(f"the {level} sandbox could not start: {line[6:]}")
            if line.startswith(nonce):
                passed, reason = json.loads(line.removeprefix(nonce))
                return Verdict(passed is True, str(reason), seconds)
        if "ready" not in lines:
            raise SandboxError(f"the {level} sandbox did not start: {self._last_words()}")
        if seconds >= limits.seconds:
            return Verdict(False, f"timed out after {limits.seconds:g} s", seconds)
        return Verdict(False, "the process of the tests ended without a verdict", seconds)

    def _talk(self, setup: object, payload: object, seconds: float) -> list[str]:
        """What came back, up to "done"; without that there is no more to be had of this host."""
        lines: list[str] = []
        try:
            self._send(setup, START_S)
            lines.append(self._read_line(START_S))
            if lines == ["ready"]:
                self._send(payload, START_S)
                lines.append(self._read_line(seconds + START_S))
            while lines[-1] != "done":
                lines.append(self._read_line(START_S))
        except OSError:  # TimeoutError, or its end
            self.end()
        return lines

    def _send(self, message: object, seconds: float) -> None:
        data = json.dumps(message).encode("ascii")  # surrogates, which UTF-8 refuses, arrive too
        self.line.settimeout(seconds)
        self.line.sendall(len(data).to_bytes(8, "big") + data)

    def _read_line(self, seconds: float) -> str:
        end = time.monotonic() + seconds
        while b"\n" not in self.unread:
            self.line.settimeout(max(end - time.monotonic(), 0.001))
            part = self.line.recv(2**16)
            if not part:
                raise ConnectionError("the sandbox ended")
            self.unread += part
        line, _, self.unread = self.unread.partition(b"\n")
        return line.decode("utf-8", "replace")

    def _last_words(self) -> str:
        self.end()
        self.errors.seek(0)
        lines = self.errors.read().decode("utf-8", "replace").splitlines()
        return lines[-1] if lines else f"exit status {self.process.returncode}"

    def end(self) -> None:
        """Have it end what it started, and wait for that. Any thread may call this, at any time."""
        self.ended = True
        self.process.terminate()
        try:
            self.process.wait(START_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        self.line.close()
        self.errors.close()


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """A temporary folder that is gone afterwards, whatever a program made in it."""
    folder = tempfile.mkdtemp(prefix="mdm-sandbox-")
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder)
        except (OSError, RecursionError):  # no rights in it, or deeper than Python's stack
            for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
                subprocess.run([*command, "--", folder], check=False, capture_output=True)


# --- what this machine can do --------------------------------------------------------------------

PROBE = """
import os, socket
def attempt(action, *args):
    try:
        action(*args)
    except OSError:
        return "denied"
    return "done"
def read(path):
    return attempt(lambda: open(path).read())
def write(path):
    return attempt(lambda: open(path, "w").write("x"))
def connect(port):
    return attempt(lambda: socket.create_connection(("127.0.0.1", port), timeout=1))
def signal(process):
    return attempt(os.kill, process, 0)
"""


@functools.cache
def reached_level() -> str:
    """The strongest level at which a probe is really denied what it should be denied here."""
    return next((level for level in reversed(LEVELS) if not problem_at(level)), "none")


@functools.cache
def problem_at(level: str) -> str | None:
    """Why this machine does not reach a level; None if it does."""
    check_known("sandbox level", level, LEVELS)
    with tempfile.TemporaryDirectory(prefix="mdm-probe-") as folder, socket.socket() as listener:
        secret = Path(folder) / "secret"
        secret.write_text("secret", encoding="utf-8")
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port, us = listener.getsockname()[1], os.getpid()
        tests = f"""
assert (seen := read({str(secret)!r})) == "denied", "a file of the host was read"
assert (seen := write({str(secret)!r})) == "denied", "a file of the host was written"
assert (seen := connect({port})) == "denied", "a TCP connection was made"
assert (seen := signal({us})) == "denied", "a signal was sent"
"""
        if level == "process":
            tests = "assert attempt(len, '') == 'done'"
        try:
            (verdict,) = _run_all([Check(PROBE, tests)], Limits(), level, workers=1)
        except SandboxError as error:
            return str(error)
    return None if verdict.passed else verdict.reason


def require_level(minimum: str) -> None:
    """Raise SandboxError unless this machine reaches `minimum`: programs then do not run at all."""
    check_known("sandbox level", minimum, LEVELS)
    reached = reached_level()
    if reached == "none":
        raise SandboxError(f"no sandbox starts on this machine: {problem_at('process')}")
    if LEVELS.index(reached) < LEVELS.index(minimum):
        raise SandboxError(
            f"this machine reaches the sandbox level {reached!r}, {minimum!r} is asked:"
            f" {problem_at(minimum)}; to run the programs all the same, lower the level with"
            f" `--sandbox-level {reached}`"
        )


def describe(limits: Limits = Limits()) -> dict[str, object]:
    """For records: what the verdicts were made with."""
    return {
        "level": reached_level(),
        "python": platform.python_version(),
        "limits": asdict(limits),
    }
