"""Two runs side by side: numbers worked out by hand, and nothing compared that is not the same."""

import json
import math

import pytest
import tiny_eval
import yaml

from mdm.errors import DataError
from mdm.eval.compare import UNITS, as_tree, compare, markdown, read_run
from mdm.eval.metrics import Z95, ratio_std_err
from mdm.eval.run import EvalSettings
from mdm.eval.tasks import load_tasks, parse_data
from mdm.eval.with_lm_eval import PERPLEXITIES, _samples, with_lm_eval
from mdm.record import make_record, to_json


def item(number, task="humaneval", doc_hash=None, cluster=None, **metrics):
    row = {"task": task, "id": f"{task}/{number}", "doc_hash": doc_hash or f"h{number}"}
    row["metrics"] = {name.replace("_at_", "@"): value for name, value in metrics.items()}
    return row if cluster is None else {**row, "cluster": cluster}


def folder(path, rows, settings=None, **record):
    """An evaluation folder as eval/run.py writes it."""
    path.mkdir()
    made = make_record("eval", {}, settings=settings or {}, seed=0, checkpoint="abc")
    made["tasks"] = {}
    (path / "results.json").write_text(to_json({**made, **record}), encoding="utf-8")
    for task in {row["task"] for row in rows}:
        lines = [to_json(row) + "\n" for row in rows if row["task"] == task]
        (path / f"samples_{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def run(tmp_path):
    """Makes a run of rows, one after the other named a, b, …"""
    names = iter("abc")
    return lambda rows, *args, **kwargs: read_run(
        folder(tmp_path / next(names), rows, *args, **kwargs)
    )


def passes(values, **kwargs):
    return [item(n, pass_at_1=float(value), **kwargs) for n, value in enumerate(values)]


# --- numbers -------------------------------------------------------------------------------------


def test_a_difference_by_hand(run):
    # b - a: 0 1 1 -1 0 1, mean 1/3, squares about it 4 - 6/9 = 10/3, variance 2/3, error 1/3
    a, b = [1, 0, 0, 1, 0, 0], [1, 1, 1, 0, 0, 1]
    (found,) = compare(run(passes(a)), run(passes(b))).differences
    assert (found.task, found.metric, found.n) == ("humaneval", "pass@1", 6)
    assert (found.mean_a, found.mean_b) == pytest.approx((1 / 3, 2 / 3))
    assert found.difference == pytest.approx(1 / 3)
    assert found.std_err == pytest.approx(1 / 3)
    assert found.interval == pytest.approx((1 / 3 - Z95 / 3, 1 / 3 + Z95 / 3))
    assert (found.only_a, found.only_b) == (1, 3)
    assert found.p_value == pytest.approx(2 * (1 + 4) / 16)  # at most 1 of 4 coins, both sides


def test_a_run_with_itself(run):
    rows = passes([1, 0, 1])
    (found,) = compare(run(rows), run(rows)).differences
    assert (found.difference, found.std_err, found.p_value) == (0.0, 0.0, 1.0)
    assert (found.only_a, found.only_b) == (0, 0)


def test_other_numbers_have_no_mcnemar(run):
    a = [item(n, nll=value) for n, value in enumerate([1.0, 2.5])]
    b = [item(n, nll=value) for n, value in enumerate([2.0, 2.5])]
    (found,) = compare(run(a), run(b)).differences
    assert (found.mean_a, found.mean_b, found.difference) == (1.75, 2.25, 0.5)
    assert found.std_err == pytest.approx(0.5)
    assert found.only_a is found.only_b is found.p_value is None


def test_the_error_of_clustered_items_is_that_of_clusters(run):
    clusters = ["x", "x", "x", "y"]
    a, b = (
        [
            item(n, cluster=c, pass_at_1=v)
            for n, (c, v) in enumerate(zip(clusters, values, strict=True))
        ]
        for values in ([0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0])
    )
    (found,) = compare(run(a), run(b)).differences
    # Differences 1 1 0 | 0, mean 1/2: sums of deviations 1/2 and -1/2; sqrt(2 · 1/2) / 4.
    assert found.std_err == pytest.approx(1 / 4)
    assert (found.only_a, found.only_b) == (0, 2)
    assert found.p_value is None  # the items are not independent


def test_clusters_of_one_are_independent(run):
    a, b = (
        [item(n, cluster=f"c{n}", pass_at_1=v) for n, v in enumerate(values)]
        for values in ([0.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    )
    (found,) = compare(run(a), run(b)).differences
    assert found.std_err == pytest.approx(1 / 3)
    assert found.p_value == 1.0


def test_one_item_has_no_interval(run):
    (found,) = compare(run(passes([0])), run(passes([1]))).differences
    assert math.isnan(found.std_err)
    assert found.interval is None


def test_every_shared_metric_of_every_shared_task(run):
    a = [item(0, "t", acc=1.0, nll=2.0, own=1.0), item(0, "u", acc=0.0)]
    b = [item(0, "t", nll=1.0, acc=0.0), item(0, "u", acc=0.0), item(0, "v", acc=1.0)]
    comparison = compare(run(a), run(b))
    assert [(d.task, d.metric) for d in comparison.differences] == [
        ("t", "acc"), ("t", "nll"), ("u", "acc"),
    ]  # fmt: skip
    assert [(u.task, u.only_a, u.only_b) for u in comparison.unpaired] == [("v", 0, 1)]


def test_an_unknown_value_leaves_its_pair_out(run):
    a = [item(0, nll=math.nan), item(1, nll=1.0), item(2, nll=2.0), item(3, nll=3.0)]
    b = [item(0, nll=9.0), item(1, nll=2.0), item(2, nll=None), item(3, nll=5.0)]
    (found,) = compare(run(a), run(b)).differences
    assert (found.n, found.mean_a, found.mean_b) == (2, 2.0, 3.5)


def test_pairs_are_found_by_id_not_by_place(run):
    rows = passes([1, 0, 0])
    (found,) = compare(run(rows), run(rows[::-1])).differences
    assert (found.n, found.only_a, found.only_b) == (3, 0, 0)


# --- numbers per word and byte -------------------------------------------------------------------


def text(number, *, pairs, task="texts", **metrics):
    return {**item(number, task, **metrics), "pairs": pairs}


def texts(values, lengths=(2, 4, 2), metric="word_perplexity"):
    return [
        text(n, pairs={metric: [value, length]})
        for n, (value, length) in enumerate(zip(values, lengths, strict=True))
    ]


def test_a_difference_per_word_by_hand(run):
    (found,) = compare(run(texts([-6, -8, -2])), run(texts([-4, -6, -2]))).differences
    assert (found.metric, found.n) == ("word_perplexity, as nats per word", 3)
    assert (found.mean_a, found.mean_b, found.difference) == (2.0, 1.5, -0.5)
    # b - a: 2 2 0 = 1/2 a word; beyond it 1 0 -1; sqrt(3/2 · 2) / 8
    assert found.std_err == pytest.approx(math.sqrt(3) / 8)
    assert found.interval == pytest.approx((-0.5 - Z95 * found.std_err, -0.5 + Z95 * found.std_err))
    assert found.only_a is found.only_b is found.p_value is None


def test_bits_per_byte(run):
    a, b = (texts(values, metric="bits_per_byte") for values in ([-6, -8, -2], [-4, -6, -2]))
    comparison = compare(run(a), run(b))
    (found,) = comparison.differences
    assert (found.mean_a, found.mean_b) == pytest.approx((2 / math.log(2), 1.5 / math.log(2)))
    assert found.std_err == pytest.approx(math.sqrt(3) / 8 / math.log(2))
    line = "| texts | bits_per_byte, as bits per byte | 3 | 2.8854 | 2.1640 | -0.7213 ± 0.3124 |"
    assert line in markdown(comparison)


def test_one_text_has_no_interval(run):
    (found,) = compare(run(texts([-6], [2])), run(texts([-4], [2]))).differences
    assert (found.difference, found.interval) == (-1.0, None)
    assert math.isnan(found.std_err)


def test_clusters_of_texts(run):
    a, b = (
        [{**row, "cluster": "xxy"[n]} for n, row in enumerate(texts(values))]
        for values in ([-6, -8, -2], [-4, -6, -2])
    )
    (found,) = compare(run(a), run(b)).differences
    assert found.std_err == pytest.approx(math.sqrt(2 * 2) / 8)  # 1 + 0 | -1


def test_an_unknown_log_likelihood_leaves_its_text_out(run):
    a = texts([math.nan, -8, -2, -1], [2, 4, 2, 1])
    b = texts([-4, -6, -2, None], [2, 4, 2, 1])
    del a[2]["pairs"]
    (found,) = compare(run(a), run(b)).differences
    assert (found.n, found.mean_a, found.mean_b) == (1, 2.0, 1.5)


def test_texts_of_no_length_are_not_compared(run):
    rows = [*texts([0.0], [0]), item(0, "t", acc=1.0)]
    comparison = compare(run(rows), run(rows))
    assert [found.task for found in comparison.differences] == ["t"]
    assert comparison.without_numbers == ["texts"]


def test_every_perplexity_of_lm_eval_has_a_unit():
    assert set(UNITS) == set(PERPLEXITIES)


def test_perplexities_of_an_evaluation(tmp_path, monkeypatch):
    tiny_eval.no_network(monkeypatch)
    own = tmp_path / "own"
    own.mkdir()
    config = {
        "task": "own_texts",
        "dataset_path": "nobody/own",
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in PERPLEXITIES],
    }
    (own / "own.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    bodies = ["def f(x):\n    return x\n", "a b c", "import os, sys\n" * 3]
    rows = tiny_eval.write_rows(tmp_path / "texts.jsonl", [{"text": body} for body in bodies])
    runs, scores, totals = [], [], []
    for seed in (0, 1):
        loaded = load_tasks(["own_texts"], [parse_data(f"own_texts={rows}")], include_path=str(own))
        answers = tiny_eval.answers(tiny_eval.teacher(seed=seed))
        (outcome,), _ = with_lm_eval(answers, EvalSettings(tasks=("own_texts",)), *loaded, {})
        scores.append(outcome.scores)
        totals.append([sample["outputs"][0] for sample in outcome.samples])
        runs.append(read_run(folder(tmp_path / f"run{seed}", outcome.samples)))
    comparison = compare(*runs)
    found = {d.metric.partition(",")[0]: d for d in comparison.differences}
    assert list(found) == list(PERPLEXITIES)
    for i, mean in enumerate(("mean_a", "mean_b")):
        for name in ("word_perplexity", "byte_perplexity"):
            expected = math.log(scores[i][name].value)
            assert getattr(found[name], mean) == pytest.approx(expected)
        bits = scores[i]["bits_per_byte"].value
        assert getattr(found["bits_per_byte"], mean) == pytest.approx(bits)
    steps = [y - x for x, y in zip(*totals, strict=True)]
    error = ratio_std_err(steps, [len(body) for body in bodies])
    assert found["byte_perplexity"].std_err == pytest.approx(error)
    assert found["bits_per_byte"].std_err == pytest.approx(error / math.log(2))


# --- the items of lm-eval ------------------------------------------------------------------------


def logged(number, doc, metrics, kept="none"):
    """A sample row as lm-eval logs it."""
    return {
        "doc_id": number, "doc": doc, "doc_hash": f"h{number}", "filter": kept, "resps": [["x"]],
        "filtered_resps": ["x"], "arguments": [("q", "a")], "target": "", "metrics": list(metrics),
        **metrics,
    }  # fmt: skip


def test_pairs_are_kept_under_the_name_of_their_metric():
    rows = [logged(0, {}, {"word_perplexity": (-3.0, 2), "f1": (1, 0), "acc": 1}, "own")]
    (sample,) = _samples("t", rows, False)
    assert sample["pairs"] == {"word_perplexity (own)": [-3.0, 2.0]}
    assert sample["metrics"] == {"acc (own)": 1.0}
    assert "pairs" not in _samples("t", [logged(0, {}, {"acc": 1})], False)[0]


def test_an_item_of_perplexity_is_a_log_likelihood():
    rows = [logged(0, {}, {"perplexity": -3.5, "acc": 0})]
    assert _samples("t", rows, False)[0]["metrics"] == {"log_likelihood": -3.5, "acc": 0.0}


def test_only_numbers_of_a_metric_with_parts_are_kept():
    rows = [logged(0, {}, {"parts": {"pass@1": 1, "text": "x"}})]
    assert _samples("t", rows, False)[0]["metrics"] == {"pass@1": 1.0}


@pytest.mark.parametrize(
    ("docs", "expected"),
    [
        ([{"task_id": 11}, {"task_id": "b"}], ["11", "b"]),
        ([{"task_id": "a"}, {"task_id": "b"}, {"task_id": "a"}], ["0", "1", "2"]),
        ([{"task_id": 1}, {"x": 0}, "text"], ["0", "1", "2"]),  # 1 is also a number of an item
        ([{"task_id": "a"}, {"task_id": None}], ["a", "1"]),
    ],
)
def test_ids_are_unique_in_the_task(docs, expected):
    rows = [logged(n, doc, {"acc": 1}, kept) for kept in ("x", "y") for n, doc in enumerate(docs)]
    assert [sample["id"] for sample in _samples("t", rows, False)] == expected


# --- what is not the same ------------------------------------------------------------------------


def test_items_of_one_run_only_are_counted(run):
    comparison = compare(run(passes([1, 0, 1, 1])), run(passes([1, 1])))
    assert comparison.differences[0].n == 2
    (left,) = comparison.unpaired
    assert (left.task, left.only_a, left.only_b, left.changed) == ("humaneval", 2, 0, 0)


def test_an_item_that_changed_is_not_compared(run):
    other = [item(0, pass_at_1=1.0), item(1, doc_hash="new", pass_at_1=0.0)]
    comparison = compare(run(passes([1, 1])), run(other))
    assert comparison.differences[0].n == 1
    assert comparison.unpaired[0].changed == 1
    assert "1 in both that are not the same" in markdown(comparison)


def test_equal_items_leave_nothing_over(run):
    comparison = compare(run(passes([1, 1])), run(passes([1, 0])))
    assert comparison.unpaired == []
    assert "not compared" not in markdown(comparison)


@pytest.mark.parametrize(
    "rows",
    [
        passes([1], task="mbpp"),
        passes([1], doc_hash="new"),
        [item(0, other=1.0)],
        [item(0, pass_at_1=None)],
    ],
)
def test_nothing_in_common_is_an_error(run, rows):
    a, b = run([*passes([1]), item(0, "arc", acc=1.0)]), run(rows)
    task = rows[0]["task"]
    with pytest.raises(DataError, match=rf"a has arc, humaneval, .*b has {task}, and no item"):
        compare(a, b)


def test_tasks_without_numbers_are_named(run):
    rows = [*passes([1]), item(0, "bleu"), item(1, "bleu")]
    comparison = compare(run(rows), run(rows))
    assert comparison.without_numbers == ["bleu"]
    assert "\n\n- bleu: not compared, no metric has a number" in markdown(comparison)


def test_a_run_without_items(run):
    with pytest.raises(DataError, match="b has no items"):
        compare(run(passes([1])), run([]))


# --- settings ------------------------------------------------------------------------------------


def settings(steps=8, limit=None, tasks=("humaneval",)):
    return {"eval": {"limit": limit, "tasks": list(tasks)}, "model": {"sampler": {"steps": steps}}}


def test_settings_that_differ_are_named_and_the_model_is_not(run):
    a = run(passes([1]), settings(8, 4), model={"weights": "x"}, seed=0)
    b = run(passes([1]), settings(16, None), model={"weights": "y"}, seed=1)
    comparison = compare(a, b)
    assert comparison.settings == {
        "eval.limit": (4, None),
        "model.sampler.steps": (8, 16),
        "seed": (0, 1),
    }
    text = markdown(comparison)
    assert "- model.sampler.steps: 8 / 16" in text
    assert "- eval.limit: 4 / None" in text


def test_settings_of_the_compared_tasks_count(run):
    rows = passes([1])
    tasks = {"humaneval": {"num_fewshot": 0, "sandbox": {"level": "full"}}, "other": {"x": 1}}
    a = run(rows, tasks=tasks)
    b = run(rows, tasks={"humaneval": {"num_fewshot": 3, "sandbox": {"level": "full"}}})
    assert compare(a, b).settings == {"humaneval.num_fewshot": (0, 3)}


def test_equal_settings_are_not_listed(run):
    comparison = compare(run(passes([1]), settings()), run(passes([0]), settings()))
    assert comparison.settings == {}
    assert "Settings" not in markdown(comparison)


def test_a_setting_of_one_run_only(run):
    comparison = compare(run(passes([1]), {"eval": {"new": 1}}), run(passes([1]), {"eval": {}}))
    assert comparison.settings == {"eval.new": (1, None)}


# --- reports -------------------------------------------------------------------------------------


def test_the_table(run):
    text = markdown(compare(run(passes([1, 0, 0, 1, 0, 0])), run(passes([1, 1, 1, 0, 0, 1]))))
    lines = text.splitlines()
    assert "/a, b = " in lines[0]
    assert lines[2].count("|") == lines[3].count("|") == lines[4].count("|") == 10
    assert lines[4] == (
        "| humaneval | pass@1 | 6 | 0.3333 | 0.6667 | +0.3333 ± 0.3333 | -0.3200 … +0.9867"
        " | 1 / 3 | 0.625 |"
    )


def test_the_table_of_one_item_that_is_no_proportion(run):
    text = markdown(compare(run([item(0, nll=2.0)]), run([item(0, nll=1.5)])))
    assert "| humaneval | nll | 1 | 2.0000 | 1.5000 | -0.5000 | – | – | – |" in text


def test_plain_values_for_json(run):
    tree = json.loads(to_json(as_tree(compare(run(passes([0])), run(passes([1]), {"x": 1})))))
    assert tree["differences"][0]["difference"] == 1.0
    assert tree["differences"][0]["std_err"] is None
    assert tree["settings"] == {"x": [None, 1]}
    assert set(tree) == {"a", "b", "differences", "unpaired", "without_numbers", "settings"}


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [False, True])
def test_a_folder_without_results(tmp_path, make):
    if make:
        (tmp_path / "run").mkdir()
    with pytest.raises(DataError, match=r"run has no results\.json; give a folder"):
        read_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"samples_humaneval\.jsonl, line 2 is not JSON"),
        ("{}", "line 2: an item needs task, id, doc_hash, metrics"),
        (to_json(item(0, acc=1.0)), "line 2: item 'humaneval/0' of humaneval is there twice"),
        *(
            (
                to_json({**item(1), "metrics": metrics}),
                r"samples_humaneval\.jsonl, line 2: metrics must be an object of numbers and null",
            )
            for metrics in ([1], None, 3, {"acc": "1"}, {"acc": [1]}, {"acc": True})
        ),
        (to_json(item(1)).replace("{}", '{"acc": NaN}'), "line 2: metrics must be"),
        (to_json(item(1)).replace("{}", f'{{"acc": 1{400 * "0"}}}'), "line 2: metrics must be"),
        *(
            (to_json({**item(1), "pairs": pairs}), "line 2: pairs must be an object of")
            for pairs in (
                [1],
                None,
                {"m": 1},
                {"m": [1]},
                {"m": ["1", 1]},
                {"m": [1, None]},
                {"m": [1, -1]},
            )
        ),
        (to_json({**item(1), "task": [1]}), "line 2: task must be a text"),
        (to_json({**item(1), "cluster": [1]}), "line 2: task must be .* cluster a text or"),
    ],
)
def test_damaged_items(tmp_path, line, message):
    path = folder(tmp_path / "run", passes([1]))
    with open(path / "samples_humaneval.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        read_run(path)


@pytest.mark.parametrize("text", ["[]", "{", ""])
def test_damaged_results(tmp_path, text):
    path = folder(tmp_path / "run", passes([1]))
    (path / "results.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"results\.json"):
        read_run(path)


@pytest.mark.parametrize("name", ["settings", "tasks", "results"])
@pytest.mark.parametrize("value", [3, [1], None, "missing"])
def test_results_of_another_shape(tmp_path, name, value):
    path = folder(tmp_path / "run", passes([1]))
    record = json.loads((path / "results.json").read_text())
    record[name] = value
    if value == "missing":
        del record[name]
    (path / "results.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(DataError, match=rf"run/results\.json: {name} must be an object"):
        read_run(path)


def test_an_empty_record_is_no_evaluation(tmp_path):
    (tmp_path / "results.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"results\.json: settings must be"):
        read_run(tmp_path)
