"""`mdm bench on-policy` in small: texts, recipes, restarts, and what the page says."""

import json
import shutil
import statistics
from dataclasses import replace

import pytest
import tiny_run
from click.testing import CliRunner

from mdm.benchmarks import on_policy as bench
from mdm.benchmarks import on_policy_report as report
from mdm.benchmarks.command import bench as commands
from mdm.errors import ConfigError
from mdm.record import to_json
from mdm.train.dataset import open_prepared
from mdm.train.rollouts import Rollout
from mdm.train.states import GIVEN

ARMS = ("ce_corpus", "off_policy", "on_policy", "on_policy_right")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An AR model of bytes, a corpus and a recipe."""
    folder = tmp_path_factory.mktemp("on-policy")
    ar = tiny_run.ar_folder(folder / "ar")
    corpus = tiny_run.corpus_folder(folder / "code", files=30)
    tree = tiny_run.tree(ar, corpus, data={"min_tokens": 4, "max_held_out_rows": 8})
    tiny_run.write_recipe(folder / "tiny.yaml", tree)
    return folder


def small(place, **changes):
    return bench.OnPolicyBench(**{
        "model": str(place / "ar"), "arms": ARMS, "blocks": (4, 8), "seeds": (0, 1), "steps": 2, "rows": 2,
        "prompt_tokens": 23, "length": 40, "documents": 30, "steps_per_batch": 1, "samples": 2,
        "thresholds": (0.5, 1.0), "eval_rows": 3, "eval_draws": 1, "holes": 3,
        "recipe": str(place / "tiny.yaml"), **changes,
    })  # fmt: skip


@pytest.fixture(scope="module")
def done(place):
    """A finished study, its record and what it said."""
    said = []
    record = bench.run(small(place), place / "runs", place / "on_policy.jsonl", said.append)
    return place, record, said


def plain(value):
    """As it is read back from a file."""
    return json.loads(to_json(value))


def refuse(*_arguments, **_options):
    raise AssertionError("trained again")


# --- recipes and texts -----------------------------------------------------------------------------


def test_a_study_of_the_embedded_model_is_possible():
    """The settings that the command line gives fit together for every arm and block."""
    settings = bench.OnPolicyBench()
    assert settings.chosen == tuple(bench.ARMS)
    for block in settings.blocks:
        recipes = {arm: bench.recipe_of(settings, arm, block, 1) for arm in settings.chosen}
        for arm, recipe in recipes.items():
            assert (recipe.student.init, recipe.student.block_size) == ("embedded", block)
            assert recipe.student.layers is None
            assert recipe.train.steps == 10
            assert recipe.data.length == 64
            assert recipe.on_policy.active == (arm.startswith(("on_policy", "margin")))
        published = recipes["on_policy"].on_policy
        assert (published.states, published.eos, published.reduce) == (
            "round",
            "published",
            "rollout",
        )
        assert (published.temperature, published.threshold) == (1.0, 0.9)
        assert recipes["on_policy"].target.top_k == 0
        assert recipes["on_policy_right"].target.block == block
        assert published.remasking == "low_confidence"
        few, right = recipes["on_policy_8"], recipes["on_policy_right"]
        assert few.on_policy == right.on_policy == published
        assert few.target.top_k == right.target.candidates == 8
        assert (few.objective.tail, few.target.kind) == ("renormalise", "left")
        assert recipes["on_policy_right"].on_policy == published
        by_margin = replace(published, remasking="margin")
        assert recipes["margin"] == replace(
            recipes["on_policy"], name=f"margin-block{block}-seed1", on_policy=by_margin
        )
        assert recipes["margin_right"].on_policy == by_margin
        assert recipes["margin_right"].target == recipes["on_policy_right"].target
        assert not recipes["ce_teacher"].objective.distils
        assert recipes["off_policy"].data.sources == ("teacher.jsonl",)
        assert recipes["ce_corpus"].data.sources == ("corpus.jsonl",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("on_polcy",)}, "did you mean 'on_policy'"),
        ({"blocks": (4, 4)}, "blocks must differ"),
        ({"seeds": ()}, "seeds must name at least one"),
        ({"samples": 1}, "samples must be >= 2; got 1"),
        ({"prompt_tokens": 24}, "which blocks of 4 do not divide"),
    ],
)
def test_settings_that_make_no_study(changes, message):
    with pytest.raises(ConfigError, match=message):
        bench.OnPolicyBench(**changes)


def test_the_control_comes_along():
    assert bench.OnPolicyBench(arms=("on_policy",)).chosen == ("ce_corpus", "on_policy")


@pytest.mark.slow
def test_both_texts_stand_behind_the_same_prompts(done):
    place, _, _ = done
    (folder,) = (place / "runs").glob("text-*")
    corpus, teacher = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in (bench.CORPUS, bench.TEACHER_TEXT)
    )
    assert [row["prompt"] for row in corpus] == [row["prompt"] for row in teacher]
    assert [row["origin"] for row in corpus] == [row["origin"] for row in teacher]
    files = {path.name: path.read_text() for path in (place / "code").iterdir()}
    for row in corpus:
        text = files[row["origin"]]
        assert text.startswith(row["prompt"] + row["response"])
        assert len(row["prompt"]) == 23  # a token is a byte
        assert row["cut"] == (len(text) > 63)


@pytest.mark.slow
def test_the_same_documents_are_held_out_of_both_texts(done):
    place, _, _ = done
    folders = [*(place / "runs" / "data").iterdir()]
    assert {folder.name.split("-")[0] for folder in folders} == {"corpus", "teacher"}
    prompts = {
        folder.name.split("-")[0]: {
            tuple(ids) for ids in bench.held_out_prompts(open_prepared(folder))
        }
        for folder in folders
    }
    assert prompts["corpus"] == prompts["teacher"] != set()
    assert {len(ids) for ids in prompts["corpus"]} == {24}


# --- the study -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_run_is_measured(done):
    _, record, said = done
    blocks = record["results"]["blocks"]
    assert [*blocks] == ["4", "8"]
    for found in blocks.values():
        runs = {(run["arm"], run["seed"]): run for run in found["runs"]}
        assert {*runs} == {("start", 0), *((arm, seed) for arm in ARMS for seed in (0, 1))}
        for (arm, _), run in runs.items():
            assert run["steps"] == (0 if arm == "start" else 2)
            assert (run["rollout_seconds"] > 0) == arm.startswith("on_policy")
            assert run["bound"]["mean"] > 0 > run["teacher_drawn"]["mean"]
            assert run["parallel_1"]["mean"] == 1  # nothing is that sure
            assert run["parallel_0.5"]["mean"] >= 1
    assert len(said) == 1 + 2 * (1 + 2 * len(ARMS))


@pytest.mark.slow
def test_differences_are_those_of_the_runs(done):
    _, record, _ = done
    found = record["results"]["blocks"]["8"]
    runs = {(run["arm"], run["seed"]): run for run in found["runs"]}
    for line in found["differences"]:
        if line["arm"] == "start":
            continue
        gaps = [
            runs[line["arm"], seed][line["measure"]]["mean"]
            - runs[line["minus"], seed][line["measure"]]["mean"]
            for seed in (0, 1)
        ]
        assert line["mean"] == pytest.approx(statistics.fmean(gaps), abs=1e-9)
        assert line["n"] == 2
    shown = {(line["arm"], line["minus"]) for line in found["differences"]}
    assert ("on_policy_right", "on_policy") in shown
    assert ("off_policy", "ce_corpus") in shown


@pytest.mark.slow
def test_finished_runs_are_not_repeated(done, monkeypatch, tmp_path):
    place, record, _ = done
    monkeypatch.setattr(bench, "train", refuse)
    monkeypatch.setattr(bench, "sample_text", refuse)
    runs = shutil.copytree(place / "runs", tmp_path / "runs")
    again = bench.run(small(place), runs, tmp_path / "again.jsonl", print)
    assert plain(again["results"]) == plain(record["results"])
    with pytest.raises(AssertionError, match="trained again"):
        bench.run(replace(small(place), steps=3), runs, tmp_path / "again.jsonl", print)


@pytest.mark.slow
def test_what_is_left_behind_is_small(done):
    place, _, _ = done
    for folder in (place / "runs").glob("*-block*"):
        left = {path.name for path in folder.iterdir()}
        assert not left & {"data", "final", "checkpoints", "prompts", "rollouts"}
        assert "record.jsonl" in left


@pytest.mark.slow
def test_a_text_counts_up_to_its_end(done):
    """The teacher judges the end token that the student wrote, and nothing behind it."""
    import torch

    place, _, _ = done
    ar = bench.autoregressive(str(place / "ar"))
    eos = ar.vocab.eos_id
    start = [ar.vocab.start_id, 65]
    tokens = torch.tensor([*start, 66, 67, eos, 68, eos, eos])
    steps = torch.tensor([GIVEN, GIVEN, 0, 2, 1, 3, 9, 9])
    ended = Rollout(tokens, steps, True, 4, 4, -1.0)
    units = bench.sample_units(ar, [ended, ended], "x")
    with torch.no_grad():
        logits_1LV = ar.model(tokens[None, :5]).logits.float()
    log_p_LV = logits_1LV[0].log_softmax(-1)
    expected = sum(float(log_p_LV[i - 1, tokens[i]]) for i in (2, 3, 4)) / 3
    assert units["teacher_x"].values == pytest.approx([expected] * 2, abs=1e-5)
    assert units["length_x"].values == [3.0, 3.0]
    assert units["parallel_x"].values == [1.0, 1.0]


# --- the page --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_and_the_picture(done, tmp_path):
    _, record, _ = done
    text = report.page(record)
    for part in (
        "### Blocks of 4",
        "### Blocks of 8",
        "Blocks of 8 minus blocks of 4",
        "`on_policy_right`",
    ):
        assert part in text
    run = record["results"]["blocks"]["4"]["runs"][0]
    assert f"{run['bound']['mean']:.3f}" in text
    widths = [
        {line.count("|") for line in table.splitlines()}
        for table in text.split("\n\n")
        if table.startswith("|")
    ]
    assert len(widths) == 7
    assert all(len(width) == 1 for width in widths)
    assert json.loads(report.describe(record).splitlines()[-1]) == plain(record)
    assert report.plot(record, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_command(done, tmp_path):
    place, record, _ = done
    runs = shutil.copytree(place / "runs", tmp_path / "runs")
    arguments = [
        "on-policy", "--model", place / "ar", "--arms", ",".join(ARMS), "--blocks", "4,8",
        "--seeds", "0,1", "--steps", 2,
        "--rows", 2, "--documents", 30, "--steps-per-batch", 1, "--samples", 2,
        "--thresholds", "0.5,1.0", "--eval-rows", 3, "--eval-draws", 1, "--holes", 3,
        "--recipe", place / "tiny.yaml", "--runs", runs, "--table", tmp_path / "t.md",
        "--plot", tmp_path / "p.png", "--record", tmp_path / "r.jsonl",
    ]  # fmt: skip
    result = CliRunner().invoke(commands, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    assert plain(json.loads(result.stdout.splitlines()[-1])["results"]) == plain(record["results"])
    assert (tmp_path / "t.md").read_text().startswith("2 steps of 2 rows")
    assert (tmp_path / "p.png").exists()
    bad = CliRunner().invoke(commands, ["on-policy", "--thresholds", "high"])
    assert bad.exit_code == 2
    assert "must be numbers like 0.8,1" in bad.output


@pytest.mark.slow
def test_a_threshold_that_changes_nothing_is_not_written_again(done, monkeypatch):
    from mdm.convert import initial

    place, _, _ = done
    settings = small(place, thresholds=(1.0, 0.001, 0.999))
    recipe = bench.recipe_of(settings, "ce_corpus", 4, 0)
    student = initial(recipe.student).eval()
    data = open_prepared(next((place / "runs" / "data").glob("corpus-*")))
    asked, real = [], bench.written_by

    def noted(*arguments):
        wanted = arguments[-1]
        assert wanted.remasking == "low_confidence"
        asked.append((wanted.threshold, wanted.temperature))
        return real(*arguments)

    monkeypatch.setattr(bench, "written_by", noted)
    found = bench.all_written(settings, recipe, student, data)
    assert asked == [(0.001, 0.0), (0.999, 0.0), (0.9, 1.0)]
    assert [*found] == ["0.001", "0.999", "1", bench.DRAWN]
    one = bench.OnPolicySettings(threshold=1.0, temperature=0.0, remasking="low_confidence")
    again = real(settings, recipe, student, data, one)
    assert [r.tokens_L.tolist() for r in again] == [r.tokens_L.tolist() for r in found["1"]]
