"""The tests' side of a check: names of the program as stubs, and how it ended in one line.

Runs inside the sandbox (process T of sandbox_child.py): standard library only. Whatever comes over
the line was made by the program. Nothing here compares or computes with it except the tests, and
nothing is imported here because the program says so: it can only have the tests see, under its own
name, what LIBRARY lists.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import os
import signal
import sys
import time
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import sandbox_wire as wire
else:
    import sandbox_wire as wire

FILE_OF_TESTS = "<tests>"
# Modules that tests use when only the program imports them; loaded before there is a program.
LIBRARY = frozenset(
    {"bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools"}
    | {"heapq", "itertools", "math", "operator", "random", "re", "statistics", "string", "sys"}
    | {"typing"}
)
SAFE_OF_SYS = frozenset({"getsizeof", "maxsize"})
FROM_OUTSIDE = {"__name__", "__doc__", "__dict__", "__qualname__"}  # of a stub: its program's
EXIT_WAIT_S = 0.2

# --- stubs ---------------------------------------------------------------------------------------


NOT_PLAIN = "returned a value that is not plain data ({})"


class NoTruth(TypeError):
    """The tests ask whether a stub is true."""


class Watch:
    """The last comparison of a stub: the likely cause when an assertion fails."""

    compared: str | None = None


class Stub:
    """An object that stayed in the program's process: calls, attributes and items go there.

    Comparison and hash stay here and mean identity; there is no arithmetic and no truth value: a
    program cannot make an object that equals, or is near to, whatever the tests expect, or that is
    true to one test and false to the next.
    """

    __slots__ = ("_ask", "_kind")

    def __init__(self, ask: Any, kind: str) -> None:
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_kind", kind)

    def __eq__(self, other: object) -> bool:
        Watch.compared = object.__getattribute__(self, "_kind")
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._ask("call", *args, **kwargs)
        except StopIteration:  # would end a map() over the cases before the first comparison
            raise RuntimeError("the program raised StopIteration") from None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") and name not in FROM_OUTSIDE:
            raise AttributeError(name)
        return self._ask("get attribute", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set attribute", name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("get item", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("set item", key, value)

    def __len__(self) -> int:
        return _exactly(int, self._ask("length"))

    def __bool__(self) -> bool:
        raise NoTruth(NOT_PLAIN.format(object.__getattribute__(self, "_kind")))

    def __str__(self) -> str:
        return _exactly(str, self._ask("text"))

    def __repr__(self) -> str:
        return _exactly(str, self._ask("representation"))

    def __iter__(self) -> Any:
        return self._ask("iterate")

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, Stub) and _exactly(bool, self._ask("is instance", value))


class IteratorStub(Stub):
    """A generator of the program, pulled one item at a time; it may be endless."""

    __slots__ = ()

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return self._ask("next")


def _exactly(kind: Any, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {kind.__name__} was expected of the program")
    return value


def make_stub(line: wire.Line, number: int, form: str, name: str, bases: list[str]) -> object:
    """What stands for object `number` of the program; a class of exceptions is one here, too."""
    if form == "exception":
        return line.twins.kind([str(base) for base in bases])

    def ask(what: str, /, *args: Any, **kwargs: Any) -> Any:
        return line.ask(what, number, *args, **kwargs)

    return (IteratorStub if form == "iterator" else Stub)(ask, str(name))


# --- names ---------------------------------------------------------------------------------------


class Names(dict[str, Any]):
    """The tests' globals. A name they do not define is looked up, in this order, as

    1. a builtin, so that a program cannot bring its own `abs` or `len` to the tests;
    2. the real thing of the standard library, if the program binds the name and `real_things`
       says that it means that to the tests;
    3. a name of the program: plain data by copy, a stub for the rest.

    A program can be asked for a function called `sum`: if that is the only name in the tests that
    they do not define, and the program defines it at its top level, theirs is what is meant.
    """

    def __init__(self, line: wire.Line, program: str, theirs: set[str], tests: ast.Module) -> None:
        super().__init__(__name__="tests")
        self.line = line
        self.theirs = {name for name in theirs if not name.startswith("__")}
        bound = bound_by(ast.parse(program))
        uses, asked = uses_of_names(tests), ""
        if len(uses) == 1 and isinstance(bound.get(name := next(iter(uses))), Defined):
            asked = name
        self.builtins = set(vars(builtins)) - {asked}
        self.real = real_things(bound, uses, self.theirs - self.builtins)
        # Plain data is looked up anew each time, for the program may change it; the rest stays.
        # (A class body of the tests, unlike everything else, sees only what stays.)
        for name in sorted(uses.keys() & self.theirs):
            with contextlib.suppress(KeyError):
                value = self[name]
                if callable(value) or isinstance(value, (Stub, ModuleType)):
                    self[name] = value

    def __missing__(self, name: str) -> Any:
        if name in self.builtins or name not in self.theirs:
            raise KeyError(name)
        return self.real[name] if name in self.real else self.line.ask("name", None, name)


class Defined:
    """Of a name: bound at the top level of the program by a definition or an assignment."""


@dataclass(frozen=True)
class Imported:
    """Of a name: bound by an import; `of`, if it is unaliased `from of import name`."""

    of: str = ""


def bound_by(program: ast.Module) -> dict[str, Defined | Imported]:
    """How the top level of a program binds its names; the last time counts."""
    found: dict[str, Defined | Imported] = {}
    for node in program.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.partition(".")[0]] = Imported()
        elif isinstance(node, ast.ImportFrom):
            of = node.module if node.module and not node.level else ""
            for alias in node.names:
                if alias.name == "*":
                    found.update(dict.fromkeys(public_names(of), Imported(of)))
                else:
                    found[alias.asname or alias.name] = Imported("" if alias.asname else of)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[node.name] = Defined()
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for part in ast.walk(node):
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    found[part.id] = Defined()
    return found


def uses_of_names(tests: ast.Module) -> dict[str, set[str]]:
    """The names in tests that they do not bind, each with its attributes there; "" is no attribute."""
    uses: dict[str, set[str]] = {}
    own: set[str] = set()
    attribute_of = {
        id(node.value): node.attr for node in ast.walk(tests) if isinstance(node, ast.Attribute)
    }
    for node in ast.walk(tests):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            uses.setdefault(node.id, set()).add(attribute_of.get(id(node), ""))
        elif isinstance(node, ast.Name):
            own.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.arg):
            own.add(node.arg)
        elif isinstance(node, ast.alias):
            own.add(node.asname or node.name.partition(".")[0])
    return {name: attributes for name, attributes in uses.items() if name not in own}


def real_things(
    bound: dict[str, Defined | Imported], uses: dict[str, set[str]], theirs: set[str]
) -> dict[str, Any]:
    """What names of the program are to the tests from the standard library, however it got them.

    `from math import isclose`: the real one, if the tests also use a name that the program does
    not import: what they are about is never an import. `math`, however bound: the real module, if
    the tests use nothing but attributes which that has. Aliases are names like any other.
    """
    found = {}
    used = uses.keys() & theirs
    asked_for_more = any(not isinstance(bound.get(name), Imported) for name in used - LIBRARY)
    for name in used:
        how = bound.get(name)
        if isinstance(how, Imported) and name in public_names(how.of):
            if asked_for_more:
                found[name] = getattr(sys.modules[how.of], name)
        elif name in LIBRARY:
            known = SAFE_OF_SYS if name == "sys" else set(dir(sys.modules[name]))
            if uses[name] <= known:
                found[name] = sys.modules[name]
    return found


def public_names(module: str) -> set[str]:
    """What `from module import` can give the tests."""
    if module not in LIBRARY - {"operator", "sys"}:
        return set()
    space = vars(sys.modules[module])
    names = space.get("__all__") or [name for name in space if not name.startswith("_")]
    return {name for name in names if not isinstance(space.get(name), ModuleType)}


# --- the trial -----------------------------------------------------------------------------------


def call_test_function(what: str, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """What the program may ask of the tests: to call a function that they handed over."""
    if what != "call":
        raise ValueError(f"a program cannot ask for {what!r}")
    return function(*args, **kwargs)


def run(line: wire.Line, process: int, program: str, tests: str) -> tuple[bool, str]:
    """(passed, reason) of one check. Once the line is broken, nothing the tests catch can mend it."""
    reason = _run(line, program, tests)
    if line.gone == wire.ENDED:
        return False, wire.ENDED + _exit_of(process)
    reason = line.gone or reason
    return (True, "passed") if reason is None else (False, reason)


def _run(line: wire.Line, program: str, tests: str) -> str | None:
    try:
        theirs = {str(name) for name in line.ask("run", None, program)}
        code = compile(tests, FILE_OF_TESTS, "exec", dont_inherit=True)
        names = Names(line, program, theirs, ast.parse(tests))
    except BaseException as error:  # noqa: BLE001 - the reason is told, nothing goes on
        return _describe(error, "program: ")
    try:
        exec(code, names)  # noqa: S102 - the tests, which are trusted
    except BaseException as error:  # noqa: BLE001 - the reason is told, nothing goes on
        return _describe(error, "", tests)
    return None


def _describe(error: BaseException, prefix: str, tests: str = "") -> str:
    if isinstance(error, wire.Gone):
        return str(error)
    if isinstance(error, SystemExit):
        return wire.ENDED
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, NoTruth):
        return str(error)
    if isinstance(error, AssertionError) and Watch.compared:
        return NOT_PLAIN.format(Watch.compared)
    text = str(error)
    if not text and tests:
        text = _failing_line(error, tests)
    name = type(error).__name__
    return f"{prefix}{name}: {text}" if text else f"{prefix}{name}"


def _failing_line(error: BaseException, tests: str) -> str:
    """The last line of the tests that an exception passed through."""
    lines, found, trace = tests.splitlines(), "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == FILE_OF_TESTS and trace.tb_lineno <= len(lines):
            found = lines[trace.tb_lineno - 1].strip()
        trace = trace.tb_next
    return found


def _exit_of(process: int) -> str:
    """How the program's process ended, if a signal ended it: " (SIGSEGV)"."""
    end = time.monotonic() + EXIT_WAIT_S
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            signalled = os.WIFSIGNALED(status)
            return f" ({signal.Signals(os.WTERMSIG(status)).name})" if signalled else ""
        time.sleep(0.01)
    return ""
