"""The rules of the layout: who imports whom, what never appears, what is listed where.

Each rule is a function (source text, path) -> problems, "file:line: what is wrong". It runs over
the tree, and over planted violations too, so that no check can go blind unnoticed. Paths are
POSIX and relative to the repository.
"""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Bottom to top: a file imports only files above it in this list. The command files come last;
# mdm/cli.py reaches the commands of other packages by dotted strings, which are no imports.
ROOMS = (
    "errors",
    "config",
    "record",
    "vocab",
    "token_bytes",
    "grid",
    "attention",
    "schedule",
    "diffusion",
    "buffers",
    "int8",
    "denoiser",
    "causal",
    "cache",
    "loading",
    "families",
    "published",
    "checkpoint",
    "new_tokens",
    "convert",
    "remasking",
    "rules",
    "canvas",
    "proposals",
    "approximate",
    "llada",
    "sampler",
    "estimators",
    "scoring",
    "order",
    "blocks",
    "likelihood",
    "generate",
    "autoregressive",
    "acceleration",
    "fim",
    "view",
    "runs",
    "commands",
    "score_command",
    "cli",
)
MAPPED = ("train", "eval", "serve", "benchmarks")  # top-level folders that are mdm.<name>
PACKAGES = ("mdm", *MAPPED)
MAY_IMPORT = {
    "mdm": {"mdm"},
    "train": {"train", "mdm"},
    "eval": {"eval", "mdm"},
    "serve": {"serve", "mdm"},
    "benchmarks": {"benchmarks", "train", "eval", "serve", "mdm"},
}
NEVER_IN_MDM = {"lm_eval", "fastapi", "uvicorn", "datasets", "matplotlib"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec"}
# The inside of the sandbox is there to run what it reads: the program, and the tests beside it.
MAY_EXEC = ("eval/sandbox_child.py", "eval/sandbox_trial.py")
UNSAFE_ATTRIBUTES = {("torch", "save"), ("torch", "load")}
UNSAFE_FLAGS = {"trust_remote_code", "allow_pickle"}
NOT_AN_ID: set[int] = set()  # round numbers that no one can take for a token id
# Written as pieces: this file is searched as well.
MACHINE_SPECIFIC = re.compile(
    r"(?<![\w.])/(?:work|root|home|Users)/[\w.]"
    + r"|/opt/(?:wheels|pypi)|\bpypi"
    + r"\.org|pythonhosted"
    + r"\.org|npmjs"
    + r"\.(?:org|com)"
)

Rule = Callable[[str, str], list[str]]


# --- reading the tree ----------------------------------------------------------------------------


def package_files() -> list[str]:
    """Every Python file of the packages."""
    files = (file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


def files_of_tests() -> list[str]:
    return sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "tests").rglob("*.py"))


def text_files() -> Iterator[tuple[str, str]]:
    """(path, text) of the files git knows or would add; binary files are passed over."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for path in filter(None, listing.stdout.split("\0")):
        try:
            yield path, (ROOT / path).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue


def problems_in(rule: Rule, paths: list[str]) -> list[str]:
    return [problem for path in paths for problem in rule((ROOT / path).read_text("utf-8"), path)]


def check(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


# --- imports as facts ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """One imported name: the `target` in full (`mdm.grid.BlockGrid`), and how it was written."""

    line: int
    target: str
    relative: bool
    bound: str  # the name the importing file gets
    in_function: bool


def module_of(path: str) -> str:
    """Where a file's relative imports start: `train/teachers/exact.py` -> mdm.train.teachers."""
    folders = PurePosixPath(path).parent.parts
    return ".".join(folders if folders[:1] == ("mdm",) else ("mdm", *folders))


def imports(source: str, path: str) -> list[Import]:
    found: list[Import] = []
    package = module_of(path).split(".")

    def visit(node: ast.AST, in_function: bool) -> None:
        if isinstance(node, ast.Import):
            for name in node.names:
                bound = name.asname or name.name.partition(".")[0]
                found.append(Import(node.lineno, name.name, False, bound, in_function))
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = [*above, *(node.module or "").split(".")]
            for name in node.names:
                target = ".".join(filter(None, [*base, name.name]))
                bound = name.asname or name.name
                found.append(Import(node.lineno, target, node.level > 0, bound, in_function))
        inside = in_function or isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        )
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source, path), False)
    return found


def package_of(target: str) -> str | None:
    """The top-level folder that owns an imported name; None for other people's modules."""
    first, _, rest = target.partition(".")
    if first != "mdm":
        return None
    second = rest.partition(".")[0]
    return second if second in MAPPED else "mdm"


# --- rules about imports -------------------------------------------------------------------------


def wrong_direction(source: str, path: str) -> list[str]:
    """benchmarks -> train | eval | serve -> mdm; the three never import one another."""
    here = PurePosixPath(path).parts[0]
    return [
        f"{path}:{found.line}: {here}/ may not import {found.target}"
        for found in imports(source, path)
        if (owner := package_of(found.target)) and owner not in MAY_IMPORT[here]
    ]


def wrong_room(source: str, path: str) -> list[str]:
    """Inside mdm/ a file imports only files above it in ROOMS."""
    parts = PurePosixPath(path).parts
    room = PurePosixPath(path).stem
    if parts[0] != "mdm" or room == "__init__":
        return []
    if len(parts) > 2 or room not in ROOMS:
        return [f"{path}:1: not in ROOMS of tests/test_structure.py; add it where it belongs"]
    problems = []
    for found in imports(source, path):
        if package_of(found.target) != "mdm" or found.target == "mdm":
            continue
        other = found.target.split(".")[1]
        if other not in ROOMS[: ROOMS.index(room)]:
            problems.append(
                f"{path}:{found.line}: {room} may not import {other}, which is not above it"
            )
    return problems


def wrong_form(source: str, path: str) -> list[str]:
    """Relative inside a package, absolute across packages."""
    here = PurePosixPath(path).parts[0]
    problems = []
    for found in imports(source, path):
        owner = package_of(found.target)
        if owner == here and not found.relative:
            problems.append(f"{path}:{found.line}: import {found.target} relatively")
        if owner != here and found.relative:
            problems.append(f"{path}:{found.line}: import {found.target} absolutely")
    return problems


def bare_or_hiding(source: str, path: str) -> list[str]:
    """No `import train` (makes a second copy), no `from mdm import eval` (hides a builtin)."""
    problems = []
    for found in imports(source, path):
        parts = found.target.split(".")
        if not found.relative and parts[0] in MAPPED:
            problems.append(
                f"{path}:{found.line}: write mdm.{found.target}; {found.target} is a second copy"
            )
        if parts[0] == "mdm" and len(parts) == 2 and found.bound in MAPPED:
            problems.append(
                f"{path}:{found.line}: import from mdm.{parts[1]}, not the package itself"
            )
        if parts[:2] in (["mdm", "mdm"], ["mdm", "tests"]):
            problems.append(f"{path}:{found.line}: {found.target} exists only in a checkout")
    return problems


def heavy_libraries(source: str, path: str) -> list[str]:
    """Web, harness, data-set and plot libraries: never in mdm/, in train/ only in functions."""
    here = PurePosixPath(path).parts[0]
    if here not in ("mdm", "train"):
        return []
    return [
        f"{path}:{found.line}: {found.target} may not be imported here"
        for found in imports(source, path)
        if found.target.partition(".")[0] in NEVER_IN_MDM
        and not (here == "train" and found.in_function)
    ]


# --- other rules ---------------------------------------------------------------------------------


def more_than_docstring(source: str, path: str) -> list[str]:
    """Package `__init__` files hold a docstring only; mdm/__init__.py also sets `__path__`."""
    if PurePosixPath(path).name != "__init__.py":
        return []
    body = ast.parse(source, path).body
    if ast.get_docstring(ast.parse(source, path)) is None:
        return [f"{path}:1: needs a docstring and nothing else"]
    allowed = (ast.Import, ast.Assign, ast.If) if path == "mdm/__init__.py" else ()
    return [
        f"{path}:{node.lineno}: only a docstring belongs here"
        for node in body[1:]
        if not isinstance(node, allowed)
        or (isinstance(node, ast.Import) and node.names[0].name != "os")
    ]


def runs_what_it_reads(source: str, path: str) -> list[str]:
    """No pickle in any form, no eval or exec, no remote code switched on."""
    problems = [
        f"{path}:{found.line}: {found.target} runs what it reads; use safetensors or JSON"
        for found in imports(source, path)
        if found.target.partition(".")[0] in UNSAFE_MODULES
        or tuple(found.target.split(".")) in UNSAFE_ATTRIBUTES
    ]
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in UNSAFE_ATTRIBUTES:
                problems.append(f"{path}:{node.lineno}: {node.value.id}.{node.attr} is pickle")
        elif isinstance(node, ast.Name) and node.id in UNSAFE_CALLS:
            if node.id == "exec" and path in MAY_EXEC:
                continue
            problems.append(f"{path}:{node.lineno}: {node.id} runs what it reads")
        elif isinstance(node, ast.keyword) and node.arg in UNSAFE_FLAGS and is_true(node.value):
            problems.append(f"{path}:{node.value.lineno}: {node.arg}=True is for the user to say")
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value in UNSAFE_FLAGS and is_true(value):
                    problems.append(
                        f"{path}:{value.lineno}: {key.value}=True is for the user to say"
                    )
    return problems


def is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def magic_ids(source: str, path: str) -> list[str]:
    """Whole numbers of five or six digits are token ids in disguise; mdm/vocab.py knows ids."""
    return [
        f"{path}:{node.lineno}: {node.value} looks like a token id; if not, add it to NOT_AN_ID"
        for node in ast.walk(ast.parse(source, path))
        if isinstance(node, ast.Constant)
        and type(node.value) is int
        and 10_000 <= node.value <= 999_999
        and node.value not in NOT_AN_ID
    ]


def machine_specific(source: str, path: str) -> list[str]:
    """No path of somebody's machine, no registry host."""
    return [
        f"{path}:{number}: {match[0]!r} is true on one machine only"
        for number, line in enumerate(source.splitlines(), start=1)
        if (match := MACHINE_SPECIFIC.search(line))
    ]


# --- the rules over the tree ---------------------------------------------------------------------

PACKAGE_RULES = (
    wrong_direction,
    wrong_room,
    wrong_form,
    bare_or_hiding,
    heavy_libraries,
    more_than_docstring,
    runs_what_it_reads,
    magic_ids,
)


@pytest.mark.parametrize("rule", PACKAGE_RULES, ids=lambda rule: rule.__name__)
def test_packages_keep(rule):
    check(problems_in(rule, package_files()))


def test_tests_import_only_the_mapped_names():
    check(problems_in(bare_or_hiding, files_of_tests()))


def test_no_file_is_true_on_one_machine_only():
    check([problem for path, text in text_files() for problem in machine_specific(text, path)])


def test_the_checks_see_the_packages():
    assert {"mdm/config.py", "train/__init__.py", "benchmarks/__init__.py"} <= set(package_files())


# --- the rules over planted violations -----------------------------------------------------------

REGISTRY = "py" + "pi.org"
VIOLATIONS = [
    (wrong_direction, "mdm/sampler.py", "def f():\n    from mdm.train.losses import kl"),
    (wrong_direction, "mdm/sampler.py", "from .train import losses"),
    (wrong_direction, "train/data.py", "import mdm.eval.metrics"),
    (wrong_direction, "eval/run.py", "from mdm import serve"),
    (wrong_direction, "serve/app.py", "from mdm.benchmarks.report import table"),
    (wrong_direction, "train/teachers/exact.py", "from ...eval import metrics"),
    (wrong_room, "mdm/errors.py", "from .config import build"),
    (wrong_room, "mdm/grid.py", "from . import sampler"),
    (wrong_room, "mdm/grid.py", "if True:\n    import mdm.sampler"),
    (wrong_room, "mdm/grid.py", "from .grid import BlockGrid"),
    (wrong_room, "mdm/utils.py", ""),
    (wrong_room, "mdm/deep/grid.py", ""),
    (wrong_form, "mdm/sampler.py", "from mdm.grid import BlockGrid"),
    (wrong_form, "train/trainer.py", "from ..sampler import denoise"),
    (wrong_form, "train/trainer.py", "from mdm.train.losses import reduce"),
    (bare_or_hiding, "train/trainer.py", "import train.losses"),
    (bare_or_hiding, "tests/test_x.py", "from eval.metrics import pass_at_k"),
    (bare_or_hiding, "tests/test_x.py", "from mdm import eval"),
    (bare_or_hiding, "tests/test_x.py", "import mdm.eval as eval"),
    (bare_or_hiding, "tests/test_x.py", "import mdm.tests.tiny"),
    (heavy_libraries, "mdm/record.py", "def f():\n    import matplotlib.pyplot as plt"),
    (heavy_libraries, "train/data.py", "import datasets"),
    (heavy_libraries, "train/data.py", "try:\n    from datasets import load_dataset\nfinally: ..."),
    (more_than_docstring, "train/__init__.py", '"""Doc."""\nfrom .trainer import train'),
    (more_than_docstring, "train/__init__.py", ""),
    (more_than_docstring, "mdm/__init__.py", '"""Doc."""\nimport torch'),
    (more_than_docstring, "mdm/__init__.py", '"""Doc."""\nfrom .grid import BlockGrid'),
    (runs_what_it_reads, "mdm/checkpoint.py", "import pickle"),
    (runs_what_it_reads, "mdm/checkpoint.py", "from torch import load"),
    (runs_what_it_reads, "mdm/checkpoint.py", "x = torch.save(y, path)"),
    (runs_what_it_reads, "mdm/checkpoint.py", "f(trust_remote_code=True)"),
    (runs_what_it_reads, "mdm/checkpoint.py", "f(**{'trust_remote_code': True})"),
    (runs_what_it_reads, "train/data.py", "numpy.load(path, allow_pickle=True)"),
    (runs_what_it_reads, "train/data.py", "eval('1')"),
    (runs_what_it_reads, "train/data.py", "exec('1')"),
    (magic_ids, "mdm/sampler.py", "mask_id = 126336"),
    (magic_ids, "mdm/sampler.py", "f(0xC355)"),
    (magic_ids, "mdm/sampler.py", "f(-50_257)"),
    (machine_specific, "README.md", "\ncd /" + "work/main"),
    (machine_specific, "Makefile", "cp '/" + "root/x' ."),
    (machine_specific, "constraints.txt", f"--index-url https://{REGISTRY}/simple"),
]


@pytest.mark.parametrize(("rule", "path", "source"), VIOLATIONS)
def test_rule_sees_a_planted_violation(rule, path, source):
    problems = rule(source, path)
    assert len(problems) == 1
    assert re.match(rf"{re.escape(path)}:[12]: \S", problems[0])


ALLOWED = [
    (
        wrong_direction,
        "benchmarks/run.py",
        "from mdm.train.trainer import step\nimport mdm.eval.run",
    ),
    (
        wrong_direction,
        "train/data.py",
        "import torch\nfrom mdm.vocab import Vocab\nfrom . import x",
    ),
    (
        wrong_room,
        "mdm/convert.py",
        "import mdm\nfrom .checkpoint import save\nfrom . import config",
    ),
    (wrong_room, "train/anything.py", "from mdm.sampler import denoise"),
    (
        wrong_form,
        "train/teachers/exact.py",
        "from ..targets import SoftTargets\nfrom .base import x",
    ),
    (wrong_form, "train/trainer.py", "from mdm.sampler import denoise"),
    (
        bare_or_hiding,
        "mdm/cli.py",
        "import evaluate, trainable\nCOMMANDS = {'train': 'mdm.train.run'}",
    ),
    (bare_or_hiding, "train/trainer.py", "import mdm.sampler\nfrom .eval import x"),
    (heavy_libraries, "train/data.py", "def f():\n    from datasets import load_dataset"),
    (heavy_libraries, "eval/harness.py", "import lm_eval"),
    (more_than_docstring, "train/__init__.py", '"""Doc."""'),
    (more_than_docstring, "train/data.py", "import torch"),
    (runs_what_it_reads, "mdm/checkpoint.py", "model.eval()\nf(trust_remote_code=allowed)"),
    (magic_ids, "mdm/sampler.py", "seeds = [9_999, 1_000_000, True, 12345.0, '12345']"),
    (machine_specific, "README.md", "https://example.org/work/x and ../shared/work/x"),
]


@pytest.mark.parametrize(("rule", "path", "source"), ALLOWED)
def test_rule_lets_the_right_way_pass(rule, path, source):
    assert rule(source, path) == []


# --- lists that must be complete -----------------------------------------------------------------


def listed_packages() -> set[str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    return set(settings["tool"]["setuptools"]["packages"])


def test_every_package_folder_is_listed_in_pyproject():
    assert {module_of(path) for path in package_files()} - listed_packages() == set()


def test_every_listed_package_is_a_folder():
    folders = {name: name.removeprefix("mdm.").replace(".", "/") for name in listed_packages()}
    assert [name for name, folder in folders.items() if not (ROOT / folder).is_dir()] == []


def test_tests_are_flat():
    # A tests/train/__init__.py would be what `import train` finds, a tests/mdm/ hides mdm.
    assert [path for path in files_of_tests() if path.count("/") > 1 or "__init__" in path] == []


# --- the command starts light --------------------------------------------------------------------

HELP_THEN_LIST_MODULES = """
import runpy, sys
sys.argv = ["mdm", "--help"]
try:
    runpy.run_module("mdm.cli", run_name="not_main")["main"]()
except SystemExit as stop:
    assert not stop.code, stop.code
print("LOADED", *sys.modules)
"""


def test_help_imports_neither_torch_nor_transformers():
    run = subprocess.run(
        [sys.executable, "-c", HELP_THEN_LIST_MODULES],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    help_text, _, loaded = run.stdout.partition("LOADED")
    assert "Usage" in help_text
    assert {"torch", "transformers"} & set(loaded.split()) == set()
