"""Two evaluation folders side by side, item by item: what differs, and whether that can be chance.

Only items that both have are compared, and only if they are the same (`doc_hash`). The difference
of paired items has its own standard error, smaller than those of the two means suggest.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mdm.errors import DataError

from .json_files import Row, read_lines, read_object
from .metrics import Z95, clustered_std_err, mcnemar, mean_and_std_err, paired_ratios

NEEDED = ("task", "id", "doc_hash", "metrics")
# Metrics whose items are (log-likelihood, length): what is compared, and how many nats it is.
UNITS = {
    "word_perplexity": ("nats per word", 1.0),
    "byte_perplexity": ("nats per byte", 1.0),
    "bits_per_byte": ("bits per byte", math.log(2)),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """An evaluation folder: its record, and its items by task and id."""

    name: str
    record: Mapping[str, Any]
    samples: Mapping[str, Mapping[str, Row]]


@dataclasses.dataclass(frozen=True)
class Difference:
    """One metric of one task, over the n items that both runs have.

    metric      its name; perplexities are compared by what they are the exponential of, the negative
                log-likelihood of all items over their length, and say in which unit
    difference  mean b - mean a; std_err and the 95 % interval are those of paired items, or of
                clusters of them (holes of one program); NaN and None for fewer than two
    only_a      items that just a gets right, for metrics that are 0 or 1; None for others
    p_value     McNemar's; None for metrics with other values and where items are not independent
    """

    task: str
    metric: str
    n: int
    mean_a: float
    mean_b: float
    difference: float
    std_err: float
    interval: tuple[float, float] | None
    only_a: int | None = None
    only_b: int | None = None
    p_value: float | None = None


@dataclasses.dataclass(frozen=True)
class Unpaired:
    """Items of a task that were not compared: in one run only, or in both but not the same."""

    task: str
    only_a: int
    only_b: int
    changed: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Run a against run b.

    without_numbers  tasks with equal items, none of which has a number in both
    settings         the ones that differ: name → (value in a, value in b)
    """

    a: str
    b: str
    differences: list[Difference]
    unpaired: list[Unpaired]
    without_numbers: list[str]
    settings: dict[str, tuple[Any, Any]]


def read_run(folder: str | Path) -> Run:
    """The results of an evaluation. Raises DataError if the folder is not one, or damaged."""
    folder = Path(folder)
    if not (folder / "results.json").is_file():
        raise DataError(f"{folder} has no results.json; give a folder that `mdm eval` wrote")
    record = read_object(folder / "results.json")
    for name in ("settings", "tasks", "results"):
        if not isinstance(record.get(name), dict):
            raise DataError(f"{folder / 'results.json'}: {name} must be an object")
    samples: dict[str, dict[str, Row]] = {}
    for path in sorted(folder.glob("samples_*.jsonl")):
        for where, row in read_lines(path):
            missing = [name for name in NEEDED if name not in row]
            if missing:
                raise DataError(f"{where}: an item needs {', '.join(missing)}")
            _check(where, row)
            own = samples.setdefault(row["task"], {})
            if own.setdefault(str(row["id"]), row) is not row:
                raise DataError(f"{where}: item {row['id']!r} of {row['task']} is there twice")
    return Run(str(folder), record, samples)


def _check(where: str, row: Row) -> None:
    """Raise DataError for a field of an item that cannot be compared."""
    if not isinstance(row["task"], str) or not isinstance(row.get("cluster", ""), str | int):
        raise DataError(f"{where}: task must be a text, cluster a text or a number")
    metrics, pairs = row["metrics"], row.get("pairs", {})
    if not isinstance(metrics, dict) or not all(map(_is_value, metrics.values())):
        raise DataError(f"{where}: metrics must be an object of numbers and null")
    if not isinstance(pairs, dict) or not all(map(_is_pair, pairs.values())):
        raise DataError(f"{where}: pairs must be an object of [log-likelihood or null, length]")


def _is_value(value: Any) -> bool:
    """A finite number, or None: unknown."""
    if value is None:
        return True
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def _is_pair(pair: Any) -> bool:
    if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_value, pair)):
        return False
    return pair[1] is not None and pair[1] >= 0


def compare(a: Run, b: Run) -> Comparison:
    """Every metric that the runs share, in the order of a. Raises DataError if there is none."""
    differences: list[Difference] = []
    unpaired, without_numbers = [], []
    for task in dict.fromkeys([*a.samples, *b.samples]):
        own_a, own_b = a.samples.get(task, {}), b.samples.get(task, {})
        both = [i for i in own_a if i in own_b]
        pairs = [(own_a[i], own_b[i]) for i in both if own_a[i]["doc_hash"] == own_b[i]["doc_hash"]]
        found = [_difference(task, name, pairs) for name in _names("metrics", pairs)]
        found += [_difference_per_unit(task, name, pairs) for name in _names("pairs", pairs)]
        known = [difference for difference in found if difference is not None]
        differences += known
        if pairs and not known:
            without_numbers.append(task)
        left_over = Unpaired(
            task, len(own_a) - len(both), len(own_b) - len(both), len(both) - len(pairs)
        )
        if left_over.only_a or left_over.only_b or left_over.changed:
            unpaired.append(left_over)
    if not differences:
        raise DataError(
            f"nothing to compare: {a.name} has {_tasks(a)}, {b.name} has {_tasks(b)}, and no item"
            " with a number is the same in both; evaluate the same tasks with the same settings"
        )
    tasks = {difference.task for difference in differences}
    settings = _differing(a.record, b.record, tasks)
    return Comparison(a.name, b.name, differences, unpaired, without_numbers, settings)


def _names(kind: str, pairs: Sequence[tuple[Row, Row]]) -> list[str]:
    return list(dict.fromkeys(name for left, _ in pairs for name in left.get(kind, {})))


def _difference(task: str, metric: str, pairs: Sequence[tuple[Row, Row]]) -> Difference | None:
    """None if no pair has this metric in both runs; an unknown value (null) leaves its pair out."""
    values_a, values_b, clusters = [], [], []
    for left, right in pairs:
        x, y = left["metrics"].get(metric), right["metrics"].get(metric)
        if isinstance(x, (int, float)) and isinstance(y, (int, float)):
            values_a.append(float(x))
            values_b.append(float(y))
            clusters.append(left.get("cluster", left["id"]))
    n = len(values_a)
    if n == 0:
        return None
    steps = [y - x for x, y in zip(values_a, values_b, strict=True)]
    difference, _ = mean_and_std_err(steps)
    std_err = clustered_std_err(steps, clusters)
    means = mean_and_std_err(values_a)[0], mean_and_std_err(values_b)[0]
    interval = _interval(difference, std_err)
    found = Difference(task, metric, n, *means, difference, std_err, interval)
    if not {*values_a, *values_b} <= {0.0, 1.0}:
        return found
    only_a, only_b = steps.count(-1.0), steps.count(1.0)
    independent = len(set(clusters)) == n
    p_value = mcnemar(only_a, only_b) if independent else None
    return dataclasses.replace(found, only_a=only_a, only_b=only_b, p_value=p_value)


def _difference_per_unit(
    task: str, metric: str, pairs: Sequence[tuple[Row, Row]]
) -> Difference | None:
    """Of negative log-likelihood per word, byte, …; None and unknown values as in _difference."""
    items_a, items_b, clusters = [], [], []
    for left, right in pairs:
        x, y = (row.get("pairs", {}).get(metric, [None, 0]) for row in (left, right))
        if x[0] is not None and y[0] is not None:
            items_a.append((float(x[0]), float(x[1])))
            items_b.append((float(y[0]), float(y[1])))
            clusters.append(left.get("cluster", left["id"]))
    if not all(any(length for _, length in items) for items in (items_a, items_b)):
        return None
    unit, nats = UNITS.get(metric.partition(" (")[0], ("nats per unit of length", 1.0))
    ratio_a, ratio_b, error = paired_ratios(items_a, items_b, clusters)
    mean_a, mean_b, std_err = -ratio_a / nats, -ratio_b / nats, error / nats
    step = mean_b - mean_a
    label, n = f"{metric}, as {unit}", len(items_a)
    return Difference(task, label, n, mean_a, mean_b, step, std_err, _interval(step, std_err))


def _interval(difference: float, std_err: float) -> tuple[float, float] | None:
    if math.isnan(std_err):
        return None
    return difference - Z95 * std_err, difference + Z95 * std_err


def _tasks(run: Run) -> str:
    return ", ".join(sorted(run.samples)) or "no items"


def _differing(
    a: Mapping[str, Any], b: Mapping[str, Any], tasks: set[str]
) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, of the evaluation, of running the model and of the compared tasks.

    The model itself is expected to differ and is not among them.
    """
    flat_a, flat_b = (dict(_settings(record, tasks)) for record in (a, b))
    return {
        name: (flat_a.get(name), flat_b.get(name))
        for name in dict.fromkeys([*flat_a, *flat_b])
        if flat_a.get(name) != flat_b.get(name)
    }


def _settings(record: Mapping[str, Any], tasks: set[str]) -> Iterator[tuple[str, Any]]:
    yield from _flat(record["settings"], "")
    yield "seed", record.get("seed")
    for task, own in record["tasks"].items():
        if task in tasks:
            yield from _flat(own, f"{task}.")


def _flat(tree: Any, where: str) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flat(value, f"{where}{key}.")
    else:
        yield where.removesuffix("."), tree


# --- for people and programs ---------------------------------------------------------------------


def as_tree(comparison: Comparison) -> dict[str, Any]:
    """Plain values for JSON (record.to_json makes null of NaN)."""
    return dataclasses.asdict(comparison)


def markdown(comparison: Comparison) -> str:
    """A table of the differences; below it what was not compared, and which settings differ."""
    lines = [
        f"a = {comparison.a}, b = {comparison.b}; b - a over the same items, ± one standard error",
        "",
        "| task | metric | n | a | b | b - a | 95 % | only a / only b | McNemar p |",
        "|---|---|---:|---:|---:|---:|---|---|---|",
    ]
    lines += [f"| {' | '.join(_cells(difference))} |" for difference in comparison.differences]
    if comparison.unpaired or comparison.without_numbers:
        lines.append("")
    for left in comparison.unpaired:
        changed = f", {left.changed} in both that are not the same" if left.changed else ""
        lines.append(
            f"- {left.task}: not compared are {left.only_a} items only in a,"
            f" {left.only_b} only in b{changed}"
        )
    lines += [
        f"- {task}: not compared, no metric has a number for each item"
        for task in comparison.without_numbers
    ]
    if comparison.settings:
        lines += ["", "Settings that differ besides the model (a / b):", ""]
        lines += [f"- {name}: {x!r} / {y!r}" for name, (x, y) in comparison.settings.items()]
    return "\n".join(lines)


def _cells(found: Difference) -> list[str]:
    error = "" if math.isnan(found.std_err) else f" ± {found.std_err:.4f}"
    interval = "–" if found.interval is None else "{:+.4f} … {:+.4f}".format(*found.interval)
    return [
        found.task,
        found.metric,
        str(found.n),
        f"{found.mean_a:.4f}",
        f"{found.mean_b:.4f}",
        f"{found.difference:+.4f}{error}",
        interval,
        "–" if found.only_a is None else f"{found.only_a} / {found.only_b}",
        "–" if found.p_value is None else f"{found.p_value:.3g}",
    ]
