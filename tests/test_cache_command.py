"""`mdm data cache-targets`: interrupted, gone on with, shared out; always the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple

import pytest
import tiny_run
from click.testing import CliRunner

from mdm.errors import CheckpointError, ConfigError, TrainingError
from mdm.train import cache_targets as made
from mdm.train.data_command import data
from mdm.train.rows import Rows
from mdm.train.target_cache import TargetCache, read_manifest


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The file of a tiny recipe."""
    place = tmp_path_factory.mktemp("recipe")
    ar, corpus = tiny_run.ar_folder(place / "ar"), tiny_run.corpus_folder(place / "corpus")
    return tiny_run.write_recipe(place / "tiny.yaml", tiny_run.recipe(ar, corpus))


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The folder of an uninterrupted cache."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    run(recipe, folder)
    return folder


def run(recipe, folder, *more):
    arguments = ["cache-targets", "--recipe", str(recipe), "--output", str(folder), *more]
    return CliRunner().invoke(data, arguments, catch_exceptions=False, standalone_mode=False)


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("targets-*.npy")}


def assert_same(folder, whole):
    assert shards(folder) == shards(whole)
    assert read_manifest(folder).identity == read_manifest(whole).identity
    names = {path.name for path in folder.iterdir()}
    assert names == {"cache.json", "data", *shards(whole)}


def test_the_summary(recipe, tmp_path):
    text = run(
        recipe, tmp_path / "cache", "--set", "data.max_tokens=480", "--batch-rows", "3"
    ).output
    size = sum(map(len, shards(tmp_path / "cache").values()))
    assert "targets   21 rows of 24, 488 tokens, 465 maskable, in 3 shards" in text
    assert f"disk      {size} bytes: {size / 488:.1f} a token, {size / 465:.1f} a maskable" in text
    assert size == 21 * 24 * 388 + 3 * 128  # all places in rows, and the headers of three files
    assert "(488 tokens asked for now)" in text
    assert f"--set target.cache={tmp_path / 'cache'}" in text
    again = run(recipe, tmp_path / "cache", "--set", "data.max_tokens=480").output
    assert "nothing was missing" in again
    assert read_manifest(tmp_path / "cache").made_by == [
        "--recipe", str(recipe), "--set", "data.max_tokens=480", "--batch-rows", "3"
    ]  # fmt: skip


def test_a_cache_on_the_way_does_not_matter(recipe, whole, tmp_path):
    """The same recipe trains on the answers and makes them."""
    run(recipe, tmp_path / "cache", "--set", f"target.cache={tmp_path / 'cache'}")
    assert_same(tmp_path / "cache", whole)


class Stopped(Exception):
    """What a test stops the work with."""


@pytest.mark.parametrize("asks", [0, 1, 4])
def test_interrupted_and_gone_on_with(recipe, whole, tmp_path, monkeypatch, asks):
    """At the first row, and in the middle of shards: the bytes are those of an uninterrupted cache."""
    folder, answers, seen = tmp_path / "cache", made._Work._answers, []

    def stop(work, rows, shape):
        if len(seen) == asks:
            raise Stopped
        seen.append(rows)
        return answers(work, rows, shape)

    with monkeypatch.context() as patch:
        patch.setattr(made._Work, "_answers", stop)
        with pytest.raises(Stopped):
            run(recipe, folder)
    assert not list(folder.glob(".*"))
    assert len(shards(folder)) == asks  # of eight rows, as many as are asked for at once
    run(recipe, folder)
    assert_same(folder, whole)


def test_half_written_drafts_and_damaged_shards(recipe, whole, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    dead = 2**22 + 1  # no process has this number
    (folder / f".targets-00001.npy.{dead}.draft").write_bytes(b"half")
    (folder / f".cache.json.{dead}.draft").write_bytes(b"half")
    living = folder / f".targets-00003.npy.{os.getpid()}.draft"
    living.write_bytes(b"of a process at work")
    (folder / "targets-00001.npy").unlink()
    (folder / "targets-00002.npy").write_bytes((whole / "targets-00002.npy").read_bytes()[:1000])
    text = run(recipe, folder).output
    rows = Rows(whole / "data" / "train").batch(range(8, 24))
    assert f"({int((rows.document_ids_BL >= 0).sum())} tokens asked for now)" in text
    assert living.exists()
    living.unlink()
    assert_same(folder, whole)


def test_overwrite_replaces_ours_alone(recipe, whole, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    (folder / "note.txt").write_text("mine")
    other = ("--set", "objective.kd_temperature=2")
    with pytest.raises(
        ConfigError, match=r"kd_temperature 1\.0, now 2\.0; give another --output, or"
    ):
        run(recipe, folder, *other)
    assert shards(folder) == shards(whole)
    (folder / "note.txt").rename(tmp_path / "note.txt")
    run(recipe, folder, *other, "--overwrite")
    assert shards(folder).keys() == shards(whole).keys()
    assert shards(folder) != shards(whole)
    assert read_manifest(folder).identity["objective.kd_temperature"] == 2


def test_a_changed_corpus_is_refused(recipe, whole, tmp_path):
    """The settings are the same, so it is seen when the data has been made; the answers are kept."""
    folder, added = tmp_path / "cache", recipe.parent / "corpus" / "new.py"
    shutil.copytree(whole, folder)
    try:
        added.write_text("def added(a, b, c):\n    return a * b * c\n" * 3)
        with pytest.raises(
            ConfigError, match=r"made with the files of data\.sources .*--overwrite"
        ):
            run(recipe, folder)
    finally:
        added.unlink()
    assert "nothing was missing" in run(recipe, folder).output
    assert_same(folder, whole)


def test_foreign_folders_are_left_alone(recipe, whole, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(
        ConfigError, match=r"full holds other things \(thesis\.txt\); give an empty"
    ):
        run(recipe, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    (tmp_path / "lost").mkdir()
    shutil.copy(whole / "targets-00000.npy", tmp_path / "lost")
    with pytest.raises(ConfigError, match=r"holds targets without cache\.json"):
        run(recipe, tmp_path / "lost")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot make the folder"):
        run(recipe, tmp_path / "file")


def test_a_disk_that_is_too_small_or_full(recipe, whole, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
        with pytest.raises(
            CheckpointError, match=r"need 0\.0 GiB, but .* free; lower target\.top_k"
        ):
            run(recipe, tmp_path / "small")
    with monkeypatch.context() as patch:
        append, calls = made.GrowingArray.append, []

        def full(array, values):
            calls.append(values)
            if values.shape[-1] == 388 and len(calls) > 2:
                raise OSError(28, "No space left on device")
            append(array, values)

        patch.setattr(made.GrowingArray, "append", full)
        with pytest.raises(
            CheckpointError, match=r"cannot write .*No space left.*free space and run"
        ):
            run(recipe, tmp_path / "full")
    run(recipe, tmp_path / "full")
    assert_same(tmp_path / "full", whole)


def test_a_shard_counts_only_when_it_is_whole(recipe, whole, tmp_path, monkeypatch):
    """Its name comes last, in one move."""
    folder, replace = tmp_path / "cache", os.replace

    def fail(source, target):
        if str(target).endswith("targets-00001.npy"):
            raise OSError(5, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(CheckpointError, match=r"cannot write .*targets-00001\.npy"):
            run(recipe, folder)
    assert shards(folder).keys() == {"targets-00000.npy"}
    run(recipe, folder)
    assert_same(folder, whole)


def in_a_process(recipe, folder, patch, *launch):
    """`mdm data cache-targets` in a process of its own, in which `patch` makes something happen."""
    code = "import os, signal\nfrom mdm.train import cache_targets as made\n"
    code += textwrap.dedent(patch) + "\nfrom mdm.cli import main\nmain()\n"
    arguments = ["data", "cache-targets", "--recipe", str(recipe), "--output", str(folder)]
    return subprocess.run(
        [sys.executable, *launch, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=tiny_run.environment(),
    )


AT_THE_THIRD_ASK = """
answers, seen = made._Work._answers, []
def stop(work, rows, shape):
    seen.append(rows)
    if len(seen) == 3:
        os.kill(os.getpid(), signal.{name})
    return answers(work, rows, shape)
made._Work._answers = stop
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_batch(recipe, whole, tmp_path, monkeypatch, number):
    folder, answers, seen = tmp_path / "cache", made._Work._answers, []

    def stop(work, rows, shape):
        seen.append(rows)
        if len(seen) == 3:
            os.kill(os.getpid(), number)
        return answers(work, rows, shape)

    with monkeypatch.context() as patch:
        patch.setattr(made._Work, "_answers", stop)
        with pytest.raises(TrainingError) as caught:
            run(recipe, folder)
    assert str(caught.value) == (
        f"stopped by a signal at shard 3 of {len(shards(whole))}; go on with `mdm data cache-targets"
        f" --recipe {recipe} --output {folder}`"
    )
    assert len(seen) == 3
    assert len(shards(folder)) == 2
    assert not list(folder.glob(".*"))
    run(recipe, folder)
    assert_same(folder, whole)


@pytest.mark.slow
def test_killed_and_gone_on_with(recipe, whole, tmp_path):
    folder = tmp_path / "cache"
    done = in_a_process(recipe, folder, AT_THE_THIRD_ASK.format(name="SIGKILL"))
    assert done.returncode == -signal.SIGKILL
    assert len(list(folder.glob(".targets-00002.npy.*.draft"))) == 1
    done = in_a_process(recipe, folder, AT_THE_THIRD_ASK.format(name="SIGINT"))
    assert done.returncode == TrainingError.exit_code, done.stderr
    assert (
        done.stderr.strip().splitlines()[-1].startswith("mdm: stopped by a signal at shard 5 of ")
    )
    assert len(shards(folder)) == 4
    run(recipe, folder)
    assert_same(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--set", "train.sharding=full"]], ids=["whole", "sharded"])
def test_two_processes_make_the_same(recipe, whole, tmp_path, more):
    """Also with an odd number of shards, some of them there already."""
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    for number in (0, 4, 5, 7, 9):
        (folder / f"targets-{number:05d}.npy").unlink()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mdm.cli"]
    arguments = ["data", "cache-targets", "--recipe", str(recipe), "--output", str(folder), *more]
    done = subprocess.run(
        [sys.executable, *launch, *arguments],
        capture_output=True,
        text=True,
        env=tiny_run.environment(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train on  --set target.cache=") == 1
    assert_same(folder, whole)


def test_processes_share_the_work(monkeypatch, whole):
    """Every shard once; the busiest process is waited for."""
    cache = TargetCache(whole, read_manifest(whole))
    monkeypatch.setattr(made.processes, "world_size", lambda: 3)
    missing = [0, 2, 3, 9, cache.num_shards - 1]
    shares = [made._share(missing, rank) for rank in range(3)]
    assert sorted(shard for share in shares for shard in share) == missing
    assert made._asks(cache, missing, 3) == 6  # two shards of eight rows
    assert made._asks(cache, [], 3) == 0


def test_asking_along_asks_as_often_as_the_others(recipe, tmp_path, monkeypatch):
    asked, ask = [], made.bind

    def bind(*arguments):
        answer = ask(*arguments)
        return lambda *question: (asked.append(question), answer(*question))[1]

    monkeypatch.setattr(made, "bind", bind)
    monkeypatch.setattr(made, "_asks", lambda *_: 50)
    run(recipe, tmp_path / "cache", "--set", "train.sharding=full")
    assert len(asked) == 50
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["format"] == 1
