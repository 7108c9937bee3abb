"""The wheel: what is in it, and that it works where there is no checkout.

Slow, because it builds. Nothing is downloaded: setuptools and wheel come from the environment.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("train", "eval", "serve", "benchmarks")  # top-level folders that become mdm.<name>


def run(command, **kwargs):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def files_git_knows():
    """Tracked files, and new ones that git does not ignore: what the next commit could hold."""
    listing = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT)
    return sorted(path for path in listing.split("\0") if path and (ROOT / path).is_file())


def in_wheel(path):
    """Where a file of the checkout lies in the wheel: `train/data.py` -> mdm/train/data.py."""
    return path if path.startswith("mdm/") else f"mdm/{path}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # From a copy: building leaves build/ and *.egg-info behind, and reads stale ones.
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in files_git_knows():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, source / path)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    run([*pip, "--wheel-dir", str(out), str(source)])
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    run([*pip, "--target", str(target), str(wheel)])
    return target


def run_installed(installed, cwd, code):
    """Output of `code` in a fresh interpreter that sees the installed copy, not the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return run([sys.executable, "-c", code], cwd=cwd, env=environment).split()


def test_top_level_is_mdm_and_its_metadata(names):
    top = {PurePosixPath(name).parts[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"mdm"}
    assert len(top) == 2


def test_wheel_holds_the_packages_and_nothing_else(names):
    expected = {
        in_wheel(path)
        for path in files_git_knows()
        if PurePosixPath(path).parts[0] in ("mdm", *MAPPED)
        and (PurePosixPath(path).suffix in (".py", ".yaml") or path.startswith("serve/web/"))
    }
    assert {name for name in names if name.startswith("mdm/")} == expected


def test_wheel_carries_the_licence(names):
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]


def test_wheel_installs_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "mdm = mdm.cli:main" in archive.read(entry_points).decode()


def test_every_module_imports_away_from_the_checkout(installed, names, tmp_path):
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in names
        if name.startswith("mdm/") and name.endswith(".py")
    )
    code = f"import importlib\nfor name in {modules}: print(importlib.import_module(name).__file__)"
    imported = run_installed(installed, tmp_path, code)
    assert len(imported) == len(modules)
    assert [file for file in imported if not file.startswith(str(installed))] == []


def test_path_guard_does_nothing_when_installed(installed, tmp_path):
    # With a pyproject.toml beside it too, as in an installation into somebody's project folder.
    (installed / "pyproject.toml").touch()
    code = "import mdm; print(len(mdm.__path__), mdm.__file__)"
    assert run_installed(installed, tmp_path, code) == ["1", str(installed / "mdm/__init__.py")]


def test_users_own_train_file_hides_nothing(installed, tmp_path):
    (tmp_path / "train.py").write_text("raise SystemExit('the wrong train')")
    code = "import mdm.train; print(mdm.train.__file__)"
    assert run_installed(installed, tmp_path, code) == [str(installed / "mdm/train/__init__.py")]
