"""Records: what every number carries with it."""

import datetime
import json
import subprocess

import pytest
import torch

import mdm.record
from mdm.record import append_record, commit, device, make_record, peak_rss_bytes, versions


def test_a_record_says_how_the_number_was_made(tmp_path):
    results = {"accuracy": 0.5, "n": 10, "std_err": 0.16}
    record = make_record("eval", results, settings={"steps": 4}, seed=3, checkpoint="abc")
    assert record["results"] == results
    given = {"kind": "eval", "settings": {"steps": 4}, "seed": 3, "checkpoint": "abc"}
    assert {key: record[key] for key in given} == given
    assert datetime.datetime.fromisoformat(record["time"]).tzinfo is not None
    assert record["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert record["device"]["cores"] >= 1
    assert "commit" in record


def test_records_are_appended_one_a_line(tmp_path):
    path = tmp_path / "new" / "records.jsonl"
    for n in range(2):
        append_record(path, make_record("é\n", {"n": n}, settings={}, seed=None))
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [record["results"]["n"] for record in records] == [0, 1]
    assert records[0]["kind"] == "é\n"


def test_versions_and_device():
    assert {"python", "torch", "transformers"} <= versions().keys()
    assert device()["threads"] == torch.get_num_threads()
    json.dumps([versions(), device()])


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


def test_commit_of_a_checkout_marks_changes(tmp_path, monkeypatch):
    (tmp_path / "mdm").mkdir()
    monkeypatch.setattr(mdm.record, "__file__", str(tmp_path / "mdm" / "record.py"))
    assert commit() is None  # installed: no checkout around it
    git(tmp_path, "init", "-q")
    assert commit() is None  # nothing committed yet
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "x")
    clean = commit()
    assert len(clean) == 12
    (tmp_path / "a").write_text("2")
    assert commit() == f"{clean}+"


def test_commit_without_git(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    (tmp_path / "mdm").mkdir()
    monkeypatch.setattr(mdm.record, "__file__", str(tmp_path / "mdm" / "record.py"))
    monkeypatch.setenv("PATH", "")
    assert commit() is None


def test_peak_memory_is_in_bytes():
    torch_alone = 50 * 2**20
    assert torch_alone < peak_rss_bytes() < 2**45


@pytest.mark.parametrize("missing", mdm.record.LIBRARIES)
def test_a_missing_library_is_left_out(monkeypatch, missing):
    inner = mdm.record.importlib.metadata.version

    def version(name):
        if name == missing:
            raise mdm.record.importlib.metadata.PackageNotFoundError(name)
        return inner(name)

    monkeypatch.setattr(mdm.record.importlib.metadata, "version", version)
    assert missing not in versions()
