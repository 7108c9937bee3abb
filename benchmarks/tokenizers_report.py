"""The study of tokenizers for people: a table of arms, one of differences, the record as a last line."""

from __future__ import annotations

import statistics
from typing import Any

from mdm.record import to_json


def describe(record: dict[str, Any]) -> str:
    """Markdown tables and, last, the record as one JSON line."""
    results, settings = record["results"], record["settings"]
    lines = [
        f"students with {settings['small']} tokens, {len(settings['seeds'])} seeds,"
        f" {settings['steps']} steps of {settings['rows']} x {settings['length']} tokens",
        "",
        "| teacher | tokens | bytes a token | held-out nats a byte |",
        "|---|--:|--:|--:|",
    ]
    for name, teacher in results["teachers"].items():
        lines.append(
            f"| {name} | {teacher['tokens']} | {teacher['bytes_per_token']:.2f} |"
            f" {teacher['nats_per_byte']:.3f} |"
        )
    lines += [
        "",
        "| arm | bound, nats a token | - ce (95 %) | - shared (95 %) | answered | lost | s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for arm in dict.fromkeys(run["arm"] for run in results["runs"]):
        own = [run for run in results["runs"] if run["arm"] == arm]
        lines.append(
            f"| {arm} | {_mean(own, 'bound'):.3f} | {_difference(results, arm, 'ce')} |"
            f" {_difference(results, arm, 'shared')} | {_share(own, 'target_answered')} |"
            f" {_share(own, 'target_lost')} | {_mean(own, 'seconds'):.0f} |"
        )
    return "\n".join([*lines, to_json(record)])


def _mean(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.fmean(run[name] for run in runs)


def _share(runs: list[dict[str, Any]], name: str) -> str:
    return f"{_mean(runs, name):.2%}" if name in runs[0] else "-"


def _difference(results: dict[str, Any], arm: str, reference: str) -> str:
    for line in results["differences"]:
        if (line["arm"], line["minus"]) == (arm, reference):
            if line["interval"] is None:
                return f"{line['mean']:+.3f}"
            low, high = line["interval"]
            return f"{line['mean']:+.3f} ({low:+.3f} … {high:+.3f})"
    return "-"
