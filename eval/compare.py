"""Two evaluation folders side by side, item by item: what differs, and whether that can be chance.

Only items that both have are compared, and only if they are the same (`doc_hash`). The difference
of paired items has its own standard error, smaller than those of the two means suggest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mdm.errors import DataError

from .json_files import Row, read_lines, read_object
from .metrics import Z95, clustered_std_err, mcnemar, mean_and_std_err

NEEDED = ("task", "id", "doc_hash", "metrics")


@dataclasses.dataclass(frozen=True)
class Run:
    """An evaluation folder: its record, and its items by task and id."""

    name: str
    record: Mapping[str, Any]
    samples: Mapping[str, Mapping[str, Row]]


@dataclasses.dataclass(frozen=True)
class Difference:
    """One metric of one task, over the n items that both runs have.

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
    """Run a against run b. `settings` has the ones that differ: name → (value in a, value in b)."""

    a: str
    b: str
    differences: list[Difference]
    unpaired: list[Unpaired]
    settings: dict[str, tuple[Any, Any]]


def read_run(folder: str | Path) -> Run:
    """The results of an evaluation. Raises DataError if the folder is not one, or damaged."""
    folder = Path(folder)
    if not (folder / "results.json").is_file():
        raise DataError(f"{folder} has no results.json; give a folder that `mdm eval` wrote")
    samples: dict[str, dict[str, Row]] = {}
    for path in sorted(folder.glob("samples_*.jsonl")):
        for where, row in read_lines(path):
            missing = [name for name in NEEDED if name not in row]
            if missing:
                raise DataError(f"{where}: an item needs {', '.join(missing)}")
            own = samples.setdefault(row["task"], {})
            if own.setdefault(str(row["id"]), row) is not row:
                raise DataError(f"{where}: item {row['id']!r} of {row['task']} is there twice")
    return Run(str(folder), read_object(folder / "results.json"), samples)


def compare(a: Run, b: Run) -> Comparison:
    """Every metric that the runs share, in the order of a. Raises DataError if there is none."""
    differences, unpaired = [], []
    for task in dict.fromkeys([*a.samples, *b.samples]):
        own_a, own_b = a.samples.get(task, {}), b.samples.get(task, {})
        both = [i for i in own_a if i in own_b]
        pairs = [(own_a[i], own_b[i]) for i in both if own_a[i]["doc_hash"] == own_b[i]["doc_hash"]]
        names = dict.fromkeys(name for left, _ in pairs for name in left["metrics"])
        found = (_difference(task, name, pairs) for name in names)
        differences += [difference for difference in found if difference is not None]
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
    return Comparison(a.name, b.name, differences, unpaired, _differing(a.record, b.record, tasks))


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
    known = not math.isnan(std_err)
    interval = (difference - Z95 * std_err, difference + Z95 * std_err) if known else None
    means = mean_and_std_err(values_a)[0], mean_and_std_err(values_b)[0]
    found = Difference(task, metric, n, *means, difference, std_err, interval)
    if not {*values_a, *values_b} <= {0.0, 1.0}:
        return found
    only_a, only_b = steps.count(-1.0), steps.count(1.0)
    independent = len(set(clusters)) == n
    p_value = mcnemar(only_a, only_b) if independent else None
    return dataclasses.replace(found, only_a=only_a, only_b=only_b, p_value=p_value)


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
    yield from _flat(record.get("settings"), "")
    yield "seed", record.get("seed")
    for task, own in (record.get("tasks") or {}).items():
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
    if comparison.unpaired:
        lines.append("")
    for left in comparison.unpaired:
        changed = f", {left.changed} in both that are not the same" if left.changed else ""
        lines.append(
            f"- {left.task}: not compared are {left.only_a} items only in a,"
            f" {left.only_b} only in b{changed}"
        )
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
