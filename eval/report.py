"""Results as a Markdown table, for the screen and for a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def markdown(record: Mapping[str, Any]) -> str:
    """What was evaluated, and the table of its scores."""
    model = record["model"]
    title = f"{model['kind']} {model['source']} (weights {record['checkpoint']})"
    return f"{title}\n\n{table(record['results'])}"


def table(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """One line a score: value, its error from the items, its error from Monte Carlo, items."""
    lines = [
        "| task | metric | value | ± items | ± Monte Carlo | 95 % | n |",
        "|---|---|--:|--:|--:|---|--:|",
    ]
    for task, scores in results.items():
        for metric, score in scores.items():
            interval = score["interval"]
            spread = f"{interval[0]:.3f} – {interval[1]:.3f}" if interval else ""
            lines.append(
                f"| {task} | {metric} | {_number(score['value'])} | {_number(score['std_err'])}"
                f" | {_number(score['mc_std_err'])} | {spread} | {score['n']} |"
            )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    if value == 0:
        return "0"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
