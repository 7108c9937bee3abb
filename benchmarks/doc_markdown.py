"""Records as Markdown, as the pages in docs/ show them.

Every function takes a record and raises KeyError if it was made before a field that it needs. A
benchmark whose report is Markdown is shown by it; a card of fixed width stands in a code block.
"""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Record = dict[str, Any]

_ARMS = {  # of the on-policy study, for readers
    "start": "before any step (first seed)",
    "ce_corpus": "cross-entropy on the corpus",
    "ce_teacher": "cross-entropy on the teacher's text",
    "off_policy": "distillation on the teacher's text",
    "on_policy": "on-policy, published form",
    "on_policy_8": "on-policy among the 8 likeliest, `tail=renormalise`",
    "on_policy_left_8": "on-policy, left-only, 8 candidates",
    "on_policy_right": "on-policy, right-aware, 8 candidates",
    "margin": "on-policy, rollouts by margin",
    "margin_right": "on-policy, right-aware, rollouts by margin",
}


def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __package__)  # torch only when a page is made


def page(module: str, name: str = "page") -> Callable[[Record], str]:
    """What a report has as a page."""

    def markdown(record: Record) -> str:
        text: str = getattr(_module(module), name)(record)
        return text.strip()

    return markdown


def report(module: str, name: str = "describe") -> Callable[[Record], str]:
    """A report that is Markdown, but for the JSON line at its end."""

    def markdown(record: Record) -> str:
        text: str = getattr(_module(module), name)(_with_nan(record, "std_err"))
        return "\n".join(line.rstrip() for line in text.splitlines()[:-1])

    return markdown


def card(module: str) -> Callable[[Record], str]:
    """A card of fixed width, in a code block."""
    text = report(module)

    def markdown(record: Record) -> str:
        numbers = {**record, "results": _with_nan(record["results"])}
        return f"```text\n{text(numbers)}\n```"

    return markdown


def _with_nan(value: Any, ends: str = "", key: str = "") -> Any:
    """What is null under keys with that end as NaN again, which strict JSON does not have.

    Reports format numbers. In a card everything is one; elsewhere null can mean "was not asked for".
    """
    if isinstance(value, dict):
        return {name: _with_nan(item, ends, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_nan(item, ends, key) for item in value]
    return math.nan if value is None and key.endswith(ends) else value


def likelihood(record: Record) -> str:
    """The published estimator beside mdm's, by forwards."""
    lines = table(
        "--:",
        "forwards", "error, published", "error, mdm", "ratio", "bias, published / mdm",
        "truth within 1.96 reported errors, mdm", "worse of two answers chosen, published / mdm",
    )  # fmt: skip
    found = {(line["forwards"], line["estimator"]): line for line in record["results"]["short"]}
    for forwards in dict.fromkeys(forwards for forwards, _ in found):
        theirs, ours = found[forwards, "llada"], found[forwards, "stratified"]
        covered = ours["coverage"]
        lines.append(
            row(
                str(forwards),
                f"{theirs['rmse']:.2f}",
                f"{ours['rmse']:.2f}",
                f"{ours['rmse'] / theirs['rmse']:.2f}" if theirs["rmse"] else "–",
                f"{theirs['bias']:+.2f} / {ours['bias']:+.2f}",
                "–" if covered is None else f"{covered:.0%}",
                # The choices of one question share their masks in mdm; as published each has its own.
                f"{theirs['flips_own_masks']:.1%} / {ours['flips_shared_masks']:.1%}",
            )
        )
    return "\n".join(lines)


def serve(record: Record) -> str:
    """The engine beside one request at a time, a line for each number of clients."""
    lines = table(
        "--:", "clients", "tokens/s: engine / one at a time", "p50, s", "p95, s", "rows a forward"
    )
    levels = record["results"]["levels"]
    of = {(line["concurrency"], line["side"]): line for line in levels}
    for clients in dict.fromkeys(line["concurrency"] for line in levels):
        both = [of[clients, side] for side in ("engine", "serial")]
        lines.append(
            row(
                str(clients),
                *(
                    " / ".join(three_figures(line[key]) for line in both)
                    for key in ("tokens_per_s", "latency_p50_s", "latency_p95_s")
                ),
                f"{both[0]['rows_per_pass']:.1f}",
            )
        )
    return "\n".join(lines)


def targets(record: Record) -> str:
    """Every target at the most fills, positions with something visible to the right, by noise level."""
    results = record["results"]
    references = [own for own in results["references"] if own["where"] == "hole"]
    most = max(record["settings"]["fills"])
    lines = table(
        "--:",
        "target",
        *(
            title
            for own in references
            for title in (
                f"TV to the reference, t = {own['level']:g} ({own['n']} positions)",
                "ms a target",
                "teacher tokens",
            )
        ),
    )
    asked = [
        line
        for line in results["lines"]
        if line["where"] == "hole" and line["fills"] in (None, most)
    ]
    of = {(line["estimator"], line["level"]): line for line in asked}
    for name in dict.fromkeys(line["estimator"] for line in asked):
        cells = []
        for own in references:
            line = of.get((name, own["level"]))
            cells += ["", "", ""] if line is None else [
                with_error(line["tv"], line["tv_std_err"]), f"{line['ms']:.0f}", f"{line['tokens']:.0f}"
            ]  # fmt: skip
        lines.append(row(_target(name, record["settings"]), *cells))
    errors = [(with_error(own["floor"], own["floor_std_err"]), "", "") for own in references]
    lines.append(row("reference's own error", *(cell for cells in errors for cell in cells)))
    return "\n".join(lines)


def _target(name: str, settings: Record) -> str:
    """As one would write it in a recipe."""
    kind, _, manner = name.rpartition("_")
    written = {
        "suffix": f"`suffix`, {settings['candidates']} candidates",
        "suffix_pruned": f"the same with `prune={settings['prune']:g}`",
    }
    plain = f"`{kind}`, `fill=span`" if manner == "span" else f"`{name}`"
    return written.get(name, plain)


def on_policy(record: Record) -> str:
    """A line an arm, blocks of each size side by side: means over seeds."""
    blocks = {size: found["runs"] for size, found in record["results"]["blocks"].items()}
    sizes = sorted(blocks, key=int)
    low = min(record["settings"]["thresholds"])
    lines = table(
        "--:",
        "", f"bound, blocks of {' / '.join(sizes)}", "drawn",
        f"tokens a forward, greedily at {low:g}", "s a step, of it rollouts",
    )  # fmt: skip
    for arm in dict.fromkeys(run["arm"] for size in sizes for run in blocks[size]):
        own = {size: [run for run in blocks[size] if run["arm"] == arm] for size in sizes}
        every = [run for runs in own.values() for run in runs]
        steps = sum(run["steps"] for run in every)
        spent = [
            sum(run[key] for run in every) / steps
            for key in ("seconds", "rollout_seconds")
            if steps and any(run[key] for run in every)
        ]
        lines.append(
            row(
                _ARMS.get(arm, f"`{arm}`"),
                *(
                    " / ".join(minus(_mean(own[size], key), digits) for size in sizes if own[size])
                    for key, digits in (
                        ("bound", 2),
                        ("teacher_drawn", 1),
                        (f"parallel_{low:g}", 2),
                    )
                ),
                ", ".join(f"{seconds:.1f}" for seconds in spent),
            )
        )
    return "\n".join(lines)


def _mean(runs: Sequence[Record], key: str) -> float:
    return statistics.fmean(run[key]["mean"] for run in runs)


def table(align: str, *titles: str) -> list[str]:
    """The first two lines of a table; the first column is set left if `align` is for numbers."""
    first = "---" if titles[0] in ("", "target") else align
    return [row(*titles), row(first, *[align] * (len(titles) - 1))]


def row(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def minus(value: float, digits: int) -> str:
    """With a real minus sign."""
    return f"{value:.{digits}f}".replace("-", "−")


def three_figures(value: float) -> str:
    """1.02, 26.0, 133."""
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}"


def with_error(value: float | None, std_err: float | None) -> str:
    """0.49 ± 0.14; without the error where there is none."""
    if value is None:
        return "–"
    return f"{value:.2f}" + ("" if std_err is None else f" ± {std_err:.2f}")
