"""`mdm bench tide` in small: the teacher, both pipelines, restarts, and what the page says."""

import json
import shutil
import statistics
from dataclasses import asdict, replace

import pytest
import tiny
import tiny_run
import torch
from click.testing import CliRunner

from mdm.benchmarks import tide as bench
from mdm.benchmarks import tide_recipes as arms_of
from mdm.benchmarks import tide_report as report
from mdm.benchmarks.command import bench as commands
from mdm.checkpoint import load_denoiser, weights_hash
from mdm.convert import StudentSettings
from mdm.errors import ConfigError
from mdm.record import to_json
from mdm.train import trainer
from mdm.train.dataset import open_prepared
from mdm.train.readings import chunks
from mdm.train.tokenizer import train_tokenizer

ARMS = ("tidal_comp_demo", "tidal_normalised", "ce_chunks", "reverse_calm", "calm_tidal")
SHARED = ("teacher", "ce", "tidal_comp_demo", "tidal_normalised")
CROSS = ("ce_cross", "ce_chunks", "reverse_calm", "calm_tidal")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An AR model whose tokens are longer than those of `cross` students, a corpus and a recipe."""
    folder = tmp_path_factory.mktemp("tide")
    corpus = folder / "code"
    corpus.mkdir()
    for number in range(30):
        lines = [f"def f{number}_{i}(x):\n    return x + {i}\n" for i in range(9 + number % 3)]
        (corpus / f"m{number}.py").write_text("\n".join(lines), encoding="utf-8")
    ar = folder / "ar"
    size = train_tokenizer((file.read_text() for file in corpus.iterdir()), 290, ar)
    tiny.tiny_model("llama", size, hidden=16).save_pretrained(ar)
    sections = {"data": {"length": 80, "min_tokens": 8, "max_held_out_rows": 6}}
    tree = tiny_run.tree(ar, corpus, **sections)
    tree["train"] |= {"learning_rate": 3e-3}
    tiny_run.write_recipe(folder / "tiny.yaml", tree)
    return folder


def small(place, **changes):
    return arms_of.TideBench(**{
        "arms": ARMS, "seeds": (0, 1), "steps": 2, "teacher_steps": 3, "first_steps": 1, "layers": 1,
        "block": 4, "length": 80, "rows": 4, "holes": 3, "tokens": 270, "documents": 20,
        "recipe": str(place / "tiny.yaml"), "assignments": ("train.eval_rows=4",), **changes,
    })  # fmt: skip


@pytest.fixture(scope="module")
def done(place):
    """A finished study, its folder and its record."""
    said = []
    record = bench.run(small(place), place / "runs", place / "tide.jsonl", said.append)
    return place, record, said


def runs_of(record, name):
    return {
        (line["arm"], line["seed"]): line for line in record["results"]["pipelines"][name]["runs"]
    }


def plain(value):
    """As it is read back from a file."""
    return json.loads(to_json(value))


def rows_for(place, vocab, kind="rows"):
    return open_prepared(place / "runs" / "data" / f"{kind}-{vocab.fingerprint[:8]}")


def folder_of(runs, name):
    """The only folder of a run, whose name goes on with what it was made from."""
    (folder,) = runs.glob(f"{name}-????????")
    return folder


def copied(place, folder):
    """The finished runs, to go on with."""
    return shutil.copytree(place / "runs", folder / "runs")


def refuse(*_arguments, **_options):
    raise AssertionError("trained again")


# --- recipes -------------------------------------------------------------------------------------


def test_a_study_of_the_embedded_model_is_possible():
    """The settings that the command line gives fit together for every arm."""
    settings = arms_of.TideBench()
    assert settings.chosen == (
        *arms_of.PIPELINES["shared"].arms,
        *arms_of.PIPELINES["cross"].arms,
    )
    for arm in settings.chosen:
        recipe = arms_of.recipe_of(settings, arm, 1)
        assert recipe.student == StudentSettings(init="first")
        train = recipe.train
        assert (train.steps, train.batch_rows, train.seed, train.max_minutes) == (40, 4, 1, 0)
        assert recipe.data.length == 128
        assert recipe.teacher.model == "teacher"
    for name, tokenizer in (("shared", False), ("cross", True)):
        first = arms_of.first_recipe(settings, name)
        student = first.student
        assert (student.init, student.layers, student.kind, student.block_size) == (
            "embedded", 6, "bd3lm", 8
        )  # fmt: skip
        assert (student.tokenizer is not None) == tokenizer
        assert not first.objective.distils
        assert first.train.steps == 100
        assert first.train.seed not in (*settings.seeds, arms_of.TEACHER_SEED)


def test_students_can_begin_from_cut_layers():
    settings = arms_of.TideBench(first_steps=0)
    for arm, pipeline in arms_of.PIPELINE_OF.items():
        student = arms_of.recipe_of(settings, arm, 1).student
        assert (student.init, student.layers, student.kind, student.block_size) == (
            "embedded", 6, "bd3lm", 8
        )  # fmt: skip
        assert (student.tokenizer is None) == (pipeline == "shared")


@pytest.mark.parametrize("name", ["shared", "cross"])
def test_arms_of_a_pipeline_differ_in_the_teaching_alone(name):
    pipeline = arms_of.PIPELINES[name]
    recipes = {arm: arms_of.recipe_of(arms_of.TideBench(), arm, 2) for arm in pipeline.arms}
    for part in ("student", "data", "train", "teacher"):
        assert len({repr(getattr(recipe, part)) for recipe in recipes.values()}) == 1
    own = (
        "kd_lambda",
        "kd_weight",
        "kd_reduce",
        "kd_temperature",
        "chunk_loss",
        "temperature_squared",
    )
    kept = {repr({k: v for k, v in asdict(recipe.objective).items() if k not in own})
            for recipe in recipes.values()}  # fmt: skip
    assert len(kept) == 1
    assert not recipes[pipeline.controls[0]].objective.distils
    for arm, recipe in recipes.items():
        objective = recipe.objective
        if not objective.distils:
            continue
        temperature = 5 if arm == "published_calm" else 2
        assert objective.kd_temperature == temperature
        assert objective.temperature_squared == (name == "shared")
        assert objective.kd_weight == {"ce_chunks": 1e-9, "kl_weak": 0.09}.get(arm, 1)
        assert objective.kd_reduce == ("same" if arm == "tidal_normalised" else "mean_masked")


def test_what_each_arm_is():
    recipes = {arm: arms_of.recipe_of(arms_of.TideBench(), arm, 0) for arm in arms_of.PIPELINE_OF}
    weights = {arm: recipe.mix.weight for arm, recipe in recipes.items()}
    mixed = {"tidal": "midrange", "tidal_comp_demo": "midrange", "calm_tidal": "none",
             "tidal_normalised": "midrange_normalised"}  # fmt: skip
    assert weights == {arm: mixed.get(arm, "none") for arm in recipes}
    for arm, recipe in recipes.items():
        mix = recipe.mix
        wanted = (0.1, 0.9, True, True) if arm in mixed else (1, 1, True, False)
        assert (mix.first, mix.last, mix.by_training, mix.by_noise) == wanted
        cross = arms_of.PIPELINE_OF[arm] == "cross"
        assert recipe.objective.noise == ("row" if cross else "block")
        assert recipe.target.comp_demo == ("bernoulli" if arm == "tidal_comp_demo" else "")
        if recipe.objective.distils:
            assert recipe.target.kind == ("chunks" if cross else "denoised")
            masks = "chunks_published" if arm == "published_calm" else "chunks"
            assert recipe.masks.where == (masks if cross else "uniform")
    losses = {arm: recipes[arm].objective.chunk_loss for arm in arms_of.PIPELINES["cross"].arms}
    assert [losses[arm] for arm in ("forward_calm", "reverse_calm", "bernoulli_kl", "published_calm",
                                      "calm_tidal")] == [
        "forward_calm", "reverse_calm", "bernoulli_kl", "reverse_calm", "forward_calm"
    ]  # fmt: skip


def test_controls_come_with_the_arms():
    assert arms_of.TideBench(arms=("tidal",)).chosen == ("ce", "tidal")
    assert arms_of.TideBench(arms=("bernoulli_kl",)).chosen == (
        "ce",
        "ce_cross",
        "ce_chunks",
        "bernoulli_kl",
    )


def test_settings_reach_the_recipes():
    settings = arms_of.TideBench(
        layers=None,
        block=16,
        length=64,
        rows=3,
        weight="mean_masked",
        assignments=("train.clip=2",),
    )
    recipe, first = (
        arms_of.recipe_of(settings, "kl", 0),
        arms_of.first_recipe(settings, "shared"),
    )
    assert first.student.layers is None
    assert (first.student.block_size, recipe.data.length) == (16, 64)
    assert (recipe.train.batch_rows, recipe.train.micro_rows, recipe.train.clip) == (3, 3, 2)
    assert recipe.objective.weight == "mean_masked"
    assert arms_of.recipe_of(arms_of.TideBench(), "kl", 0).objective.weight == "bound"


# --- the runs ------------------------------------------------------------------------------------


def test_all_arms_of_a_seed_are_paired(done):
    _, record, _ = done
    assert [*record["results"]["pipelines"]] == ["shared", "cross"]
    for name, arms in (("shared", SHARED), ("cross", CROSS)):
        runs = runs_of(record, name)
        assert [*runs] == [(arm, seed) for seed in (0, 1) for arm in arms]
        students = [arm for arm in arms if arm != "teacher"]
        for seed in (0, 1):
            lines = [runs[arm, seed] for arm in students]
            assert len({line["bound_before"] for line in lines}) == 1
            assert len({line["tokens"] for line in lines}) == 1
            assert len({line["bound"]["mean"] for line in lines}) == len(
                lines
            )  # differently taught
            assert all(line["steps"] == 2 for line in lines)
            assert lines[0]["teacher_seconds"] == 0
            assert all(line["teacher_seconds"] > 0 for line in lines[1:])
        assert runs[students[0], 0]["bound_before"] != runs[students[0], 1]["bound_before"]


def test_differences_are_those_to_the_control_of_the_pipeline(done):
    _, record, _ = done
    found = {name: part["differences"] for name, part in record["results"]["pipelines"].items()}
    pairs = {
        name: {(line["arm"], line["minus"]) for line in lines} for name, lines in found.items()
    }
    assert pairs["shared"] == {(arm, "ce") for arm in SHARED if arm != "ce"}
    assert pairs["cross"] == {
        (arm, control) for control in CROSS[:2] for arm in CROSS[1:] if arm != control
    }
    for name, (arm, control) in (
        ("shared", ("tidal_comp_demo", "ce")), ("cross", ("reverse_calm", "ce_chunks"))
    ):  # fmt: skip
        runs = runs_of(record, name)
        gaps = [runs[arm, seed]["bound"]["mean"] - runs[control, seed]["bound"]["mean"]
                for seed in (0, 1)]  # fmt: skip
        (line,) = [
            line for line in found[name]
            if (line["arm"], line["minus"], line["measure"]) == (arm, control, "bound")
        ]  # fmt: skip
        assert [seed["difference"] for seed in line["seeds"]] == pytest.approx(gaps)
        assert line["mean"] == pytest.approx(statistics.fmean(gaps))
        low, high = line["interval"]
        assert high - low == pytest.approx(12.706 * abs(gaps[0] - gaps[1]))


def test_the_teacher_is_made_by_mdm_and_measured_on_the_students_masks(done):
    place, record, _ = done
    folder = folder_of(place / "runs", "teacher")
    teacher = record["results"]["teacher"]
    trained = json.loads((folder / "record.jsonl").read_text())
    assert trained["kind"] == "train"
    assert teacher["bound"]["mean"] == trained["results"]["after"]["nelbo"]
    assert teacher["bound"]["std_err"] == trained["results"]["after"]["nelbo_std_err"]
    assert teacher["bound_before"] == trained["results"]["before"]["nelbo"]
    assert teacher["steps"] == 3
    assert teacher["weights"] == record["checkpoint"] == weights_hash(folder / "final")
    settings = trained["settings"]
    assert settings["target"]["kind"] == "left"
    assert settings["objective"]["kd_lambda"] == 0.5
    assert settings["train"]["seed"] not in (0, 1)
    denoiser = load_denoiser(folder / "final")
    assert (denoiser.block_size, denoiser.model.config.num_hidden_layers) == (4, 2)
    runs = runs_of(record, "shared")
    assert runs["teacher", 0]["bound"] != runs["teacher", 1]["bound"]
    # The same rows and masks as a student's: by hand, from what lies there.
    recipe = arms_of.recipe_of(small(place), "ce", 1)
    rows = rows_for(place, denoiser.vocab).held_out
    with torch.no_grad():
        found = bench.held_out_bound(denoiser, rows, num_rows=4, draws=2, batch_rows=4, seed=1)
    assert recipe.train.eval_draws == 2
    assert runs["teacher", 1]["bound"]["mean"] == pytest.approx(found.summary()["nelbo"])


def test_the_rows_of_a_pipeline_are_the_same_whoever_reads_them(done):
    """Those of the control and those that the teacher reads; and some chunks are several tokens."""
    place, record, _ = done
    (folder,) = (place / "runs").glob("first-cross-????????")
    vocab = load_denoiser(folder / "final").vocab
    own, read = (rows_for(place, vocab, name) for name in ("rows", "chunks"))
    assert len(own.train) == len(read.train)
    assert len(own.held_out) == len(read.held_out)
    for ours, theirs in ((own.train, read.train), (own.held_out, read.held_out)):
        everything = range(len(ours))
        assert torch.equal(ours.batch(everything).tokens_BL, theirs.batch(everything).tokens_BL)
    assert own.readings is None
    reading = read.readings.batch(range(4))
    chunk_BL = chunks(reading, read.train.batch(range(4)).document_ids_BL)[0]
    assert chunk_BL[chunk_BL >= 0].unique(return_counts=True)[1].max() > 1
    pipelines = record["results"]["pipelines"]
    assert pipelines["shared"]["bytes_per_token"] > pipelines["cross"]["bytes_per_token"] > 1


def test_what_is_left_in_the_folder(done):
    place, _, said = done
    runs = place / "runs"
    assert [text.split("-")[0] for text in said[:5]] == [
        "tokenizer of the students: 270 tokens", "teacher", "first", "first", "1/16 teacher"
    ]  # fmt: skip
    assert said[1].endswith(": 3 steps …")
    assert said[2].endswith(": 1 steps …")
    assert said[-1].startswith("16/16 calm_tidal-seed1-")
    kept = {path.name for path in folder_of(runs, "ce-seed0").iterdir()}
    assert {"record.jsonl", "recipe.yaml", "metrics.jsonl"} <= kept
    assert not kept & {"data", "final", "checkpoints"}
    teacher = folder_of(runs, "teacher")
    kept = {path.name for path in teacher.iterdir()}
    assert "final" in kept
    assert not kept & {"data", "checkpoints"}
    for name, weights in (("teacher-seed0", True), ("ce-seed0", False)):
        line = json.loads(
            folder_of(runs, name).joinpath("record.jsonl").read_text().splitlines()[-1]
        )
        assert (line["checkpoint"] == weights_hash(teacher / "final")) == weights
        assert line["seed"] == 0


def test_weights_can_be_kept(done, tmp_path):
    place, _, _ = done
    settings = small(place, arms=("ce",), seeds=(0,))
    for name in ("teacher", "first-shared"):
        made = folder_of(place / "runs", name)
        shutil.copytree(made, tmp_path / made.name)
    bench.run(settings, tmp_path, tmp_path / "x", lambda text: None, keep=True)
    assert load_denoiser(folder_of(tmp_path, "ce-seed0") / "final").block_size == 4


def test_the_record_says_how_it_came_about(done):
    place, record, _ = done
    (line,) = (place / "tide.jsonl").read_text().splitlines()
    assert json.loads(line) == plain(record)
    assert "units" not in line  # the rows stay with the runs
    settings = record["settings"]
    assert {k: v for k, v in settings.items() if k != "recipes"} == asdict(small(place))
    recipes = settings["recipes"]
    assert [*recipes] == ["all", "teacher", *(arm for arm in (*SHARED, *CROSS) if arm != "teacher")]
    assert "student.block_size=4" in recipes["all"]
    assert "train.steps=3" in recipes["teacher"]
    assert {"objective.noise=block", "target.comp_demo=bernoulli"} <= {*recipes["tidal_comp_demo"]}
    assert str(place) not in json.dumps(recipes)


# --- restarts ------------------------------------------------------------------------------------


def test_finished_runs_are_not_repeated(done, tmp_path, monkeypatch):
    place, record, _ = done
    monkeypatch.setattr(bench, "train", refuse)
    monkeypatch.setattr(bench, "train_tokenizer", refuse)
    said = []
    again = bench.run(small(place), place / "runs", tmp_path / "again.jsonl", said.append)
    assert plain(again["results"]) == plain(record["results"])
    assert not said
    some = small(place, arms=("tidal_normalised",))
    less = bench.run(some, place / "runs", tmp_path / "again.jsonl", said.append)
    assert [*less["results"]["pipelines"]] == ["shared"]
    assert {arm for arm, _ in runs_of(less, "shared")} == {"teacher", "ce", "tidal_normalised"}
    some = small(place, arms=("calm_tidal",))
    less = bench.run(some, place / "runs", tmp_path / "again.jsonl", said.append)
    assert {arm for arm, _ in runs_of(less, "shared")} == {"teacher", "ce"}
    assert {arm for arm, _ in runs_of(less, "cross")} == {"ce_cross", "ce_chunks", "calm_tidal"}
    assert not said
    with pytest.raises(AssertionError, match="trained again"):
        bench.run(small(place, seeds=(0, 2)), copied(place, tmp_path), tmp_path / "x", said.append)
    assert [text.rpartition("-")[0] for text in said] == ["9/16 teacher-seed2", "10/16 ce-seed2"]


def test_a_stopped_study_goes_on_where_it_was(done, tmp_path, monkeypatch):
    """After the teacher and one student; what follows has the numbers of an unbroken study."""
    place, record, _ = done
    settings = small(place, arms=("tidal_normalised",), seeds=(1,))
    whole, trained = bench.train, []

    def stopped(recipe, folder):
        trained.append(recipe.name.rpartition("-")[0])
        if trained.count("tidal_normalised-seed1") == 1 and trained[-1] != "ce-seed1":
            raise KeyboardInterrupt
        return whole(recipe, folder)

    monkeypatch.setattr(bench, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench.run(settings, tmp_path / "runs", tmp_path / "x", lambda text: None)
    found = bench.run(settings, tmp_path / "runs", tmp_path / "x", lambda text: None)
    assert trained == [
        "teacher", "first-shared", "ce-seed1", "tidal_normalised-seed1", "tidal_normalised-seed1"
    ]  # fmt: skip
    for arm in ("teacher", "ce", "tidal_normalised"):
        mine, theirs = runs_of(found, "shared")[arm, 1], runs_of(record, "shared")[arm, 1]
        assert mine["bound"] == theirs["bound"]


def test_a_stopped_teacher_goes_on(done, tmp_path, monkeypatch):
    """From its checkpoint if it has one, from the start if its end was not recorded."""
    place, record, _ = done
    whole, save, tokens = bench.train, trainer.save, []

    def stop(run, step):
        save(run, step)
        raise KeyboardInterrupt

    def counted(recipe, folder):
        outcome = whole(recipe, folder)
        tokens.append(outcome.tokens)
        return outcome

    monkeypatch.setattr(arms_of, "TEACHER_SAVED", 2)
    monkeypatch.setattr(bench, "train", counted)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            bench.trained(arms_of.teacher_recipe(small(place)), tmp_path, lambda text: None)
    with monkeypatch.context() as patch:
        patch.setattr(bench, "clean", lambda folder, *parts: None)  # its checkpoint stays
        found = bench.trained(arms_of.teacher_recipe(small(place)), tmp_path, lambda text: None)
    assert (found.folder / "checkpoints").exists()
    usual = record["results"]["teacher"]
    assert found.numbers == usual
    (found.folder / "record.jsonl").write_text('{"kind": "tr')
    again = bench.trained(arms_of.teacher_recipe(small(place)), tmp_path, lambda text: None)
    assert again.numbers["weights"] == usual["weights"]
    assert 0 < tokens[0] < tokens[1]


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"steps": 3}, "ce-seed0"),  # the teacher is measured already
        ({"holes": 4}, "teacher-seed0"),
        ({"weight": "mean_masked"}, "first-shared"),
        ({"arms": ("ce_cross",), "tokens": 280}, "first-cross"),
        ({"teacher_steps": 4}, "teacher"),
        ({"first_steps": 2}, "first-shared"),
        ({"first_steps": 0}, "ce-seed0"),
        ({"assignments": ()}, "teacher"),
    ],
)
def test_runs_with_other_settings_are_not_taken_for_these(
    done, tmp_path, monkeypatch, change, again
):
    place, _, _ = done
    monkeypatch.setattr(bench, "train", refuse)
    monkeypatch.setattr(bench, "measured", refuse)
    monkeypatch.setattr(bench, "train_tokenizer", lambda texts, size, folder: shutil.copytree(
        place / "ar", folder
    ))  # fmt: skip
    said = []
    with pytest.raises(AssertionError, match="trained again"):
        bench.run(small(place, **change), copied(place, tmp_path), tmp_path / "x", said.append)
    assert said[-1].rpartition("-")[0].split()[-1] == again


# --- the page ------------------------------------------------------------------------------------


def line(arm, minus, measure, mean, interval):
    return {"arm": arm, "minus": minus, "measure": measure, "mean": mean, "interval": interval}


def made_up(seeds=2):
    def a_run(arm, seed, bound):
        exact = {f"exact_{n}": {"mean": 0.5 / n, "std_err": 0.1} for n in (1, 2, 3)}
        return {"arm": arm, "seed": seed, "bound": {"mean": bound, "std_err": 0.2}, **exact,
                "steps": 10, "seconds": 25.0, "teacher_seconds": 5.0}  # fmt: skip

    gap = None if seeds < 2 else [-0.3, 0.1]
    measures = ("bound", "accuracy_low", "exact_1", "exact_2", "exact_3")
    return {
        "kind": "bench tide",
        "settings": {**asdict(arms_of.TideBench()), "seeds": [*range(seeds)]},
        "results": {
            "first": {
                "shared": {
                    "weights": "x",
                    "steps": 40,
                    "bound_before": 15.0,
                    "bound": {"mean": 7.25, "std_err": 0.5},
                }
            },
            "teacher": {
                "bound": {"mean": 2.5, "std_err": 0.04},
                "bound_before": 4.25,
                "steps": 100,
            },
            "pipelines": {
                "shared": {
                    "bytes_per_token": 4.0,
                    "runs": [
                        a_run(arm, seed, bound + seed)
                        for seed in range(seeds)
                        for arm, bound in (("ce", 3.0), ("kl", 2.9))
                    ],
                    "differences": [line("kl", "ce", name, -0.1, gap) for name in measures],
                },
                "cross": {
                    "bytes_per_token": 3.0,
                    "runs": [a_run("ce_cross", seed, 3.0) for seed in range(seeds)],
                    "differences": [],
                },
            },
        },
    }


def test_the_page():
    text = report.page(made_up())
    lines = text.splitlines()
    assert "2.500 ± 0.040" in text
    assert "4.250 before" in text
    assert "blocks of 8, 40 steps of 4 × 128 tokens" in text
    assert "| `kl` | 3.400 | 0.850 | 50.0% / 25.0% / 16.7% | 2.50 | 0.50 |" in lines
    percent = "-10.0% (-30.0% … +10.0%)"
    assert f"| `kl` | `ce` | -0.100 (-0.300 … +0.100) | {' | '.join([percent] * 3)} |" in lines
    assert "| `ce_cross` | 3.000 | 1.000 |" in text
    assert "| – |" not in text
    assert text.count("| arm | minus |") == 1  # nothing to compare in the second pipeline
    assert "What an arm owes to its teacher is its difference to `ce_chunks`" in text
    assert [part for part in lines if part.startswith("### ")] == [
        f"### {title}" for title in report.TITLES.values()
    ]


def test_a_row_for_each_control():
    record = made_up()
    cross = record["results"]["pipelines"]["cross"]
    cross["runs"] += [{**run, "arm": "forward_calm"} for run in cross["runs"]]
    cross["differences"] = [
        line("forward_calm", control, name, gap, None)
        for control, gap in (("ce_cross", -0.5), ("ce_chunks", 0.25))
        for name in ("bound", "exact_1", "exact_2", "exact_3")
    ]
    text = report.page(record)
    assert "| `forward_calm` | `ce_cross` | -0.500 | -50.0% |" in text
    assert "| `forward_calm` | `ce_chunks` | +0.250 | +25.0% |" in text


def test_one_seed_has_no_interval():
    text = report.page(made_up(seeds=1))
    assert "| `kl` | `ce` | -0.100 | -10.0% | -10.0% | -10.0% |" in text
    assert "there is one seed" in text
    assert "1 seed," in text
    assert "one seed)" not in report.page(made_up())


@pytest.mark.parametrize(
    ("interval", "sure"), [([-0.4, -0.1], True), ([-0.4, 0.1], False), (None, False)]
)
def test_a_teacher_that_may_be_no_better_is_named(interval, sure):
    record = made_up()
    differences = record["results"]["pipelines"]["shared"]["differences"]
    doubt = "not shown to be better than the control"
    assert doubt not in report.page(record)  # there is none
    differences += [line("teacher", "ce", name, -0.2, interval) for name in ("exact_1", "bound")]
    assert (doubt in report.page(record)) != sure


def test_every_table_has_as_many_cells_in_each_row(done):
    _, record, _ = done
    text = report.describe(record)
    *page, last = text.splitlines()
    assert json.loads(last) == plain(record)
    tables = "\n".join(page).split("\n\n")
    widths = [
        {row.count("|") for row in table.splitlines()} for table in tables if table[:1] == "|"
    ]
    assert widths == [{7}] * 4


# --- the command ---------------------------------------------------------------------------------


def test_the_command(done, tmp_path):
    """All is there already: it reads, and prints the page."""
    place, record, _ = done
    options = {
        "arms": ",".join(ARMS), "seeds": "0, 1", "steps": 2, "teacher-steps": 3, "layers": 1,
        "first-steps": 1,
        "block": 4, "length": 80, "rows": 4, "holes": 3, "tokens": 270, "documents": 20,
        "weight": "bound", "recipe": place / "tiny.yaml", "set": "train.eval_rows=4",
        "runs": place / "runs", "record": tmp_path / "r.jsonl", "table": tmp_path / "page.md",
    }  # fmt: skip
    arguments = ["tide", *(str(part) for k, v in options.items() for part in (f"--{k}", v))]
    result = CliRunner().invoke(commands, arguments, catch_exceptions=False)
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["results"] == plain(record["results"])
    assert json.loads((tmp_path / "r.jsonl").read_text()) == found
    page = (tmp_path / "page.md").read_text()
    assert page == report.page(record) + "\n"
    assert page in result.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--arms", "tidl"], "did you mean 'tidal'"),
        (["--seeds", "1,1"], "differ"),
        (["--seeds", ","], "at least one seed"),
        (["--holes", "1"], "holes must be >= 2"),
        (["--steps", "0"], "steps must be >= 1"),
        (["--weight", "bond"], "did you mean 'bound'"),
        (["--set", "target.kund=left"], "target.kind"),
        (["--layers", "3"], "student.layers is 3"),
    ],
)
def test_bad_input_is_named(arguments, named, place, tmp_path):
    where = ["--runs", str(tmp_path / "runs"), "--record", str(tmp_path / "r.jsonl")]
    usual = ["--recipe", str(place / "tiny.yaml"), "--length", "80", "--teacher-steps", "1"]
    with pytest.raises(ConfigError, match=named):
        CliRunner().invoke(commands, ["tide", *usual, *arguments, *where], catch_exceptions=False)


def test_seeds_are_numbers():
    result = CliRunner().invoke(commands, ["tide", "--seeds", "0,a"])
    assert "must be whole numbers like 0,1,2; got '0,a'" in result.output


def test_layers_0_is_all_of_them(tmp_path, monkeypatch):
    seen = []

    def note(settings, *_rest, **_options):
        seen.append(settings)
        raise ConfigError("enough")

    monkeypatch.setattr(bench, "run", note)
    for layers in ("0", "3"):
        CliRunner().invoke(commands, ["tide", "--layers", layers])
    assert [settings.layers for settings in seen] == [None, 3]
    assert seen[0] == replace(arms_of.TideBench(), layers=None)
