"""The tests' side of a check: names of the program as stubs, and how it ended in one line.

Runs inside the sandbox (process T of sandbox_child.py): standard library only. Whatever comes over
the line was made by the program. Nothing here compares or computes with it except the tests.
"""

from __future__ import annotations

import _ast
import builtins
import contextlib
import os
import signal
import sys
import time
from importlib import import_module
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import sandbox_wire as wire
else:
    import sandbox_wire as wire

FILE_OF_TESTS = "<tests>"
FROM_OUTSIDE = {"__name__", "__doc__", "__dict__", "__qualname__"}  # of a stub: its program's
EXIT_WAIT_S = 0.2

# --- stubs ---------------------------------------------------------------------------------------


class Watch:
    """The last comparison of a stub: the likely cause when an assertion fails."""

    compared: str | None = None


class Stub:
    """An object that stayed in the program's process: calls, attributes and items go there.

    Comparison and hash stay here and mean identity, and there is no arithmetic: a program cannot
    make an object that equals, or is near to, whatever the tests expect.
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
        return self._ask("call", *args, **kwargs)

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
        return _exactly(bool, self._ask("truth"))

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

    1. what the program imports under that name from the standard library: the real thing;
    2. a builtin, so that a program cannot bring its own `abs` or `len` to the tests;
    3. a name of the program.

    A program can be asked for a function called `sum`: if the tests use no other name of the
    program, its names go before the builtins.
    """

    def __init__(self, line: wire.Line, program: str, theirs: set[str], used: set[str]) -> None:
        super().__init__(__name__="tests")
        self.line, self.theirs = line, theirs
        self.imported = imported_names(program)
        language = set(vars(builtins))
        self.builtins_first = bool((used & theirs) - language)
        # Plain data is looked up anew each time, for the program may change it; the rest stays.
        # (A class body of the tests, unlike everything else, sees only what stays.)
        for name in sorted(used & (theirs | set(self.imported))):
            with contextlib.suppress(KeyError):
                value = self[name]
                if callable(value) or isinstance(value, (Stub, ModuleType)):
                    self[name] = value

    def __missing__(self, name: str) -> Any:
        if name in self.imported:
            try:
                return self.imported[name].fetch()
            except (ImportError, AttributeError):
                pass
        if name not in self.theirs or (self.builtins_first and hasattr(builtins, name)):
            raise KeyError(name)
        return self.line.ask("name", None, name)


class Imported:
    """One `import module` or `from module import attribute` of the program."""

    def __init__(self, module: str, attribute: str | None = None) -> None:
        self.module, self.attribute = module, attribute

    def fetch(self) -> Any:
        module = import_module(self.module)
        return module if self.attribute is None else getattr(module, self.attribute)


def imported_names(program: str) -> dict[str, Imported]:
    """Names bound by imports of the standard library at module level, unless defined again later."""
    found: dict[str, Imported] = {}
    tree: Any = compile(program, "<program>", "exec", _ast.PyCF_ONLY_AST, dont_inherit=True)
    for node in tree.body:
        if isinstance(node, _ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                if first in sys.stdlib_module_names:
                    found[alias.asname or first] = Imported(alias.name if alias.asname else first)
        elif isinstance(node, _ast.ImportFrom):
            module = node.module or ""
            if node.level == 0 and module.partition(".")[0] in sys.stdlib_module_names:
                for alias in node.names:
                    found[alias.asname or alias.name] = Imported(module, alias.name)
        elif isinstance(node, (_ast.FunctionDef, _ast.AsyncFunctionDef, _ast.ClassDef)):
            found.pop(node.name, None)
        elif isinstance(node, _ast.Assign):
            for target in node.targets:
                if isinstance(target, _ast.Name):
                    found.pop(target.id, None)
    return found


def used_names(code: CodeType) -> set[str]:
    """Every global name and attribute in some code, with the functions in it."""
    inner = [used_names(part) for part in code.co_consts if isinstance(part, CodeType)]
    return set(code.co_names).union(*inner)


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
        names = Names(line, program, theirs, used_names(code))
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
    if isinstance(error, AssertionError) and Watch.compared:
        return f"returned a value that is not plain data ({Watch.compared})"
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
