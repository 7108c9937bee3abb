"""The inside of the sandbox. Three processes a check: a program can never reach its own verdict.

    Z  started by the parent, once for many checks: starting Python is what takes longest
    └─ S  makes the namespaces, waits, leaves no process behind
       └─ T  runs the tests; forks C before it reads them, and the nonce, from the parent's line
          └─ C  runs the program, with nothing but two pipes to T

T sends C the program's text alone, and runs the tests itself. A name of the program is a stub
there: calling it sends plain data to C and gets plain data back (sandbox_wire.py). So the program
sees arguments, never an assertion, and its answers are compared by the tests' own interpreter.

Run as a file with -S: the standard library is there, site-packages are not.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from . import sandbox_jail as jail
    from . import sandbox_trial as trial
    from . import sandbox_wire as wire
else:  # a file that is run has no package
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import sandbox_jail as jail
    import sandbox_trial as trial
    import sandbox_wire as wire

    del sys.path[0]

# What tests may get and most programs import is imported once, before there is a program.
for _name in sorted(trial.LIBRARY):
    import_module(_name)

PROGRAM = "program"  # the module that the program's code is
REASON_CHARACTERS = 300
FRAMES_OF_OURS = 8
WORK_FILES = 4  # the folder of a program holds this many files of the largest size

# --- Z: one warm interpreter, a fork for each check ----------------------------------------------


def wait_for_checks(parent: int) -> NoReturn:
    """Fork S whenever the parent sends a setup; say "done" when nothing of that check is left."""
    jail.prctl(jail.PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    jail.prctl(jail.PR_SET_DUMPABLE, 0)  # nobody of our user may trace us
    checks = os.dup(0)
    gc.freeze()  # what is loaded now is shared by all that follow
    while True:
        data = receive(checks)
        if data is None:
            os._exit(0)
        hold_end_signal()
        supervisor = os.fork()
        if supervisor == 0:
            supervise(json.loads(data), checks)
        asked_to_end = end_with(supervisor, signal.SIGTERM)
        os.waitpid(supervisor, 0)
        hold_end_signal()
        if asked_to_end:
            os._exit(0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        os.write(checks, b"done\n")


def receive(line: int) -> bytes | None:
    """The next message of the parent, of as many bytes as its first eight say; None at the end."""
    with open(line, "rb", buffering=0, closefd=False) as file:
        size = int.from_bytes(file.read(8) or b"", "big")
        data = bytearray()
        while size and len(data) < size:
            part = file.read(size - len(data))
            if not part:
                return None
            data += part
        return bytes(data) or None


def hold_end_signal() -> None:
    """Keep SIGTERM waiting until somebody handles it: between a fork and the handler, and so on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def end_with(child: int, number: int) -> list[int]:
    """From now on, being asked to end means to end the child first; the list then holds a signal."""
    asked: list[int] = []

    def end(received: int, frame: FrameType | None) -> None:
        asked.append(received)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    signal.signal(signal.SIGTERM, end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    return asked


# --- S: start, wait, clean up --------------------------------------------------------------------


def supervise(setup: dict[str, Any], checks: int) -> None:
    """Fork T, in new namespaces, and exit the process when nothing of it is left."""
    try:
        above = os.getppid()
        os.setsid()
        jail.prctl(jail.PR_SET_CHILD_SUBREAPER, 1)  # whatever a program leaves behind becomes ours
        try:
            if setup["namespaces"]:
                jail.prctl(jail.PR_SET_DUMPABLE, 1)  # or our own uid_map would not be ours
                jail.enter_namespaces()
        except OSError as error:
            say_setup(checks, error)
            return
        jail.prctl(jail.PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == above:  # it did not die before the line above
            tests = os.fork()
            if tests == 0:
                become_tests(setup, checks)
            end_with(tests, signal.SIGKILL)
            # The first process of a process namespace is gone only when all others in it are.
            os.waitpid(tests, 0)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if not setup["namespaces"]:
                kill_children()
    finally:
        os._exit(0)


def kill_children() -> None:
    """End every process that descends from us: orphans become our children one by one."""
    while True:
        for child in children():
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def children() -> list[int]:
    us, found = str(os.getpid()), []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                after_name = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        if after_name[1] == us:
            found.append(int(name))
    return found


# --- T: the tests --------------------------------------------------------------------------------


def become_tests(setup: dict[str, Any], checks: int) -> NoReturn:
    """T from its first to its last moment. It never returns into S."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        jail.prctl(jail.PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            process, line = start_program(setup)
        except Exception as error:  # noqa: BLE001 - the parent raises it: it is no verdict
            say_setup(checks, error)
            os._exit(1)
        os.write(checks, b"ready\n")
        payload = json.loads(receive(checks) or b"")
        nonce = payload["nonce"]

        def say(passed: bool, reason: str) -> NoReturn:
            reason = " ".join(reason.split())[:REASON_CHARACTERS]
            os.write(checks, f"{nonce}{json.dumps([passed, reason])}\n".encode())
            os._exit(0)

        def late(number: int, frame: FrameType | None) -> None:
            say(False, f"timed out after {setup['seconds']:g} s")

        signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, setup["seconds"])
        say(*trial.run(line, process, payload["program"], payload["tests"]))
    finally:
        os._exit(1)


def say_setup(checks: int, error: Exception) -> None:
    """Tell the parent that the jail could not be built."""
    os.write(checks, f"setup {type(error).__name__}: {error}\n".encode())


def start_program(setup: dict[str, Any]) -> tuple[int, wire.Line]:
    """Build the jail, fork C into it, and keep its line."""
    work = setup["folder"]
    second_user = setup["namespaces"] and jail.can_be_nobody()
    if setup["namespaces"]:
        work = jail.hide_host(work, WORK_FILES * setup["file_mib"])
    os.chdir(work)
    os.environ.update(HOME=work, TMPDIR=work)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # to a first process: ignored
    memory = setup["memory_mib"] * 2**20
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, setup["file_mib"] * 2**20),
        (resource.RLIMIT_NOFILE, 64),
    ):
        jail.limit(kind, value)
    jail.prctl(jail.PR_SET_DUMPABLE, 0)  # no ptrace, no /proc/self/mem, for C as well

    (asked, ask), (answered, answer) = os.pipe(), os.pipe()
    ready, go = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            close_all_but(asked, answer, go)
            enter_jail(setup, work, second_user)
            os.write(go, b"+")
            os.close(go)
            serve(asked, answer, setup)
        except BaseException as error:  # noqa: BLE001 - T says it; nothing may run on in here
            os.write(go, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    for descriptor in (asked, answer, go):
        os.close(descriptor)
    said = os.read(ready, 1000)
    if said != b"+":
        raise OSError(said.decode() or "the process of the program did not start")
    os.close(ready)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    jail.drop_privileges(second_user=False)
    line = wire.Line(answered, ask, wire.Stubs(callable), trial.call_test_function)
    line.stubs.make_stub = functools.partial(trial.make_stub, line)
    line.printed = pass_on
    return process, line


def pass_on(texts: list[str]) -> None:
    """Print in T what the program printed: tests may have put something else in sys.stdout."""
    for stream, text in zip((sys.stdout, sys.stderr), texts, strict=True):
        if text:
            stream.write(text)


# --- C: the program ------------------------------------------------------------------------------


def close_all_but(*kept: int) -> None:
    """Close every descriptor but these, then make the standard three /dev/null."""
    start = 0
    for descriptor in sorted(kept):
        os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    null = os.open(os.devnull, os.O_RDWR)  # the lowest free number: 0
    assert null == 0
    os.dup2(null, 1)
    os.dup2(null, 2)


def enter_jail(setup: dict[str, Any], work: str, second_user: bool) -> None:
    """Everything that C gives up, for good, before it has read a byte."""
    if setup["namespaces"]:
        others = 0 if second_user else 2  # S and T are of the same user then
    else:
        others = jail.threads_of_user()
    jail.limit(resource.RLIMIT_NPROC, others + setup["processes"])
    jail.limit(resource.RLIMIT_CPU, math.ceil(setup["seconds"]) + 1)
    if setup["landlock"]:
        jail.landlock(jail.libraries(), [work])
    jail.drop_privileges(second_user)


def serve(asked: int, answer: int, setup: dict[str, Any]) -> None:
    """Run the program when T sends it, then do what its tests ask of its objects."""
    sys.argv = [""]
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    room = Room(setup["output_kib"] * 1024)
    sys.stdout, sys.stderr = Printed(room), Printed(room)
    space = ModuleType(PROGRAM)
    sys.modules[PROGRAM] = space  # dataclasses and pickle look a class's module up

    def do(what: str, on: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if what == "run":
            code = compile(args[0], f"<{PROGRAM}>", "exec", dont_inherit=True)
            exec(code, vars(space))  # noqa: S102 - this is what the sandbox is for
            return list(vars(space))
        if what == "name":
            return vars(space)[args[0]]
        return ACTIONS[what](on, *args, **kwargs)

    def make_stub(number: int, form: str, name: str, bases: list[str]) -> object:
        def test_function(*args: Any, **kwargs: Any) -> Any:
            return line.ask("call", number, *args, **kwargs)

        test_function.__name__ = name
        return test_function

    def drain() -> list[str]:
        return [stream.drain() for stream in (out, err)]

    out, err = sys.stdout, sys.stderr
    line = wire.Line(asked, answer, wire.Stubs(lambda value: True), do)
    line.stubs.make_stub = make_stub
    line.drain = drain
    # A program may recurse as deep as it could alone: our own frames do not count.
    sys.setrecursionlimit(sys.getrecursionlimit() + FRAMES_OF_OURS)
    line.listen()


# What the tests can ask of an object of the program.
ACTIONS: dict[str, Callable[..., Any]] = {
    "call": lambda on, /, *args, **kwargs: on(*args, **kwargs),
    "get attribute": getattr,
    "set attribute": setattr,
    "get item": lambda on, key: on[key],
    "set item": lambda on, key, value: on.__setitem__(key, value),
    "length": len,
    "text": str,
    "representation": repr,
    "iterate": iter,
    "next": next,
    "is instance": lambda on, value: isinstance(value, on),
}


class Room:
    """How many characters may still be printed, on both streams together."""

    def __init__(self, left: int) -> None:
        self.left = left


class Printed(io.StringIO):
    """What the program printed since the last answer; beyond the room, nothing is kept."""

    def __init__(self, room: Room) -> None:
        super().__init__()
        self.room = room

    def write(self, text: str) -> int:
        kept = text[: self.room.left]
        self.room.left -= len(kept)
        super().write(kept)
        return len(text)

    def drain(self) -> str:
        text = self.getvalue()
        self.seek(0)
        self.truncate()
        return text


if __name__ == "__main__":
    wait_for_checks(int(sys.argv[1]))
