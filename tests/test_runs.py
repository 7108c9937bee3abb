"""The model that commands take when none is named."""

import os

import pytest

from mdm.errors import CheckpointError
from mdm.runs import last_finished


def finish(runs, name, *, at, folder="final", file="mdm.json"):
    path = runs / name / folder / file
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    os.utime(path, (at, at))


def test_the_run_that_finished_last(tmp_path):
    finish(tmp_path, "b", at=200)
    finish(tmp_path, "a", at=300)
    finish(tmp_path, "c", at=100)
    # Neither checkpoints of a run under way, nor drafts, nor foreign folders count.
    finish(tmp_path, "d", at=400, folder="step-000010")
    finish(tmp_path, "e", at=400, folder=".final.123.draft")
    finish(tmp_path, "f", at=400, file="config.json")
    assert last_finished(tmp_path) == tmp_path / "a" / "final"


def test_the_default_is_the_folder_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finish(tmp_path / "runs", "x", at=1)
    assert last_finished().resolve() == tmp_path / "runs" / "x" / "final"


def test_no_finished_run_says_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match=r"no finished run in .* `mdm train`.* --model"):
        last_finished(tmp_path / "none")
