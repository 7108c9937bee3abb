"""How Monte-Carlo errors of likelihoods reach a score, against drawing everything again."""

import math
from types import SimpleNamespace

import pytest
import tiny_eval
import torch
import yaml

from mdm.eval.harness import likelihood_key
from mdm.eval.monte_carlo import gold_choice, mc_std_err, mc_std_err_of_group
from mdm.eval.run import EvalSettings
from mdm.eval.tasks import load_tasks, parse_data
from mdm.eval.with_lm_eval import with_lm_eval
from mdm.likelihood import Likelihood


def likelihood(value, std_err, estimator="stratified"):
    return Likelihood(value, std_err, 8, estimator, 4, estimator != "ar")


def question(number, values, errors, target, texts=None, estimator="stratified"):
    """(sample row, likelihoods by key) of a multiple-choice item."""
    texts = texts or [f" choice {i}" for i in range(len(values))]
    row = {
        "doc": {"number": number},
        "arguments": [(f"question {number}", text) for text in texts],
        "target": target,
    }
    found = {
        likelihood_key(row["doc"], arguments): likelihood(value, error, estimator)
        for arguments, value, error in zip(row["arguments"], values, errors, strict=True)
    }
    return row, found


def asked(items):
    """Rows, and what stands for the model that scored them."""
    rows = [row for row, _ in items]
    return rows, SimpleNamespace(likelihoods={k: v for _, found in items for k, v in found.items()})


ITEMS = [
    ([-10.0, -10.4, -12.0], [0.5, 0.4, 0.1], 0),
    ([-8.0, -7.5, -7.6], [0.2, 0.3, 0.4], 2),
    ([-3.0, -9.0, -9.0], [0.1, 0.1, 0.1], 1),
    ([-5.0, -5.0, -5.0], [1.0, 1.0, 1.0], 1),
]


def simulated(items, lengths=None, draws=20_00):
    """Standard deviation of the accuracy when all likelihoods are drawn again."""
    random = torch.Generator().manual_seed(1)
    right = torch.zeros(draws)
    for values, errors, target in items:
        noise = torch.randn(draws, len(values), generator=random, dtype=torch.float64)
        drawn = torch.tensor(values) + torch.tensor(errors) * noise
        if lengths:
            drawn = drawn / torch.tensor(lengths)
        right += (drawn.argmax(1) == target).double()
    return float((right / len(items)).std())


def test_accuracy_as_if_drawn_again():
    rows, lm = asked([question(i, *item) for i, item in enumerate(ITEMS)])
    assert mc_std_err("acc", rows, lm) == pytest.approx(simulated(ITEMS), rel=0.1)
    assert mc_std_err("acc", rows, lm) == mc_std_err("acc", rows, lm)


def test_normed_accuracy_divides_by_the_length():
    texts = [" abcd", " ab", " abcdefgh"]
    rows, lm = asked([question(i, *item, texts=texts) for i, item in enumerate(ITEMS)])
    expected = simulated(ITEMS, lengths=[4, 2, 8])
    assert expected < 0.8 * simulated(ITEMS)
    assert mc_std_err("acc_norm", rows, lm) == pytest.approx(expected, rel=0.15)


def test_the_space_before_a_choice_does_not_count():
    item = question(0, [-1.5, -12.0], [0.1, 0.1], 0, texts=[" a", " abcdefgh"])
    assert mc_std_err("acc_norm", *asked([item])) == pytest.approx(0.5, abs=0.1)  # -1.5 each


def test_exact_likelihoods_have_no_error():
    items = [question(0, [-1.0, -2.0], [0.0, 0.0], 0), question(1, [-2.0, -1.0], [0.0, 0.0], 0)]
    assert mc_std_err("acc", *asked(items)) == 0.0


def test_more_items_have_less_of_it():
    one = [question(0, *ITEMS[3])]
    many = [question(i, *ITEMS[3]) for i in range(16)]
    assert mc_std_err("acc", *asked(many)) == pytest.approx(
        mc_std_err("acc", *asked(one)) / 4, rel=0.1
    )


def test_none_where_there_is_none():
    values = [-1.0, -2.0], [0.0, 0.0], 0
    teacher = asked([question(0, *values, estimator="ar")])
    assert mc_std_err("acc", *teacher) is None
    rows, lm = asked([question(0, *values)])
    assert mc_std_err("brier_score", rows, lm) is None
    assert mc_std_err("acc", [], lm) is None
    assert mc_std_err("acc", rows, SimpleNamespace(likelihoods={})) is None  # from lm-eval's cache
    assert mc_std_err("acc", *asked([question(0, [-1.0, -2.0], [math.nan, 0.1], 0)])) is None
    assert mc_std_err("acc", *asked([question(0, *values[:2], target=["a", "b"])])) is None
    assert mc_std_err("acc", *asked([question(0, *values[:2], target=2)])) is None
    assert mc_std_err("acc", *asked([question(0, *values[:2], target=-100)])) is None
    # is_greedy of a single continuation
    assert mc_std_err("acc", *asked([question(0, [-1.0], [0.1], 0)])) is None


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (1, 1),
        ("sits.", 1),
        (" runs.", 0),
        ("1", 1),
        ("other", None),
        (True, None),
        (1.0, None),
        ([1], None),
    ],
)
def test_the_right_choice(target, expected):
    row = {"target": target, "arguments": [("q", " runs."), ("q", " sits.")]}
    assert gold_choice(row) == expected


def test_a_label_that_is_a_number_is_found_by_its_text():
    row = {"target": "1", "arguments": [("q", " 1"), ("q", " 0")]}
    assert gold_choice(row) == 0


# --- texts ---------------------------------------------------------------------------------------

VALUES, ERRORS, LENGTHS = [-30.0, -12.0, -50.0], [0.5, 0.2, 1.0], [9, 4, 21]


def texts(metric):
    rows, found = [], {}
    for i, (value, error, length) in enumerate(zip(VALUES, ERRORS, LENGTHS, strict=True)):
        row = {"doc": i, "arguments": [(f"text {i}",)], "target": "", metric: (value, length)}
        rows.append(row)
        found[likelihood_key(i, row["arguments"][0])] = likelihood(value, error)
    return rows, SimpleNamespace(likelihoods=found)


@pytest.mark.parametrize(
    ("metric", "score"),
    [
        ("word_perplexity", lambda values: math.exp(-sum(values) / sum(LENGTHS))),
        ("byte_perplexity", lambda values: math.exp(-sum(values) / sum(LENGTHS))),
        ("bits_per_byte", lambda values: -sum(values) / sum(LENGTHS) / math.log(2)),
    ],
)
def test_perplexities_by_finite_differences(metric, score):
    step = 1e-5
    variance = 0.0
    for i, error in enumerate(ERRORS):
        moved = list(VALUES)
        moved[i] += step
        variance += ((score(moved) - score(VALUES)) / step * error) ** 2
    assert mc_std_err(metric, *texts(metric)) == pytest.approx(math.sqrt(variance), rel=1e-3)


def test_perplexity_of_continuations():
    rows, lm = texts("perplexity")
    for row, value in zip(rows, VALUES, strict=True):
        row["perplexity"] = value
    score = lambda values: math.exp(-sum(values) / len(values))  # noqa: E731
    step = 1e-5
    slopes = [
        (score([v + step * (i == j) for j, v in enumerate(VALUES)]) - score(VALUES)) / step
        for i in range(3)
    ]
    expected = math.sqrt(sum((s * e) ** 2 for s, e in zip(slopes, ERRORS, strict=True)))
    assert mc_std_err("perplexity", rows, lm) == pytest.approx(expected, rel=1e-3)


def test_a_perplexity_without_lengths_is_left_alone():
    rows, lm = texts("word_perplexity")
    rows[1]["word_perplexity"] = 3.0
    assert mc_std_err("word_perplexity", rows, lm) is None


# --- groups --------------------------------------------------------------------------------------


def test_the_error_of_a_weighted_mean():
    # Weights 1/4 and 3/4: sqrt((1/4 · 4)² + (3/4 · 2)²)
    assert mc_std_err_of_group([(1, 4.0), (3, 2.0)]) == pytest.approx(math.sqrt(1 + 2.25))
    assert mc_std_err_of_group([(1, 4.0), (3, None)]) == pytest.approx(1.0)  # exact: no error
    assert mc_std_err_of_group([(1, None), (3, None)]) is None
    assert mc_std_err_of_group([(1, 0.0), (3, None)]) == 0.0
    assert mc_std_err_of_group([]) is None


SIZES = {"own_a": 1, "own_b": 3, "own_c": 2}


def mean_of(metric, by_size):
    return {"metric": metric, "weight_by_size": by_size}


GROUPS = {
    "own_inner": {
        "task": ["own_a", "own_b"],
        "aggregate_metric_list": [mean_of("acc", True), mean_of("acc_norm", False)],
    },
    "own_outer": {
        "task": ["own_inner", "own_c"],
        "aggregate_metric_list": [mean_of("acc", False), mean_of("acc_norm", True)],
    },
    "own_twice": {  # own_a by itself and in a group
        "task": ["own_inner", "own_other"],
        "aggregate_metric_list": [mean_of("acc", True)],
    },
    "own_other": {"task": ["own_a", "own_c"]},
}


def grouped(folder, name, model=None):
    """{task or group: scores} of one of GROUPS."""
    folder.mkdir()
    for task in SIZES:
        config = {
            "task": task,
            "dataset_path": "nobody/own",
            "dataset_name": task,
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "{{q}}",
            "doc_to_choice": ["abcdefgh", "badcfehg", "hgfedcba"],
            "doc_to_target": "{{t}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for group, config in GROUPS.items():
        text = yaml.safe_dump({"group": group, **config})
        (folder / f"{group}.yaml").write_text(text, encoding="utf-8")
    data = folder / "data"
    data.mkdir()
    for task, size in SIZES.items():
        rows = [{"q": f"{task} {i}?", "t": (i + 2) % 3} for i in range(size)]
        tiny_eval.write_rows(data / f"{task}.jsonl", rows)
    loaded = load_tasks([name], [parse_data(f"{name}={data}")], include_path=str(folder))
    answers = tiny_eval.answers(model, mc_samples=4)
    outcomes, _ = with_lm_eval(answers, EvalSettings(tasks=(name,)), *loaded, {})
    return {outcome.task: outcome.scores for outcome in outcomes}


@pytest.mark.parametrize(
    ("asked", "group", "metric", "weights"),
    [
        ("own_outer", "own_inner", "acc", {"own_a": 1 / 4, "own_b": 3 / 4}),
        ("own_outer", "own_inner", "acc_norm", {"own_a": 1 / 2, "own_b": 1 / 2}),
        # Of all tasks below it, whatever the weights of the group between.
        ("own_outer", "own_outer", "acc", dict.fromkeys(SIZES, 1 / 3)),
        ("own_outer", "own_outer", "acc_norm", {"own_a": 1 / 6, "own_b": 3 / 6, "own_c": 2 / 6}),
        ("own_twice", "own_twice", "acc", {"own_a": 2 / 7, "own_b": 3 / 7, "own_c": 2 / 7}),
    ],
)
def test_groups_add_the_errors_of_their_tasks(tmp_path, monkeypatch, asked, group, metric, weights):
    tiny_eval.no_network(monkeypatch)
    scores = grouped(tmp_path / "own", asked)
    members = {task: scores[task][metric] for task in weights}
    assert all(score.mc_std_err > 0 for score in members.values())
    whole = scores[group][metric]
    assert whole.value == pytest.approx(sum(w * members[t].value for t, w in weights.items()))
    expected = math.sqrt(sum((w * members[t].mc_std_err) ** 2 for t, w in weights.items()))
    assert whole.mc_std_err == pytest.approx(expected)


def test_a_group_of_exact_likelihoods_has_no_error(tmp_path, monkeypatch):
    tiny_eval.no_network(monkeypatch)
    scores = grouped(tmp_path / "own", "own_inner", tiny_eval.teacher())
    assert scores["own_inner"]["acc"].mc_std_err is None
