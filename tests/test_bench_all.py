"""`mdm bench all` and `mdm bench tables`: all run, none disturbs another, tables are those of the records.

Whole benchmarks with tiny models are slow tests but for two; how they are run, bounded and ended is tried
with processes of a few lines. Counts and fields are checked, never time.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import tiny_run
from click.testing import CliRunner

from mdm.benchmarks import all as everything
from mdm.benchmarks import catalogue, doc_markdown, doc_tables, smoke
from mdm.benchmarks.catalogue import CATALOGUE, Benchmark
from mdm.benchmarks.command import bench
from mdm.errors import CheckpointError, ConfigError

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
NOT_COMPARED = {
    "serve": {"soak"},  # ten minutes, in a record of its own
    "cpu": {"numbers", "compile", "repeats", "texts", "tokens"},  # short; nothing compiled
    # Short, and in 8 bits: a CPU's record, where another would take an hour.
    "latency": {
        *("mode", "modes", "texts", "thresholds", "factors", "quantization", "holes"),
        *("batch_length", "plain_texts"),
    },
    "drift": {"texts", "gen_length"},
    "study-synthetic": {"length"},  # of the study on real code; 0 and so on stand for its own
}


def newest(name):
    """The record whose table is in the docs."""
    records = CATALOGUE[name].records(RESULTS)
    if not records:
        pytest.skip(f"no record of {name} yet")
    return records[-1]


def places(folder):
    """Anything but real folders: for commands that are not run."""
    return {name: f"{folder}/{name}" for name in catalogue.PLACES}


# --- the catalogue -------------------------------------------------------------------------------


def test_every_benchmark_is_in_the_catalogue():
    asked = {shlex.split(own.full)[0] for own in CATALOGUE.values()}
    assert asked == set(bench.commands) - {"all", "tables"}
    for own in CATALOGUE.values():
        assert shlex.split(own.smoke)[0] == shlex.split(own.full)[0]


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize("small", [True, False])
def test_its_command_takes_the_arguments(name, small):
    word, *arguments = CATALOGUE[name].arguments(places("x"), smoke=small)
    command = bench.commands[word]
    with command.make_context(word, [*arguments]) as context:
        assert context.params["path"] == Path("x/results") / CATALOGUE[name].file


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_full_settings_are_those_of_the_record(name):
    """So that `mdm bench all` makes the tables in the docs again, and not others."""
    word, *arguments = CATALOGUE[name].arguments(places("x"), smoke=False)
    recorded = newest(name)["settings"]
    with bench.commands[word].make_context(word, arguments) as context:
        params = context.params
    if "no_checkpointing" in params:
        params["checkpointing"] = not params["no_checkpointing"]
        if params["kind"] == "mdlm":
            params["kind"] = None
    asked = {
        key: listed(value)
        for key, value in params.items()
        if key in recorded and value is not None and key not in NOT_COMPARED.get(name, ())
        if key not in ("model", "teacher", "student", "threads")
    }
    assert len(asked) > 2
    for key, value in asked.items():
        was = listed(recorded[key])
        assert value == was or not (value or was), key  # "", 0, none are the same


def listed(value):
    """A list of names or numbers, however it is kept."""
    if isinstance(value, str) and "," in value:
        return [number(part) for part in value.split(",")]
    return [*value] if isinstance(value, list | tuple) else value


def number(text):
    try:
        return float(text)
    except ValueError:
        return text


def test_records_of_one_file_are_told_apart(tmp_path):
    def line(**settings):
        return json.dumps({"kind": "train_step", "settings": settings, "time": "1"}) + "\n"

    path = tmp_path / "train_step.jsonl"
    path.write_text(
        line(checkpointing=True)
        + line(checkpointing=False)
        + line(checkpointing=True, kind="bd3lm")
        + line(checkpointing=True, rows=9)
    )
    found = {
        name: [record["settings"] for record in CATALOGUE[name].records(tmp_path)]
        for name in ("train-step", "train-step-kept", "train-step-blocks", "serve")
    }
    assert found == {
        "train-step": [{"checkpointing": True}, {"checkpointing": True, "rows": 9}],
        "train-step-kept": [{"checkpointing": False}],
        "train-step-blocks": [{"checkpointing": True, "kind": "bd3lm"}],
        "serve": [],
    }
    path.write_text("{}x\n")
    with pytest.raises(ConfigError, match=r"train_step\.jsonl has a line that is not JSON"):
        CATALOGUE["train-step"].records(tmp_path)


def test_seconds_that_a_record_tells_of():
    results = {
        "sides": [
            {"seconds_all": [1.0, 2.0], "seconds": 1.5},
            {"wall_s": 4.0, "wall_s_all": [4.0]},
        ],
        "runs": {"a": {"seconds": 8.0, "name": "x", "measuring_seconds": 16.0}},
        "soak": None,
    }
    assert catalogue.seconds_in(results) == 31


# --- running them --------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """A catalogue of processes of a few lines, in place of benchmarks and of models."""
    scripts = {
        "good": "record(); print('fine')",
        "fails": "print('one'); print('two'); raise SystemExit(3)",
        "silent": "print('no record')",
        "odd": "record(results={'other': 1})",
        "hangs": "import time; print('here', flush=True); time.sleep(60)",
    }
    start = (
        "import json, os, sys\n"
        "def record(results={'number': 7}, **more):\n"
        "    line = {'kind': 'bench ' + sys.argv[1], 'time': '2026', 'settings': {}, 'results': results}\n"
        "    open(sys.argv[sys.argv.index('--record') + 1], 'a').write(json.dumps(line) + '\\n')\n"
    )
    fakes = {
        name: Benchmark(
            f"about {name}",
            full=f"{name} --model {{student}}" if name == "good" else name,
            smoke=name,
            file=f"{name}.jsonl",
            kind=f"bench {name}",
            markdown=lambda record: f"| {record['results']['number']} |",
        )
        for name in scripts
    }
    monkeypatch.setattr(everything, "CATALOGUE", fakes)
    monkeypatch.setattr(doc_tables, "CATALOGUE", fakes)
    monkeypatch.setattr(smoke, "make", lambda folder: {})
    real = everything.finished

    def run(command, log, limit_s):
        assert command[:4] == [sys.executable, "-m", "mdm.cli", "bench"]
        name, *arguments = command[4:]
        return real([sys.executable, "-c", start + scripts[name], name, *arguments], log, limit_s)

    monkeypatch.setattr(everything, "finished", run)
    monkeypatch.setattr(everything, "END_S", 5.0)
    return fakes


def settings_in(folder, **changes):
    return everything.AllBench(**{"smoke": True, "runs": str(folder / "runs"), **changes})


def test_one_that_fails_leaves_the_others_alone(tiny, tmp_path):
    said = []
    asked = settings_in(tmp_path, skip=("hangs",))
    record, outcomes = everything.run(asked, said.append)
    folder = tmp_path / "runs/bench-all-smoke"
    assert [(own.name, own.problem) for own in outcomes][:3] == [
        ("good", None),
        ("fails", "exit status 3"),
        ("silent", f"no new record in {folder}/silent.jsonl"),
    ]
    assert "lacks what its table needs" in outcomes[3].problem
    assert outcomes[1].last_lines == "one\ntwo"
    assert said[0] == "1/4 good (not known) …"
    assert said[2:4] == [
        "2/4 fails (not known) …",
        f"    exit status 3, {outcomes[1].seconds:.0f} s",
    ]
    assert [line["name"] for line in record["results"]["benchmarks"]] == [
        "good", "fails", "silent", "odd"
    ]  # fmt: skip
    assert json.loads((folder / "all.jsonl").read_text()) == json.loads(json.dumps(record))
    card = everything.describe(record, outcomes)
    assert re.search(r"^\| good \| \d+ s \| ok \|$", card, re.MULTILINE)
    assert "fails: exit status 3; its last lines:\none\ntwo\n" in card
    assert json.loads(card.splitlines()[-1])["kind"] == "bench all"
    # A second time: the records from before are no proof, and the time is known.
    (folder / "silent.jsonl").write_text(
        json.dumps({"kind": "bench silent", "time": "1", "settings": {}, "results": {}}) + "\n"
    )
    again = everything.run(settings_in(tmp_path, only=("silent", "good")), said.append)[1]
    assert [own.problem is None for own in again] == [True, False]
    # What went wrong says nothing of how long it takes.
    assert said[10] == "2/2 silent (not known) …"
    assert re.match(rf"1/2 good \(\d+ s, {record['time'][:10]}\) …", said[8])


def test_one_that_hangs_is_ended(tiny, tmp_path):
    asked = settings_in(tmp_path, only=("hangs", "good"), minutes=2.5 / 60)
    outcomes = everything.run(asked, lambda text: None)[1]
    assert [own.problem for own in outcomes] == [
        None,
        "ended after 0.0416667 minutes (--minutes)",
    ]
    assert outcomes[1].last_lines.startswith("here")
    assert "KeyboardInterrupt" in outcomes[1].last_lines  # asked, not killed
    assert outcomes[1].seconds < 20


STUBBORN = (
    "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
    " print('here', flush=True); time.sleep(60)"
)


def test_one_that_does_not_listen_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(everything, "END_S", 0.2)
    before, began = set(psutil.Process().children()), time.monotonic()
    status = everything.finished([sys.executable, "-c", STUBBORN], tmp_path / "log", 2)
    assert status is None
    assert time.monotonic() - began < 30  # before it would have ended by itself
    assert set(psutil.Process().children()) == before


FOREVER = """
import sys
from pathlib import Path
from mdm.benchmarks import all as everything
with everything._signals_interrupt():
    command = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
    everything.finished(command, Path(sys.argv[1]), 60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_ends_us_ends_the_benchmark(number, tmp_path):
    log = tmp_path / "log"
    process = subprocess.Popen([sys.executable, "-c", FOREVER, str(log)], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not (log.exists() and log.read_text().endswith("\n")):
            assert time.monotonic() < until
            time.sleep(0.05)
        own = psutil.Process(int(log.read_text()))
        assert os.getsid(own.pid) == own.pid  # Ctrl-C in a terminal does not reach it twice
        process.send_signal(number)
        assert process.wait(30) != 0
        assert not own.is_running()
        assert "KeyboardInterrupt" in log.read_text()
    finally:
        process.kill()
        process.wait()


def test_an_interrupt_tells_what_was_done(tiny, tmp_path, monkeypatch):
    real = everything.one

    def one(settings, name, where):
        if name == "fails":
            raise KeyboardInterrupt
        return real(settings, name, where)

    monkeypatch.setattr(everything, "one", one)
    said = []
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        everything.run(settings_in(tmp_path), said.append)
    assert said[-1] == "stopped; done: good"
    assert not (tmp_path / "runs/bench-all-smoke/all.jsonl").exists()
    assert signal.getsignal(signal.SIGTERM) == handler


def test_trained_runs_are_kept_until_all_is_well(tiny, tmp_path):
    folder = tmp_path / "runs/bench-all-smoke"
    for name in ("good", "fails"):
        (folder / name).mkdir(parents=True)
    everything.run(settings_in(tmp_path, only=("good", "fails")), lambda text: None)
    assert not (folder / "good").exists()
    assert (folder / "fails").is_dir()


def test_real_runs_take_the_last_student(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(
        everything,
        "finished",
        lambda command, log, limit_s: log.write_text("") or seen.append(command[4:]) or 1,
    )
    with pytest.raises(CheckpointError, match="no finished run in 'runs'"):
        everything.run(everything.AllBench(), lambda text: None)
    assert seen == []  # before anything is run
    everything.run(everything.AllBench(only=("fails",)), lambda text: None)  # needs none
    final = tmp_path / "runs/demo/final"
    final.mkdir(parents=True)
    (final / "mdm.json").write_text("{}")
    record = everything.run(everything.AllBench(only=("good",)), lambda text: None)[0]
    everything.run(everything.AllBench(only=("good",), model="mine"), lambda text: None)
    where = ["--record", "benchmarks/results/good.jsonl"]
    assert seen == [
        ["fails", "--record", "benchmarks/results/fails.jsonl"],
        ["good", "--model", "runs/demo/final", *where],
        ["good", "--model", "mine", *where],
    ]
    assert record["settings"]["smoke"] is False
    assert (tmp_path / "benchmarks/results/all.jsonl").is_file()
    assert (tmp_path / "runs/bench-all/good.log").parent.is_dir()


def test_models_that_are_named_go_before_tiny_ones(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(smoke, "make", lambda folder: {"student": "tiny", "teacher": "tiny"})
    asked = settings_in(tmp_path, model="mine")
    with everything._places(asked) as found:
        assert found == {
            "student": "mine",
            "teacher": "tiny",
            "results": str(tmp_path / "runs/bench-all-smoke"),
        }
    asked = settings_in(tmp_path, smoke=False, model="mine", results="r")
    with everything._places(asked) as found:
        assert found == {"student": "mine", "teacher": "embedded", "results": "r"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"only": ("serv",)}, "unknown benchmark 'serv'; did you mean 'serve'"),
        ({"skip": ("cach",)}, "did you mean 'cache'"),
        ({"only": ("cache",), "skip": ("cache",)}, "leave nothing to run"),
        ({"minutes": 0.0}, "--minutes must be above 0; got 0"),
        ({"smoke": True, "results": "benchmarks/results"}, "holds real records"),
        ({"smoke": True, "results": "./benchmarks/../benchmarks/results/"}, "holds real records"),
    ],
)
def test_bad_settings_are_named(changes, named):
    with pytest.raises(ConfigError, match=named):
        everything.AllBench(**changes)


def test_they_run_in_the_order_of_the_catalogue():
    asked = everything.AllBench(only=("tide", "serve", "cache"), skip=("cache",))
    assert asked.chosen == ["serve", "tide"]
    assert everything.AllBench(skip=("serve",)).chosen == [n for n in CATALOGUE if n != "serve"]


def test_the_list_tells_needs_and_times(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["all", "--list", "--skip", "cache", "--results", str(RESULTS)]
    output = CliRunner().invoke(bench, arguments, catch_exceptions=False).stdout
    lines = {line.split("|")[1].strip(): line for line in output.splitlines()[2:]}
    assert [*lines] == [name for name in CATALOGUE if name != "cache"]
    assert "| --model, --teacher |" in lines["targets"]
    assert "| --model |" in lines["serve"]
    assert "| more than" in lines["on-policy"]
    assert "not known" in lines["likelihood"]  # its record has no times
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.4, "3 s"), (99, "99 s"), (100, "2 min"), (5940, "99 min"), (9000, "2.5 h")],
)
def test_durations(seconds, text):
    assert everything.duration(seconds) == text


def test_the_command_renews_tables_and_fails_if_one_fails(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "docs/page.md"
    page.parent.mkdir()
    old = "<!-- bench:good -->\nold\n<!-- /bench -->\n"
    page.write_text(old)
    (tmp_path / "benchmarks/results").mkdir(parents=True)

    def run(*arguments):
        return CliRunner().invoke(bench, ["all", *arguments], catch_exceptions=False)

    assert run("--only", "good", "--model", "m", "--no-tables").exit_code == 0
    assert run("--only", "good", "--smoke").exit_code == 0
    assert page.read_text() == old
    done = run("--only", "good", "--model", "m")
    assert done.exit_code == 0
    assert "docs/page.md: made anew" in done.stderr
    assert page.read_text() == "<!-- bench:good -->\n\n| 7 |\n\n<!-- /bench -->\n"
    assert json.loads(done.stdout.splitlines()[-1])["settings"]["model"] == "m"
    done = run("--only", "fails")
    assert done.exit_code == 1
    assert json.loads(done.stdout.splitlines()[-1])["results"]["benchmarks"][0]["problem"]


# --- tables ----------------------------------------------------------------------------------------


def test_tables_in_the_docs_are_those_of_the_records():
    """After a new record: `mdm bench tables`."""
    stale, _ = doc_tables.renew(doc_tables.pages(ROOT), RESULTS, write=False)
    assert stale == []


def test_the_docs_have_tables():
    marked = {
        name for page in doc_tables.pages(ROOT) for name in doc_tables.names(page.read_text())
    }
    assert {"serve", "targets", "tide", "on-policy"} <= marked


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_record_can_be_shown(name):
    newest(name)
    text = doc_tables.table(name, RESULTS)
    assert "{" not in text  # no JSON line
    assert all(line == line.rstrip() for line in text.splitlines())
    if text.startswith("```"):
        assert text.startswith("```text\n")
        assert text.endswith("\n```")
    else:
        assert "\n| " in f"\n{text}"


@pytest.fixture
def record_of_good(tiny, tmp_path):
    def write(number, when="2026-01-01", file="good.jsonl"):
        line = {"kind": "bench good", "time": when, "settings": {}, "results": number}
        with open(tmp_path / file, "a") as out:
            out.write(json.dumps(line) + "\n")

    return write


def test_only_what_is_marked_changes(record_of_good, tmp_path):
    record_of_good({"number": 2}, "2026-01-02")
    record_of_good({"number": 1}, "2026-01-01")  # an older one that was added later
    record_of_good({"number": 0}, "2025-12-31")
    text = "a <!-- bench:good -->\n\n<!-- bench:good -->\n\n| 1 |\n\n<!-- /bench -->\n\nb\n"
    new, notes = doc_tables.filled(text, tmp_path)
    assert new == text.replace("| 1 |", "| 2 |")
    assert notes == []
    assert doc_tables.filled(new, tmp_path) == (new, [])
    empty = "<!-- bench:good -->\n<!-- /bench -->\n" * 2
    assert doc_tables.filled(empty, tmp_path)[0].count("| 2 |") == 2


@pytest.mark.parametrize(
    ("results", "said"),
    [
        (None, "no record of good in"),
        ({}, "lacks what its table needs (KeyError: 'number'), as an older version"),
        ([], "TypeError"),
    ],
)
def test_a_table_that_cannot_be_made_is_left(results, said, record_of_good, tmp_path):
    if results is not None:
        record_of_good(results)
    page = tmp_path / "p.md"
    page.write_text("<!-- bench:good -->\n| old |\n<!-- /bench -->\n")
    stale, (note,) = doc_tables.renew([page], tmp_path, write=True)
    assert stale == []
    assert said in note
    assert note.startswith(f"{page}: ")
    assert note.endswith("its table is left as it is")
    assert "| old |" in page.read_text()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("<!-- bench:god -->\n<!-- /bench -->\n", "did you mean 'good'"),
        ("<!-- bench:good -->\n| 1 |\n", "must be pairs"),
        ("| 1 |\n<!-- /bench -->\n", "must be pairs"),
        ("<!-- bench:good -->\n<!-- bench:good -->\n<!-- /bench -->\n", "must be pairs"),
        ("<!-- bench good -->\n<!-- /bench -->\n", "must be pairs"),
    ],
)
def test_wrong_marks_are_named_with_their_page(text, named, record_of_good, tmp_path):
    record_of_good({"number": 1})
    page = tmp_path / "p.md"
    page.write_text(text)
    with pytest.raises(ConfigError, match=f"p.md: .*{named}"):
        doc_tables.renew([page], tmp_path, write=True)
    assert page.read_text() == text


def test_the_tables_command(record_of_good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record_of_good({"number": 5})
    (tmp_path / "docs").mkdir()
    pages = [tmp_path / "README.md", tmp_path / "docs/a.md"]
    for page in pages:
        page.write_text("<!-- bench:good -->\n<!-- /bench -->\n")

    def run(*arguments):
        return CliRunner().invoke(bench, ["tables", "--results", ".", *arguments])

    checked = run("--check")
    assert checked.exit_code == 1
    assert checked.stderr == "README.md: stale\ndocs/a.md: stale\n"
    assert "5" not in pages[0].read_text()
    assert run("docs/a.md").exit_code == 0
    assert run("--check").stderr == "README.md: stale\n"
    assert run().stderr == "README.md: made anew\n"
    assert run("--check").exit_code == 0
    assert "| 5 |" in pages[0].read_text()


# --- Markdown of records ---------------------------------------------------------------------------


def test_errors_that_do_not_exist_are_nan_and_other_nulls_stay():
    record = {"a_std_err": None, "interval": None, "lines": [{"std_err": None, "mean": None}]}
    found = json.dumps(doc_markdown._with_nan(record, "std_err"))
    assert found == (
        '{"a_std_err": NaN, "interval": null, "lines": [{"std_err": NaN, "mean": null}]}'
    )


def test_cards_have_nan_for_what_does_not_exist():
    text = doc_markdown.card("cache")(
        {
            "settings": {"model": "m", "rows": 1, "length": 2, "precision": "bf16", "top_k": 3},
            "results": {
                **{
                    side: {"steps_per_second": 1.0, "tokens_per_second": 2.0, "seconds": 1.0}
                    for side in ("online", "cached")
                },
                **dict.fromkeys(
                    ("ratio", "loss", "loss_difference", "bytes_per_token", "n",
                     "bytes_per_maskable_token", "cache_tokens_per_second"), 1.0
                ),
                "ratio_std_err": None,
                "pays_after_epochs": None,
                "aims": {},
            },
        }
    )  # fmt: skip
    assert "1.00 ± nan times" in text
    assert "pays after nan epochs" in text


def test_the_on_policy_table():
    def run(arm, seed, bound, steps=2, seconds=6.0, rollouts=0.0):
        values = {"bound": bound, "teacher_drawn": -bound, "parallel_0.5": 1.5}
        return {
            "arm": arm, "seed": seed, "steps": steps, "seconds": seconds, "rollout_seconds": rollouts,
            **{name: {"mean": value, "std_err": None} for name, value in values.items()},
        }  # fmt: skip

    def runs(more):
        return [
            run("start", 0, 9.0, steps=0, seconds=0.0),
            run("on_policy", 0, 1.0 + more, rollouts=2.0),
            run("on_policy", 1, 2.0 + more, rollouts=2.0),
            run("new", 0, 4.0),
        ]

    blocks = {size: {"runs": runs(float(size))} for size in ("8", "16", "4")}
    record = {"settings": {"thresholds": [0.9, 0.5]}, "results": {"blocks": blocks}}
    assert doc_markdown.on_policy(record).splitlines() == [
        "|  | bound, blocks of 4 / 8 / 16 | drawn | tokens a forward, greedily at 0.5"
        " | s a step, of it rollouts |",
        "| --- | --: | --: | --: | --: |",
        "| before any step (first seed) | 9.00 / 9.00 / 9.00 | −9.0 / −9.0 / −9.0"
        " | 1.50 / 1.50 / 1.50 |  |",
        "| on-policy, published form | 5.50 / 9.50 / 17.50 | −5.5 / −9.5 / −17.5"
        " | 1.50 / 1.50 / 1.50 | 3.0, 1.0 |",
        "| `new` | 4.00 / 4.00 / 4.00 | −4.0 / −4.0 / −4.0 | 1.50 / 1.50 / 1.50 | 3.0 |",
    ]


def test_the_likelihood_table():
    def line(estimator, rmse, bias, coverage, own, shared):
        return {
            "forwards": 16, "estimator": estimator, "rmse": rmse, "bias": bias, "coverage": coverage,
            "flips_own_masks": own, "flips_shared_masks": shared,
        }  # fmt: skip

    short = [
        line("llada", 4.0, -0.5, 0.9, 0.15, 0.1),
        line("independent", 5.0, 5.0, 0.5, 0.5, 0.5),
        line("stratified", 1.0, 0.25, 0.75, 0.05, 0.025),
    ]
    record = {"results": {"short": short}}
    line_16 = "| 16 | 4.00 | 1.00 | 0.25 | -0.50 / +0.25 | 75% | 15.0% / 2.5% |"
    assert doc_markdown.likelihood(record).splitlines()[2:] == [line_16]
    short[0]["rmse"], short[2]["coverage"] = 0.0, None
    assert "| 0.00 | 1.00 | – | -0.50 / +0.25 | – |" in doc_markdown.likelihood(record)


def test_the_targets_table():
    def line(estimator, level, where="hole", fills=None, tv=0.5):
        return {
            "estimator": estimator, "level": level, "where": where, "fills": fills, "tv": tv,
            "tv_std_err": None, "ms": 1.6, "tokens": 2.4,
        }  # fmt: skip

    references = [
        {"where": where, "level": level, "n": 3, "floor": 0.1, "floor_std_err": 0.02}
        for where, level in (("hole", 0.2), ("tail", 0.2), ("hole", 0.5))
    ]
    lines = [
        line("hard", 0.2),
        line("hard", 0.2, "tail", tv=0.9),
        line("suffix_pruned", 0.2),
        line("i_sir_span", 0.2, fills=4),
        line("i_sir_span", 0.2, fills=16, tv=0.25),
        line("hard", 0.5),
    ]
    settings = {"fills": [4, 16], "candidates": 8, "prune": 0.01}
    results = {"references": references, "lines": lines}
    _, _, *rows = doc_markdown.targets({"settings": settings, "results": results}).splitlines()
    assert rows == [
        "| `hard` | 0.50 | 2 | 2 | 0.50 | 2 | 2 |",
        "| the same with `prune=0.01` | 0.50 | 2 | 2 |  |  |  |",
        "| `i_sir`, `fill=span` | 0.25 | 2 | 2 |  |  |  |",
        "| reference's own error | 0.10 ± 0.02 |  |  | 0.10 ± 0.02 |  |  |",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.018, "1.02"), (9.994, "9.99"), (9.996, "10.0"), (99.96, "100"), (0.5, "0.50")],
)
def test_three_figures(value, text):
    assert doc_markdown.three_figures(value) == text


# --- whole benchmarks, tiny models -------------------------------------------------------------------

NUMBERS = {  # what has to be in the results of each record
    "train-step": {"mdm", "twin", "n", "masked_tokens"},
    "train-step-kept": {"mdm", "twin", "n"},
    "train-step-blocks": {"mdm", "twin", "n", "full_size", "logits_ratio_counted"},
    "likelihood": {"short", "long", "exact_forwards"},
    "serve": {"levels", "ratios", "overhead", "limits"},
    "targets": {"references", "lines", "front"},
    "study": {"runs", "differences"},
    "study-synthetic": {"lines", "language"},
    "suffix": {"sides", "ratios", "agreement", "fast"},
    "cache": {"online", "cached", "bytes_per_token"},
    "tide": {"teacher", "first", "pipelines"},
    "tokenizers": {"teachers", "runs", "differences"},
    "on-policy": {"text", "blocks"},
    "cpu": {"models", "times", "price"},
    "drift": {"texts", "exact", "caches"},
    "latency": {"sides", "ratios", "models", "batches", "contexts"},
}


def records_of(stdout, folder):
    """The records of all that ran, by name."""
    last = json.loads(stdout.splitlines()[-1])
    ran = [line["name"] for line in last["results"]["benchmarks"]]
    return {name: CATALOGUE[name].records(folder / "runs/bench-all-smoke") for name in ran}


def run_smoke(names, folder):
    """What `mdm bench all --smoke` prints."""
    folder.mkdir()
    return tiny_run.mdm("bench", "all", "--smoke", "--only", ",".join(names), cwd=folder).stdout


def test_two_of_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["all", "--smoke", "--only", "likelihood,suffix"]
    done = CliRunner().invoke(bench, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = records_of(done.stdout, tmp_path)
    (likelihood,), (suffix,) = found["likelihood"], found["suffix"]
    assert [(line["forwards"], line["items"]) for line in likelihood["results"]["short"]] == [
        (2, 2), (2, 2), (2, 2), (4, 2), (4, 2), (4, 2)
    ]  # fmt: skip
    assert suffix["results"]["agreement"]["n"] == 2
    assert suffix["results"]["agreement"]["tv"] < 1e-4
    assert suffix["results"]["sides"]["loop"]["tokens_per_position"] == 4 * 12
    assert sorted(path.name for path in (tmp_path / "runs/bench-all-smoke").iterdir()) == [
        "all.jsonl", "likelihood.jsonl", "likelihood.log", "suffix.jsonl", "suffix.log"
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.slow
def test_all_of_them(tmp_path):
    names = [name for name in CATALOGUE if name != "train-step-kept"]  # as train-step
    halves = (names[::2], names[1::2])
    folders = [tmp_path / str(number) for number in range(2)]
    with ThreadPoolExecutor() as pool:  # two at a time: no time is measured here
        done = pool.map(run_smoke, halves, folders)
    found = {}
    for half, folder, stdout in zip(halves, folders, done, strict=True):
        ran = records_of(stdout, folder)
        assert [*ran] == half
        for name, records in ran.items():
            (found[name],) = records
            assert NUMBERS[name] <= set(found[name]["results"])
            assert doc_tables.table(name, folder / "runs/bench-all-smoke")

    def results(name):
        return found[name]["results"]

    assert results("train-step")["mdm"]["loss"] > 1
    assert [line["requests"] for line in results("serve")["levels"]] == [1, 1, 2, 2]
    assert {line["errors"] for line in results("serve")["levels"]} == {0}
    assert [run["arm"] for run in results("study")["runs"]] == ["ce", "left_2"]
    assert results("cache")["cached_tokens"] >= 6 * 24
    assert [*results("tide")["pipelines"]] == ["shared", "cross"]
    assert [run["steps"] for run in results("tokenizers")["runs"]] == [2, 2, 2]
    assert [*results("on-policy")["blocks"]] == ["4", "8"]
    caches, exact = results("drift")["caches"], results("drift")["exact"]
    assert [*caches] == ["prefix", "dual:2"]
    assert {line["numbers"] for line in results("cpu")["times"]} == {"float32", "int8_dynamic"}
    for own in caches.values():
        assert own["tokens_read_per_forward"] < exact["tokens_read_per_forward"]
    # Counts of the fast path: a token a step takes as many forwards, two take half.
    sides = {
        side["decoding"]: side for side in results("latency")["sides"] if side["who"] == "student"
    }
    assert sides["schedule=1"]["tokens"] == 2 * 8
    assert sides["schedule=1"]["tokens_per_forward"] == 1
    assert sides["schedule=2"]["tokens_per_forward"] == 2
