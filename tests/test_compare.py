"""Two runs side by side: numbers worked out by hand, and nothing compared that is not the same."""

import json
import math

import pytest

from mdm.errors import DataError
from mdm.eval.compare import as_tree, compare, markdown, read_run
from mdm.eval.metrics import Z95
from mdm.record import make_record, to_json


def item(number, task="humaneval", doc_hash=None, cluster=None, **metrics):
    row = {"task": task, "id": f"{task}/{number}", "doc_hash": doc_hash or f"h{number}"}
    row["metrics"] = {name.replace("_at_", "@"): value for name, value in metrics.items()}
    return row if cluster is None else {**row, "cluster": cluster}


def folder(path, rows, settings=None, **record):
    """An evaluation folder as eval/run.py writes it."""
    path.mkdir()
    made = make_record("eval", {}, settings=settings or {}, seed=0, checkpoint="abc")
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
    assert set(tree) == {"a", "b", "differences", "unpaired", "settings"}


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
