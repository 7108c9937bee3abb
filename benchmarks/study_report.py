"""The training study for people: paired differences with their intervals, tables, pictures.

Two kinds of error are told apart. Between seeds everything differs (masks, order of rows, holes), and the
few differences give a t-interval: this is what a claim about an arm needs. Within a seed the arms share
their held-out rows, and the rows give a standard error of the difference: it says how well *these two
trained students* are told apart, and nothing about another seed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mdm.record import to_json

from .serve_report import mean_and_error

REFERENCES = ("ce", "left", "left_2")
# 97.5 % quantiles of Student's t with 1, 2, … degrees of freedom; the last stands for all beyond.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclasses.dataclass(frozen=True)
class Units:
    """One value for each independent thing that was measured (a row, a hole), and its weight."""

    values: list[float]
    weights: list[float]


def weighted_mean(units: Units) -> tuple[float, float]:
    """Weighted mean and its standard error (linearised ratio); NaN for the error of a single unit."""
    total, count = math.fsum(units.weights), len(units.values)
    share = [weight / total for weight in units.weights]
    mean = math.fsum(s * value for s, value in zip(share, units.values, strict=True))
    if count < 2:
        return mean, math.nan
    spread = math.fsum(
        (s * (value - mean)) ** 2 for s, value in zip(share, units.values, strict=True)
    )
    return mean, math.sqrt(spread * count / (count - 1))


def paired(ours: Units, theirs: Units) -> tuple[float, float]:
    """Weighted mean of ours - theirs on the same units, and its standard error."""
    assert ours.weights == theirs.weights, "the same rows under the same masks"
    gaps = [a - b for a, b in zip(ours.values, theirs.values, strict=True)]
    return weighted_mean(Units(gaps, ours.weights))


def t_interval(mean: float, std_err: float, count: int) -> tuple[float, float] | None:
    """95 % interval of a mean of `count` values; None if there are fewer than two."""
    if count < 2:
        return None
    reach = T975[min(count - 2, len(T975) - 1)] * std_err
    return mean - reach, mean + reach


def comparisons(
    units: Mapping[tuple[str, int], Mapping[str, Units]],
    references: Sequence[str] = REFERENCES,
) -> list[dict[str, Any]]:
    """Every arm minus every reference, measure by measure, over the seeds that both have."""
    arms = list(dict.fromkeys(arm for arm, _ in units))
    found = []
    for reference in references:
        for arm in arms:
            seeds = [seed for own, seed in units if own == arm and (reference, seed) in units]
            if arm == reference or not seeds:
                continue
            for name in units[arm, seeds[0]]:
                found.append(_comparison(units, arm, reference, name, seeds))
    return found


def _comparison(
    units: Mapping[tuple[str, int], Mapping[str, Units]],
    arm: str,
    reference: str,
    name: str,
    seeds: Sequence[int],
) -> dict[str, Any]:
    each = [(seed, *paired(units[arm, seed][name], units[reference, seed][name])) for seed in seeds]
    mean, std_err = mean_and_error([gap for _, gap, _ in each])
    return {
        "arm": arm,
        "minus": reference,
        "measure": name,
        "mean": mean,
        "std_err": std_err,
        "interval": t_interval(mean, std_err, len(each)),
        "n": len(each),
        "seeds": [
            {"seed": seed, "difference": gap, "row_std_err": error} for seed, gap, error in each
        ],
    }


# --- the study on real code ------------------------------------------------------------------------

COLUMNS = ("bound", "accuracy_low", "exact_1", "exact_2", "exact_3")


def describe(record: dict[str, Any]) -> str:
    """Markdown tables for people and, last, the record as one JSON line."""
    results, settings = record["results"], record["settings"]
    arms = list(dict.fromkeys(line["arm"] for line in results["runs"]))
    lines = [
        f"{len(settings['seeds'])} seeds, {settings['steps']} steps, {settings['layers'] or 'all'} layers,"
        f" rows of {settings['length']} tokens, {settings['holes']} holes; means over seeds",
        "",
        _row(["arm", "bound (nats)", "accuracy, few masks", "exact 1 / 2 / 3", "s", "teacher s"]),
        _row(["---", *["---:"] * 5]),
    ]
    for arm in arms:
        own = [line for line in results["runs"] if line["arm"] == arm]
        exact = " / ".join(_percent(_mean(own, name)) for name in COLUMNS[2:])
        lines.append(
            _row([
                arm,
                _number(_mean(own, "bound"), ".3f"),
                _percent(_mean(own, "accuracy_low")),
                exact,
                *(f"{_plain_mean(own, name):.0f}" for name in ("seconds", "teacher_seconds")),
            ])
        )  # fmt: skip
    shown = [line for line in results["differences"] if line["measure"] in COLUMNS[:3]]
    if shown:
        lines += [
            "",
            "Differences, mean over seeds ± 95 % t-interval; in brackets each seed's ± standard error over"
            " its rows or holes",
            "",
            _row(["arm", "minus", *COLUMNS[:3]]),
            _row(["---", "---", *["---:"] * 3]),
        ]
    for arm, reference in dict.fromkeys((line["arm"], line["minus"]) for line in shown):
        cells = {
            line["measure"]: _difference(line)
            for line in shown
            if (line["arm"], line["minus"]) == (arm, reference)
        }
        lines.append(_row([arm, reference, *(cells.get(name, "–") for name in COLUMNS[:3])]))
    return "\n".join([*lines, to_json(record)])


def _difference(line: dict[str, Any]) -> str:
    interval = line["interval"]
    reach = "" if interval is None else f" ± {(interval[1] - interval[0]) / 2:.3f}"
    each = ", ".join(f"{s['difference']:+.3f} ± {s['row_std_err']:.3f}" for s in line["seeds"])
    return f"{line['mean']:+.3f}{reach} ({each})"


def _mean(lines: Sequence[dict[str, Any]], name: str) -> float:
    values = [line[name]["mean"] for line in lines if name in line]
    return math.fsum(values) / len(values) if values else math.nan


def _plain_mean(lines: Sequence[dict[str, Any]], name: str) -> float:
    return math.fsum(line[name] for line in lines) / len(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """Differences of the bound to each reference with their t-intervals; a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [line for line in record["results"]["differences"] if line["measure"] == "bound"]
    references = list(dict.fromkeys(line["minus"] for line in shown))
    figure, many = plt.subplots(
        1, max(1, len(references)), figsize=(4 * max(1, len(references)), 4), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axes, reference in zip(many[0], references, strict=False):
        own = [line for line in shown if line["minus"] == reference]
        for place, line in enumerate(own):
            gaps = [seed["difference"] for seed in line["seeds"]]
            axes.plot(gaps, [place] * len(gaps), "o", color="0.7")
            if line["interval"] is not None:
                axes.plot(line["interval"], [place, place], "-", color="C0")
            axes.plot([line["mean"]], [place], "s", color="C0")
        axes.set_yticks(range(len(own)), [line["arm"] for line in own])
        axes.axvline(0, color="0.5", linewidth=0.8)
        axes.set_xlabel(f"bound minus {reference} (nats per token)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# --- the study on the synthetic language -------------------------------------------------------------


def describe_synthetic(record: dict[str, Any]) -> str:
    """A Markdown table for each kind of texts and, last, the record as one JSON line."""
    results, settings = record["results"], record["settings"]
    lines = [
        f"{settings['words']} words, texts of {settings['length']}, K = {settings['fills']} fills,"
        f" {len(settings['seeds'])} seeds (± standard error), {settings['rows']} texts a step;"
        f" {results['cpu_seconds']:.0f} s of processor time. Excess: KL to the teacher's posterior above"
        " the best student (nats a token); limit: where the target itself leads"
    ]
    for texts in dict.fromkeys(line["texts"] for line in results["lines"]):
        own = [line for line in results["lines"] if line["texts"] == texts]
        steps = sorted({line["steps"] for line in own})
        other = texts != "teacher"
        extra = ["to the texts' law"] if other else []
        entropy = results["language"][texts]["entropy_per_word"]
        lines += [
            "",
            f"Texts: {texts}, {entropy:.2f} nats a word",
            "",
            _row(["arm", *(f"excess, {n} steps" for n in steps), "limit", "minus ce", *extra,
                  "decoding TV", "s", "targets s"]),
            _row(["---", *["---:"] * (len(steps) + 5 + len(extra))]),
        ]  # fmt: skip
        for arm in dict.fromkeys(line["arm"] for line in own):
            curve = [line for line in own if line["arm"] == arm]
            last = curve[-1]
            bound = last["limit"]
            cells = [arm, *(_error(line["excess"]) for line in curve)]
            cells.append("–" if bound is None else f"{abs(bound['excess']):.3f}")
            cells.append("–" if last["minus_ce"] is None else _error(last["minus_ce"], "+.3f"))
            cells += [_error(last["excess_texts"])] if other else []
            cells.append(_error(last["tv"]))
            cells += [f"{last[name]['mean']:.1f}" for name in ("seconds", "target_seconds")]
            lines.append(_row(cells))
    return "\n".join([*lines, to_json(record)])


def plot_synthetic(record: dict[str, Any], path: Path) -> None:
    """Excess against steps, a line an arm, a panel for each kind of texts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(line["texts"] for line in record["results"]["lines"]))
    figure, many = plt.subplots(
        1, len(kinds), figsize=(5 * len(kinds), 4), layout="constrained", squeeze=False
    )
    for axes, texts in zip(many[0], kinds, strict=True):
        own = [line for line in record["results"]["lines"] if line["texts"] == texts]
        for arm in dict.fromkeys(line["arm"] for line in own):
            curve = [line for line in own if line["arm"] == arm]
            axes.errorbar(
                [line["steps"] for line in curve],
                [line["excess"]["mean"] for line in curve],
                [line["excess"]["std_err"] for line in curve],
                fmt="o-",
                label=arm,
            )
        axes.set_xscale("log", base=2)
        axes.set_xlabel("steps")
        axes.set_title(f"{texts} texts")
        axes.legend(frameon=False, fontsize="small")
    many[0][0].set_ylabel("excess (nats a token)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _error(measure: Mapping[str, Any], form: str = ".3f") -> str:
    std_err = measure["std_err"]
    known = std_err is not None and not math.isnan(std_err)
    return f"{measure['mean']:{form}}" + (f" ± {std_err:.3f}" if known else "")


def _number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else f"{value:{form}}"


def _percent(value: float) -> str:
    return _number(100 * value, ".1f") + (" %" if not math.isnan(value) else "")
