"""What `mdm bench serve` found, for people: statistics, a table, the ratios, a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mdm.record import to_json

from .serve_requests import SIDES

HEADLINE = 16  # clients at which engine and serial are compared, if that was measured
MIB = 2**20


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the ordered values, the least at 0 and the greatest at 100; NaN of none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = percent / 100 * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN for the error of a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, statistics.stdev(values) / math.sqrt(len(values))


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the least squares line through (x, y); NaN if there are not two x."""
    if len({x for x, _ in points}) < 2:
        return math.nan
    return statistics.linear_regression(*zip(*points, strict=True)).slope


COLUMNS = (  # title, key, width, digits, unit
    ("req/s", "requests_per_s", 8, 2, 1),
    ("tok/s", "tokens_per_s", 8, 1, 1),
    ("p50 s", "latency_p50_s", 8, 2, 1),
    ("p95 s", "latency_p95_s", 8, 2, 1),
    ("queue50", "queue_p50_s", 9, 2, 1),
    ("queue95", "queue_p95_s", 9, 2, 1),
    ("rows", "rows_per_pass", 7, 2, 1),
    ("tok/fwd", "tokens_per_forward", 9, 2, 1),
    ("requests", "requests", 10, 0, 1),
    ("errors", "errors", 8, 0, 1),
    ("peak MiB", "peak_bytes", 10, 0, MIB),
)


def describe(record: dict[str, Any]) -> str:
    """Tables for people and, last, the record as one JSON line."""
    results, settings = record["results"], record["settings"]
    load = results["workload"]
    title = "".join(f"{name:>{width}}" for name, _, width, _, _ in COLUMNS)
    lines = [
        f"{settings['model']}, {settings['dtype']}, {settings['threads']} threads; workload"
        f" {settings['workload']}: {load['prompt']} + {load['new']} tokens in {load['steps']} steps;"
        f" {settings['repeats']} repeats of {settings['requests']} requests a client",
        f"{'clients':>7}  {'side':7}{title}",
    ]
    for line in results["levels"]:
        cells = "".join(_cell(line[key], *form) for _, key, *form in COLUMNS)
        lines.append(f"{line['concurrency']:>7}  {line['side']:7}{cells}")
    lines += [
        f"{line['errors']} lost at concurrency {line['concurrency']}, {line['side']}: {line['first_error']}"
        for line in results["levels"]
        if line["errors"]
    ]
    lines += [_ratio_text(line) for line in headlines(results["ratios"])]
    over = results["overhead"]
    lines.append(
        f"server / library, one client: {100 * over['overhead']:+.1f} % latency"
        f"{_error(100 * over['std_err'], '.1f')} (n={over['n']});"
        f" {over['texts_different']} of {over['texts_compared']} texts differ"
    )
    if results["soak"]:
        lines += _soak_text(results["soak"])
    return "\n".join([*lines, to_json(record)])


def headlines(ratios: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Engine over serial for the fewest clients, and for 16 of them (or as many as there were)."""
    by_level = {line["concurrency"]: line for line in ratios}
    many = HEADLINE if HEADLINE in by_level else max(by_level)
    for level in sorted({min(by_level), many}):
        yield by_level[level]


def _ratio_text(line: dict[str, Any]) -> str:
    return (
        f"engine / serial at concurrency {line['concurrency']}: {line['ratio']:.2f} times the tokens/s"
        f"{_error(line['std_err'], '.2f')} (n={line['n']});"
        f" {line['texts_different']} of {line['texts_compared']} texts differ"
    )


def _soak_text(found: dict[str, Any]) -> list[str]:
    first, last, peak = (
        found[f"resident_{name}_bytes"] / MIB for name in ("first", "last", "peak")
    )
    return [
        f"soak, {found['wall_s']:.0f} s, {found['clients']} clients: {found['sent']} sent,"
        f" {found['answered']} answered, {found['refused']} wrong ones refused,"
        f" {found['cancelled']} cancelled, {found['lost']} lost; {found['rows_left']} rows left",
        f"resident memory: {first:.0f} MiB at first, {last:.0f} at last, {peak:.0f} at most;"
        f" {found['slope_mib_per_minute']:+.2f} MiB a minute in the second half",
        *(f"lost: {text}" for text in found["told"]),
    ]


def _cell(value: float | None, width: int, digits: int, unit: int) -> str:
    return " " * width if value is None else f"{value / unit:>{width}.{digits}f}"


def _error(value: float, form: str) -> str:
    return "" if math.isnan(value) else f" ± {value:{form}}"


def plot(record: dict[str, Any], path: Path) -> None:
    """Visible tokens a second, and latency at the 95th percentile, against clients; a line a side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = (("tokens_per_s", "visible tokens / s"), ("latency_p95_s", "latency, p95 (s)"))
    figure, both = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axes, (key, label) in zip(both, shown, strict=True):
        for side in SIDES:
            own = [line for line in record["results"]["levels"] if line["side"] == side]
            own.sort(key=lambda line: line["concurrency"])
            levels = [line["concurrency"] for line in own]
            axes.plot(levels, [line[key] for line in own], "o-", label=side)
        axes.set_xscale("log", base=2)
        axes.set_xticks(levels, [str(level) for level in levels])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("clients at the same time")
        axes.set_ylabel(label)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
