"""The picture of `mdm bench latency`: speed, quality against speed, batches, memory."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdm.errors import ConfigError

from .latency_report import MIB, side_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = dict[str, Any]


def require_matplotlib() -> None:
    """Raise ConfigError if there is nothing to draw with; better before an hour of measuring."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: `pip install mdm-code[plots]`")


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw the parts that were measured, one beside the other."""
    from matplotlib.figure import Figure

    results = record["results"]
    parts = [speed]
    if results["quality"]:
        if results["quality"]["texts"]:
            parts.append(frontier)
        if results["quality"]["infilling"]:
            parts.append(holes)
    if results["batches"]:
        parts.append(by_batch)
    if results["contexts"]:
        parts.append(memory)
    columns = min(3, len(parts))
    rows = -(-len(parts) // columns)
    figure = Figure(figsize=(5.5 * columns, 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for draw, own in zip(parts, axes, strict=False):
        draw(own, results)
        own.grid(alpha=0.3)
    for unused in axes[len(parts) :]:
        unused.set_axis_off()
    figure.savefig(path, dpi=130)


def speed(axes: Axes, results: Line) -> None:
    """Tokens a second, a bar a side."""
    lines = results["sides"][::-1]
    names = [f"{side_name(line)} {line['mode']}" for line in lines]
    colors = {"student": "C0", "plain": "0.6", "teacher": "C1", "teacher_hf": "C3"}
    axes.barh(
        names,
        [line["tokens_per_s"] for line in lines],
        xerr=[_error(line, "tokens_per_s") for line in lines],
        color=[colors[line["who"]] for line in lines],
    )
    axes.tick_params(axis="y", labelsize=7)
    axes.set(xlabel="visible tokens / s, batch 1")


def frontier(axes: Axes, results: Line) -> None:
    """What the teacher thinks of a text against tokens a second in the mode that wrote it.

    Another mode may round otherwise and write another text. The teacher's own text is the lines.
    """
    sides = {(one["who"], one["mode"], one["decoding"]): one for one in results["sides"]}
    texts = results["quality"]["texts"]
    for line in texts:
        own = sides[line["who"], line["mode"], line["decoding"]]
        if line["who"] == "teacher":
            axes.axhline(line["log_likelihood"], color="C1", label="teacher, greedy")
            axes.axvline(own["tokens_per_s"], color="C1", linestyle=":")
            continue
        _point(axes, own, "tokens_per_s", line, "log_likelihood", line["decoding"])
    axes.set(
        xlabel=f"visible tokens / s, {texts[0]['mode']}",
        ylabel="teacher's log-likelihood, nats a token",
    )
    axes.legend(fontsize=7)


def holes(axes: Axes, results: Line) -> None:
    """Right tokens of holes against tokens a forward, a point a decoding."""
    for line in results["quality"]["infilling"]["lines"]:
        _point(axes, line, "tokens_per_forward", line, "right", line["decoding"])
    axes.set(xlabel="tokens a forward, holes", ylabel="share of tokens that are right")
    axes.legend(fontsize=7)


def by_batch(axes: Axes, results: Line) -> None:
    """Aggregate tokens a second by batch; a dotted line where the teacher overtakes."""
    found = results["batches"]
    sizes = sorted({line["batch"] for line in found["lines"]})
    for who, mode in dict.fromkeys((line["who"], line["mode"]) for line in found["lines"]):
        own = [line for line in found["lines"] if (line["who"], line["mode"]) == (who, mode)]
        name = f"{who} {found['decoding']} {mode}" if who == "student" else f"{who} {mode}"
        axes.plot(
            [line["batch"] for line in own],
            [line["tokens_per_s"] for line in own],
            "o-" if who == "student" else "s--",
            label=name,
        )
    for one in found["crossovers"]:
        if one["batch"] is not None:
            axes.axvline(one["batch"], color="0.4", linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set(xlabel="batch", ylabel="visible tokens / s, all rows")
    axes.legend(fontsize=7)


def memory(axes: Axes, results: Line) -> None:
    """Peak above idle by context, and dashed what keys and values take."""
    lines = results["contexts"]["lines"]
    for number, (who, mode) in enumerate(dict.fromkeys((one["who"], one["mode"]) for one in lines)):
        own = [line for line in lines if (line["who"], line["mode"]) == (who, mode)]
        at = [line["context"] for line in own]
        color = f"C{number}"
        peaks = [line["growth_bytes"] / MIB for line in own]
        axes.plot(at, peaks, "o-", color=color, label=f"{who} {mode}")
        axes.plot(at, [line["kept_bytes"] / MIB for line in own], "--", color=color)
    axes.set(xlabel="context, tokens", ylabel="MiB above idle (dashed: keys and values)")
    axes.legend(fontsize=7)


def _point(axes: Axes, x: Line, x_name: str, y: Line, y_name: str, label: str) -> None:
    axes.errorbar(
        x[x_name],
        y[y_name],
        xerr=_error(x, x_name),
        yerr=_error(y, y_name),
        fmt="o",
        label=label,
    )


def _error(line: Line, name: str) -> float:
    """The standard error, 0 where there is none."""
    error = line[f"{name}_std_err"]
    return 0.0 if error is None or error != error else float(error)
