"""lm-eval runs the tasks; here is what comes out of them in our form, with scripted models."""

import io
import math
import types

import pytest
import tiny_eval
import yaml
from lm_eval.api.registry import get_model
from tiny_eval import HUMAN, MBPP, Scripted, data_of, write_rows

from mdm.canvas import SamplerSettings
from mdm.errors import ConfigError, DataError
from mdm.eval import harness
from mdm.eval.code_eval import METRIC
from mdm.eval.metrics import ratio_std_err, wilson_interval
from mdm.eval.models import model_settings
from mdm.eval.run import EvalSettings
from mdm.eval.tasks import load_tasks, parse_data
from mdm.eval.with_lm_eval import _WithoutBars, group_of, require_examples, with_lm_eval


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    tiny_eval.no_network(monkeypatch)
    METRIC.verdicts.clear()


def evaluate(answers, task, data, *, include_path=None, overrides=None, native=None, **settings):
    """{task: outcome} and lm-eval's own results of one task or group."""
    loaded = load_tasks([task], data, include_path=include_path, overrides=overrides)
    settings = EvalSettings(tasks=(task,), **settings)
    found, details = with_lm_eval(answers, settings, *loaded, native or {})
    return {outcome.task: outcome for outcome in found}, details


def human_solution(prompt):
    return next(row["canonical_solution"] for row in HUMAN if row["prompt"].strip() in prompt)


def mbpp_solution(prompt):
    return next(row["code"] for row in MBPP if row["text"] in prompt) + "\n[DONE] and more"


SOLVE = {"humaneval": human_solution, "mbpp": mbpp_solution}
WRONG = {"humaneval": "    return None\n", "mbpp": "return None"}


# --- code ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["humaneval", "mbpp"])
def test_right_programs_pass_and_others_do_not(task, tmp_path):
    data = data_of(task, tmp_path)
    right = Scripted(lambda prompt, hole: SOLVE[task](prompt)).remembering()
    outcomes, details = evaluate(right, task, data)
    score = outcomes[task].scores["pass@1"]
    assert list(outcomes[task].scores) == ["pass@1"]
    assert (score.value, score.n, score.std_err, score.mc_std_err) == (1.0, 3, 0.0, None)
    assert score.interval == wilson_interval(3, 3)
    theirs = details["results"][task]
    (name,) = (key for key in theirs if key.startswith("pass") and "stderr" not in key)
    assert theirs[name] == score.value  # lm-eval's own number
    wrong = Scripted(lambda prompt, hole: WRONG[task]).remembering()
    outcomes, details = evaluate(wrong, task, data)
    assert outcomes[task].scores["pass@1"].value == 0.0
    assert outcomes[task].scores["pass@1"].interval == wilson_interval(0, 3)


@pytest.mark.parametrize("task", ["humaneval", "mbpp"])
def test_pass_at_k_counts_every_sample(task, tmp_path):
    """The first problem is solved by the last of three samples, the second by all, the third by none."""
    solved = {"add0": [2], "add1": [0, 1, 2], "add2": []}
    solved |= {"by 11.": [2], "by 12.": [0, 1, 2], "by 13.": []}

    def write(prompt, hole):
        own = next(name for name in solved if name in prompt.split("Write a function")[-1])
        return SOLVE[task](prompt) if hole.key[-1] in solved[own] else WRONG[task]

    model = Scripted(write)
    outcomes, _ = evaluate(
        model.remembering(), task, data_of(task, tmp_path), samples=3, temperature=1.0
    )
    assert model.asked == 9
    outcome = outcomes[task]
    values = {name: score.value for name, score in outcome.scores.items()}
    assert values == {
        "pass@1": pytest.approx((1 / 3 + 1 + 0) / 3),
        "pass@2": pytest.approx((2 / 3 + 1 + 0) / 3),
        "pass@3": pytest.approx(2 / 3),
    }
    spread = [1 / 3, 1, 0]
    mean = sum(spread) / 3
    error = math.sqrt(sum((x - mean) ** 2 for x in spread) / 2 / 3)
    assert outcome.scores["pass@1"].std_err == pytest.approx(error)
    assert outcome.scores["pass@1"].interval is None  # values between 0 and 1
    assert outcome.scores["pass@3"].interval == wilson_interval(2, 3)
    assert outcome.settings["repeats"] == 3
    first = outcome.samples[0]
    assert first["passed"] == [False, False, True]
    assert first["reasons"][2] == "passed"
    assert first["reasons"][0] != "passed"
    assert len(first["outputs"]) == 3
    assert first["metrics"] == {
        "pass@1": pytest.approx(1 / 3),
        "pass@2": pytest.approx(2 / 3),
        "pass@3": 1.0,
    }


@pytest.mark.parametrize(("shots", "ignored"), [(None, []), (0, []), (2, ["humaneval"])])
def test_examples_that_lm_eval_does_not_give_are_named(shots, ignored, tmp_path):
    model = Scripted(lambda prompt, hole: human_solution(prompt)).remembering()
    data = data_of("humaneval", tmp_path)
    _, details = evaluate(model, "humaneval", data, num_fewshot=shots)
    assert details["num_fewshot_ignored"] == ignored
    assert not {"custom_dataset", "dataset_kwargs"} & set(details["configs"]["humaneval"])


def test_what_is_kept_of_a_code_item(tmp_path):
    model = Scripted(lambda prompt, hole: human_solution(prompt) + "\ndef more(): ...")
    outcomes, _ = evaluate(model.remembering(), "humaneval", data_of("humaneval", tmp_path))
    samples = outcomes["humaneval"].samples
    assert [sample["id"] for sample in samples] == ["Own/0", "Own/1", "Own/2"]
    assert len({sample["doc_hash"] for sample in samples}) == 3
    sample = samples[1]
    assert sample["task"] == "humaneval"
    assert sample["outputs"] == ["    return x + 1\n"]  # up to the stop string
    assert sample["completions"] == sample["outputs"]
    assert sample["filtered"] == {"create_test": [[HUMAN[1]["prompt"] + "    return x + 1\n"]]}
    assert sample["target"].endswith("check(add1)")
    assert sample["arguments"][0][0] == HUMAN[1]["prompt"]
    assert sample["arguments"][0][1]["max_gen_toks"] == 1024
    settings = outcomes["humaneval"].settings
    assert (settings["version"], settings["num_fewshot"]) == (1.0, 0)
    assert settings["items"] == {"original": 3, "effective": 3}
    assert settings["generation_kwargs"]["until"][0] == "\nclass"


def test_an_mbpp_program_has_no_completion(tmp_path):
    model = Scripted(lambda prompt, hole: mbpp_solution(prompt))
    outcomes, _ = evaluate(model.remembering(), "mbpp", data_of("mbpp", tmp_path))
    sample = outcomes["mbpp"].samples[0]
    assert "completions" not in sample
    assert sample["outputs"] == [MBPP[0]["code"] + "\n"]
    assert sample["id"] == "11"
    # Three of lm-eval's own examples come first, then the task.
    assert sample["arguments"][0][0].count("[BEGIN]") == 4


def test_sampling_settings_reach_the_requests(tmp_path):
    seen = []
    model = Scripted(lambda prompt, hole: "")
    answers = model.remembering()
    complete = answers.complete
    answers.complete = lambda requests: seen.extend(requests) or complete(requests)
    evaluate(answers, "humaneval", data_of("humaneval", tmp_path), temperature=0.6, top_p=0.8)
    assert {(item.temperature, item.top_p) for item in seen} == {(0.6, 0.8)}
    seen.clear()
    evaluate(answers, "humaneval", data_of("humaneval", tmp_path), limit=1, temperature=0.0)
    assert {(item.temperature, item.top_p) for item in seen} == {(0.0, 1.0)}
    seen.clear()
    evaluate(answers, "humaneval_64", data_of("humaneval_64", tmp_path), limit=1)
    assert {(item.temperature, item.top_p) for item in seen} == {(0.2, 0.95)}  # its own
    assert len(seen) == 2 * 64  # once to collect the programs, once with their verdicts known


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        ("threshold=0.9,remasking=margin", {"threshold": 0.9, "remasking": "margin"}),
        ("factor=1", {"factor": 1.0}),
        ("entropy_bound=5e-1,remasking=entropy", {"entropy_bound": 0.5, "remasking": "entropy"}),
        ("cache=prefix", {"cache": "prefix"}),
        ("cache=dual,refresh=4,factor=0.5", {"cache": "dual", "refresh": 4, "factor": 0.5}),
    ],
)
def test_model_args_reach_the_sampler(monkeypatch, arguments, values):
    seen = []

    def open_evaluated(source, settings, device):
        seen.append((source, settings))
        return tiny_eval.evaluated(settings=settings)

    monkeypatch.setattr(harness, "open_evaluated", open_evaluated)
    get_model("mdm").create_from_arg_string(f"model=some/model,{arguments}", {})
    assert seen == [("some/model", model_settings(**values))]
    assert seen[0][1].sampler == SamplerSettings(**values)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("factor=1,threshold=0.9", "threshold and factor are rules that exclude each other"),
        ("factor=1,steps=8", "factor decides how many steps"),
        ("entropy_bound=1", "entropy_bound needs another confidence"),
        ("factor=inf", "factor must be > 0; got inf"),
        ("refresh=4", "refresh=4 is for an approximate cache"),
        ("cache=prefx", "did you mean 'prefix'"),
    ],
)
def test_wrong_model_args_are_refused_before_a_model_is_loaded(arguments, text):
    with pytest.raises(ConfigError, match=text):
        get_model("mdm").create_from_arg_string(f"model=nowhere,{arguments}", {})


def test_an_unknown_argument_of_a_task_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="unknown generation argument 'top_k'"):
        evaluate(
            Scripted(lambda prompt, hole: "").remembering(),
            "humaneval",
            data_of("humaneval", tmp_path),
            native={"gen_kwargs": {"top_k": 3}},
        )


# --- other metrics -------------------------------------------------------------------------------


def test_labels_name_the_filter_where_there_are_several(tmp_path):
    model = Scripted(lambda prompt, hole: f"#### {prompt.rsplit('Question: ', 1)[1][0]} 7")
    outcomes, _ = evaluate(model.remembering(), "gsm8k", data_of("gsm8k", tmp_path))
    scores = outcomes["gsm8k"].scores
    assert list(scores) == ["exact_match (strict-match)", "exact_match (flexible-extract)"]
    assert scores["exact_match (strict-match)"].value == 0.0
    sample = outcomes["gsm8k"].samples[0]
    assert sample["id"] == "0"
    assert sample["metrics"].keys() == scores.keys()
    assert sample["filtered"] == {"strict-match": ["0"], "flexible-extract": ["7"]}
    assert outcomes["gsm8k"].settings["num_fewshot"] == 5
    outcomes, _ = evaluate(model.remembering(), "gsm8k", data_of("gsm8k", tmp_path), num_fewshot=0)
    assert outcomes["gsm8k"].settings["num_fewshot"] == 0


def test_a_right_answer_counts(tmp_path):
    model = Scripted(lambda prompt, hole: f"#### {int(prompt.rsplit('Question: ', 1)[1][0]) + 1}")
    outcomes, _ = evaluate(model.remembering(), "gsm8k", data_of("gsm8k", tmp_path), limit=2)
    score = outcomes["gsm8k"].scores["exact_match (strict-match)"]
    assert (score.value, score.n, score.interval) == (1.0, 2, wilson_interval(2, 2))


@pytest.mark.parametrize("teacher", [False, True])
def test_multiple_choice(tmp_path, teacher):
    model = tiny_eval.teacher() if teacher else tiny_eval.student()
    answers = tiny_eval.answers(model, mc_samples=16)
    outcomes, _ = evaluate(answers, "hellaswag", data_of("hellaswag", tmp_path))
    outcome = outcomes["hellaswag"]
    assert list(outcome.scores) == ["acc", "acc_norm"]
    for name, score in outcome.scores.items():
        values = [sample["metrics"][name] for sample in outcome.samples]
        assert score.value == pytest.approx(sum(values) / 3)
        assert score.n == 3
        assert score.interval == wilson_interval(sum(values), 3)
        assert (score.mc_std_err is None) == teacher
    sample = outcome.samples[2]
    values = [value for ((value, greedy),) in sample["outputs"]]
    assert sample["metrics"]["acc"] == float(values.index(max(values)) == 2)
    assert sample["arguments"][3] == ["Pets: A dog 2 It", " sings."]


def test_an_item_counts_once_whatever_the_filters(tmp_path):
    answers = tiny_eval.answers(mc_samples=16)
    data = data_of("hellaswag", tmp_path)
    filters = [{"name": name, "filter": [{"function": "take_first"}]} for name in ("a", "b")]
    changes = {"hellaswag": {"filter_list": filters}}
    one, _ = evaluate(answers, "hellaswag", data)
    two, _ = evaluate(answers, "hellaswag", data, overrides=changes)
    score = one["hellaswag"].scores["acc"]
    assert score.mc_std_err > 0
    assert two["hellaswag"].scores["acc (a)"] == two["hellaswag"].scores["acc (b)"] == score


def rolling_task(folder):
    config = {
        "task": "own_texts",
        "dataset_path": "nobody/own",
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
        ],
    }
    folder.mkdir()
    (folder / "own.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def test_perplexities(tmp_path):
    texts = ["def f(x):\n    return x\n", "a b c", "import os, sys\n" * 3]
    rolling_task(tmp_path / "own")
    path = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    data = [parse_data(f"own_texts={path}")]
    answers = tiny_eval.answers(mc_samples=64)
    outcomes, _ = evaluate(answers, "own_texts", data, include_path=str(tmp_path / "own"))
    scores = outcomes["own_texts"].scores
    totals = [result["value"] for result in answers.responses.known.values()]
    sizes = [len(text.encode()) for text in texts]
    assert len(totals) == 3
    value = math.exp(-sum(totals) / sum(sizes))
    assert scores["byte_perplexity"].value == pytest.approx(value)
    assert scores["bits_per_byte"].value == pytest.approx(math.log2(value))
    own = [sample["outputs"] for sample in outcomes["own_texts"].samples]
    values = [row[0] for row in own]
    error = ratio_std_err(values, sizes)
    assert scores["bits_per_byte"].std_err == pytest.approx(error / math.log(2))
    assert scores["byte_perplexity"].std_err == pytest.approx(value * error)
    assert 0 < scores["bits_per_byte"].mc_std_err < scores["bits_per_byte"].std_err
    assert scores["bits_per_byte"].interval is None


# --- groups --------------------------------------------------------------------------------------


def test_a_group_is_the_weighted_mean_of_its_tasks(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    for name in ("own_a", "own_b"):
        config = {
            "task": name,
            "dataset_path": "nobody/own",
            "dataset_name": name,
            "output_type": "generate_until",
            "test_split": "test",
            "doc_to_text": "{{q}}",
            "doc_to_target": "yes",
            "generation_kwargs": {"until": ["\n"]},
            "metric_list": [
                {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
            ],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    group = {
        "group": "own_group",
        "task": ["own_a", "own_b"],
        "aggregate_metric_list": [{"metric": "exact_match", "weight_by_size": True}],
    }
    (folder / "group.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    subsets = tmp_path / "subsets"
    subsets.mkdir()
    write_rows(subsets / "own_a.jsonl", [{"q": "yes"}])
    write_rows(subsets / "own_b.jsonl", [{"q": "yes"}, {"q": "no"}, {"q": "no"}])
    model = Scripted(lambda prompt, hole: prompt)
    data = [parse_data(f"own_group={subsets}")]
    outcomes, _ = evaluate(model.remembering(), "own_group", data, include_path=str(folder))
    assert list(outcomes) == ["own_a", "own_b", "own_group"]
    values = {name: outcome.scores["exact_match"].value for name, outcome in outcomes.items()}
    assert values == {"own_a": 1.0, "own_b": pytest.approx(1 / 3), "own_group": 0.5}
    whole = outcomes["own_group"]
    assert whole.scores["exact_match"].n == 4
    assert whole.samples == []
    assert whole.settings == {"group": True}


def test_the_error_of_a_group():
    values = {"alias": "x", "acc,none": 0.25, "acc_stderr,none": 0.1, "sample_len": 8}
    score = group_of("g", {"groups": {"g": values}}).scores["acc"]
    assert (score.value, score.n, score.std_err) == (0.25, 8, 0.1)
    values["acc_stderr,none"] = "N/A"
    assert group_of("g", {"groups": {"g": values}}).scores["acc"].std_err is None


# --- examples in the prompt ----------------------------------------------------------------------


def test_too_few_examples_are_an_error_before_anything_runs(tmp_path):
    model = Scripted(lambda prompt, hole: "")
    data = data_of("gsm8k", tmp_path)
    message = (
        r"gsm8k puts 5 examples into each prompt, but there are 0.*gsm8k:train=FILE.jsonl.* 0$"
    )
    with pytest.raises(DataError, match=message):
        evaluate(model.remembering(), "gsm8k", data[:1])
    with pytest.raises(DataError, match=r"puts 7 .* there are 5 of them; .*--num-fewshot 5$"):
        evaluate(model.remembering(), "gsm8k", data, num_fewshot=7)
    assert model.asked == 0
    evaluate(model.remembering(), "gsm8k", data[:1], num_fewshot=0)
    assert model.asked == 3


def test_tasks_that_need_no_examples():
    def task(own, pool):
        return types.SimpleNamespace(
            get_config=lambda key: own,
            sampler=types.SimpleNamespace(df=pool),
            config=types.SimpleNamespace(fewshot_split="dev", training_split="train"),
        )

    for own, pool, asked in ((None, [], None), (0, [], 5), (3, [1, 2, 3], None), (5, [], 0)):
        require_examples("t", task(own, pool), asked)
    require_examples("t", types.SimpleNamespace(get_config=lambda key: 2), None)
    with pytest.raises(DataError, match="t:dev=FILE"):
        require_examples("t", task(None, [1]), 2)


# --- chat ----------------------------------------------------------------------------------------


def test_the_chat_template_and_a_begun_answer(tmp_path):
    holes = []
    model = Scripted(lambda prompt, hole: holes.append(hole) or "")
    data = data_of("humaneval_instruct", tmp_path)
    settings = {"chat": True, "system": "Be brief.", "limit": 1}
    outcomes, _ = evaluate(model.remembering(), "humaneval_instruct", data, **settings)
    text = model.vocab.decode(holes[0].before, keep_special=True)
    assert text.startswith("<|start|>system\nBe brief.<|end|><|start|>user\nWrite a solution")
    assert text.rstrip().endswith(HUMAN[0]["prompt"].rstrip())
    assert text.count("<|end|>") == 2  # the assistant's message is open
    assert "<|start|>assistant\nHere is the completed function" in text
    sample = outcomes["humaneval_instruct"].samples[0]
    assert sample["arguments"][0][0].endswith(text[-40:])


def test_prompts_cut_inside_a_token_are_counted(tmp_path):
    model = Scripted(lambda prompt, hole: "", joins=True)
    _, details = evaluate(model.remembering(), "humaneval", data_of("humaneval", tmp_path))
    assert details["prompts_cut_inside_a_token"] == {"humaneval": 3}


def test_truncated_prompts_are_counted(tmp_path):
    model = Scripted(lambda prompt, hole: "", max_length=40)
    data = data_of("gsm8k", tmp_path)
    _, details = evaluate(model.remembering(), "gsm8k", data, limit=2)
    assert details["truncated_prompts"] == {"gsm8k": 2}
    assert details["prompts_cut_inside_a_token"] == {}
    assert "samples" not in details
    assert details["config"]["weights"] == "script"


# --- what is on the screen -----------------------------------------------------------------------


def test_progress_bars_are_left_out_and_lines_are_not(tmp_path, capsys):
    stream = io.StringIO()
    out = _WithoutBars(stream)
    for text in ("first\n", "\r 10%", "\r 90%", "\n", "second\n", "\n"):
        assert out.write(text) == len(text)
    out.flush()
    assert stream.getvalue() == "first\nsecond\n\n"
    model = Scripted(lambda prompt, hole: "")
    evaluate(model.remembering(), "mmlu_pro_biology", data_of("mmlu_pro_biology", tmp_path))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "complete: 3/3, 0:00, 0:00 left\n"
