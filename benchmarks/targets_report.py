"""What `mdm bench targets` found, for people: a card, all lines as a Markdown table, a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mdm.record import to_json

COLUMNS = (  # title, key, digits; the error of a key is key_std_err
    ("TV", "tv", 3),
    ("KL", "kl", 2),
    ("squared", "squared", 3),
    ("lean", "lean", 3),
    ("ESS", "ess", 1),
    ("ms", "ms", 1),
    ("tokens", "tokens", 0),
    ("heads", "heads", 0),
    ("calls", "forwards", 2),
)
WIDTH = 15
LEGEND = (
    "per target: milliseconds, teacher tokens read, head rows, calls; TV, KL (nats) and squared distance"
    " to the reference; lean = 0 for an unbiased target on teacher text; * = nothing faster is as close"
)

Line = dict[str, Any]


def sections(results: dict[str, Any]) -> Iterator[tuple[Line, list[Line]]]:
    """Each reference with the lines that were compared with it."""
    for reference in results["references"]:
        own = [line for line in results["lines"] if _same(line, reference)]
        yield reference, own


def _same(line: Line, reference: Line) -> bool:
    return (line["masks"], line["where"]) == (reference["masks"], reference["where"])


def worth(results: dict[str, Any], line: Line) -> bool:
    """Is the line closer than all that take less time?"""
    return any(
        _same(line, best)
        and (line["estimator"], line["fills"]) == (best["estimator"], best["fills"])
        for best in results["front"]
    )


def title(settings: dict[str, Any]) -> str:
    """What was measured, in a line."""
    return (
        f"soft targets of {settings['teacher']} ({settings['dtype']}), text {settings['text']}:"
        f" {settings['rows']} rows, block of {settings['block']} after {settings['context']} tokens;"
        f" student: {settings['student'] or 'left out (--student names one)'}"
    )


def heading(reference: Line, settings: dict[str, Any]) -> str:
    """The section's positions and how sure its reference is."""
    right = "something visible" if reference["where"] == "hole" else "nothing visible"
    return (
        f"t = {reference['level']}, {reference['masks']} of {settings['block']} masked, {right} to the"
        f" right: {reference['n']} positions in {reference['rows']} rows; reference 2 ×"
        f" {settings['reference_fills'] // 2} fills of {settings['reference']} (ESS"
        f" {_number(reference['ess_of_half'], None, 1)}), off by about"
        f" {_number(reference['floor'], reference['floor_std_err'], 3)}, entropy"
        f" {reference['entropy']:.2f} nats"
    )


def cells(line: Line) -> list[str]:
    """The numbers of a line as text, in the order of COLUMNS; empty where there is none."""
    return [_number(line[key], line.get(f"{key}_std_err"), digits) for _, key, digits in COLUMNS]


def _number(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return ""
    known = error is not None and math.isfinite(error)
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if known else "")


def describe(record: dict[str, Any]) -> str:
    """The card: baselines, the most fills of each kind, all that is worth its price; last the JSON line.

    Raises nothing; a section without lines is only its heading.
    """
    results, settings = record["results"], record["settings"]
    lines = [title(settings), LEGEND]
    most = max(settings["fills"])
    for reference, own in sections(results):
        lines += ["", heading(reference, settings)]
        lines.append(" " * 21 + "".join(f"{name:>{WIDTH}}" for name, _, _ in COLUMNS))
        for line in own:
            best = worth(results, line)
            if best or line["fills"] in (None, most):
                name = f"{line['estimator']} {line['fills'] or ''}"
                numbers = "".join(f"{cell:>{WIDTH}}" for cell in cells(line))
                lines.append(f"{'*' if best else ' '} {name:19}{numbers}")
    return "\n".join([*lines, to_json(record)])


def markdown(record: dict[str, Any]) -> str:
    """All lines as Markdown tables, one for each noise level and kind of position."""
    results, settings = record["results"], record["settings"]
    lines = [title(settings) + ".", "", LEGEND.replace("*", "bold") + "."]
    for reference, own in sections(results):
        lines += ["", heading(reference, settings) + ":", ""]
        lines.append(_row(["target", "K", *(name for name, _, _ in COLUMNS)]))
        lines.append(_row(["---", *["---:"] * (1 + len(COLUMNS))]))
        for line in own:
            name = f"`{line['estimator']}`"
            if worth(results, line):
                name = f"**{name}**"
            lines.append(_row([name, str(line["fills"] or ""), *cells(line)]))
    return "\n".join([*lines, ""])


def _row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def plot(record: dict[str, Any], path: Path) -> None:
    """Total variation against milliseconds a target at holes: a panel a noise level, a line an estimator.

    A hard target costs nothing and is a dashed line; the reference's own error is dotted.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [part for part in sections(record["results"]) if part[0]["where"] == "hole"]
    figure, axes = plt.subplots(
        1, max(1, len(panels)), figsize=(4 * max(1, len(panels)), 4), layout="constrained",
        squeeze=False, sharey=True,
    )  # fmt: skip
    names = list(dict.fromkeys(line["estimator"] for _, own in panels for line in own))
    names = [name for name in names if name != "hard"]
    colors = plt.get_cmap("tab20")
    for axis, (reference, own) in zip(axes[0], panels, strict=False):
        axis.axhline(reference["floor"], color="grey", linestyle=":", label="reference's own error")
        for line in own:
            if line["estimator"] == "hard":
                axis.axhline(line["tv"], color="grey", linestyle="--", label="hard")
        for number, name in enumerate(names):
            points = [line for line in own if line["estimator"] == name]
            axis.errorbar(
                [line["ms"] for line in points],
                [line["tv"] for line in points],
                yerr=[line["tv_std_err"] for line in points],
                marker="o", markersize=4, linewidth=1, elinewidth=0.5,
                color=colors(number % colors.N), label=name,
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("milliseconds a target")
        axis.set_title(f"t = {reference['level']}, {reference['masks']} masks", fontsize=10)
    axes[0][0].set_ylabel("total variation to the reference")
    if panels:
        figure.legend(
            *axes[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False
        )
    figure.savefig(path, dpi=150)
    plt.close(figure)
