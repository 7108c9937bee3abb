"""The on-policy study for people: a table for each size of block, what that size costs, pictures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdm.record import to_json

from .on_policy import DRAWN

Runs = Sequence[dict[str, Any]]
EXACT = ("exact_1", "exact_2", "exact_3")
CONTROLS = ("ce_corpus", "on_policy", "on_policy_8")


def describe(record: dict[str, Any]) -> str:
    """The page and, last, the record as one JSON line."""
    return "\n".join([page(record), to_json(record)])


def page(record: dict[str, Any]) -> str:
    """All of it as Markdown."""
    blocks, settings = record["results"]["blocks"], record["settings"]
    parts = [title(record)]
    for block, found in blocks.items():
        parts += [f"### Blocks of {block}", students(found["runs"], ways(settings))]
        parts += differences(found["differences"], ways(settings))
    if len(blocks) > 1:
        parts.append(by_block(blocks, ways(settings)))
    return "\n\n".join(parts)


def title(record: dict[str, Any]) -> str:
    """What all numbers have in common."""
    settings, text = record["settings"], record["results"]["text"]
    seeds = len(settings["seeds"])
    return (
        f"{settings['steps']} steps of {settings['rows']} rows: {settings['prompt_tokens']} tokens of a"
        f" prompt, up to {settings['length']} learnt; {seeds} seed{'s' * (seeds > 1)}. The teacher's own"
        f" text has a log-likelihood of {text['teacher_log_prob']:.3f} ±"
        f" {text['teacher_log_prob_std_err']:.3f} nats a token. `start` is the student before any step."
        f" Bounds in nats a token, {settings['holes']} held-out holes of each length,"
        f" {settings['samples']} texts written in each way: greedily at a threshold, and drawn at"
        " temperature 1 by low_confidence, which makes likely texts likelier: higher is not always better."
        " `start` is measured on the first seed. Differences: mean over seeds and 95 % t-interval, each by"
        " itself; those of texts are between means, not paired by text."
    )


def ways(settings: dict[str, Any]) -> list[str]:
    """How students wrote, by name."""
    return [*(f"{threshold:g}" for threshold in settings["thresholds"]), DRAWN]


def students(runs: Runs, written: Sequence[str]) -> str:
    """A line for each arm: means over seeds."""
    lines = [
        _row([
            "arm", "bound", "on teacher's text", "exact 1 / 2 / 3",
            *(f"teacher's nats, tokens a forward, {way}" for way in written),
            "s a step", "of it rollouts",
        ]),
        _row(["---", *["--:"] * (5 + len(written))]),
    ]  # fmt: skip
    for arm in dict.fromkeys(run["arm"] for run in runs):
        own = [run for run in runs if run["arm"] == arm]
        steps = sum(run["steps"] for run in own)
        lines.append(
            _row([
                f"`{arm}`",
                f"{_mean(own, 'bound'):.3f}",
                f"{_mean(own, 'bound_teacher'):.3f}",
                " / ".join(f"{_mean(own, name):.1%}" for name in EXACT),
                *(
                    f"{_mean(own, f'teacher_{way}'):.3f}, {_mean(own, f'parallel_{way}'):.2f}"
                    for way in written
                ),
                f"{sum(run['seconds'] for run in own) / steps:.2f}" if steps else "–",
                f"{sum(run['rollout_seconds'] for run in own) / steps:.2f}" if steps else "–",
            ])
        )  # fmt: skip
    return "\n".join(lines)


def differences(lines: Runs, written: Sequence[str]) -> list[str]:
    """Paired differences with t-intervals, one table for each control."""
    tables = []
    shown = ["bound", "bound_teacher", "exact_1", *(f"teacher_{way}" for way in written)]
    for place, reference in enumerate(CONTROLS):
        own = [line for line in lines if line["minus"] == reference and line["arm"] != "start"]
        arms = [
            arm
            for arm in dict.fromkeys(line["arm"] for line in own)
            # What is told against one control needs no second telling the other way round.
            if arm not in CONTROLS[:place]
        ]
        if not arms:
            continue
        table = [_row([f"minus `{reference}`", *shown]), _row(["---", *["--:"] * len(shown)])]
        for arm in arms:
            of = {line["measure"]: line for line in own if line["arm"] == arm}
            table.append(_row([f"`{arm}`", *(_difference(of[name]) for name in shown)]))
        tables.append("\n".join(table))
    return tables


def by_block(blocks: dict[str, dict[str, Any]], written: Sequence[str]) -> str:
    """How quality changes with the size of blocks, arm by arm: the largest minus the smallest."""
    first, last = min(blocks, key=int), max(blocks, key=int)
    names = ["bound", *(f"teacher_{way}" for way in written)]
    lines = [
        f"### Blocks of {last} minus blocks of {first}",
        "",
        _row(["arm", *names]),
        _row(["---", *["--:"] * len(names)]),
    ]
    for arm in dict.fromkeys(run["arm"] for run in blocks[first]["runs"]):
        cells = []
        for name in names:
            gaps = [
                large[name]["mean"] - small[name]["mean"]
                for large in blocks[last]["runs"]
                for small in blocks[first]["runs"]
                if large["arm"] == small["arm"] == arm and large["seed"] == small["seed"]
            ]
            error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None
            cells.append(
                f"{statistics.fmean(gaps):+.3f}" + ("" if error is None else f" ± {error:.3f}")
            )
        lines.append(_row([f"`{arm}`", *cells]))
    return "\n".join([*lines, "", "(mean over seeds ± standard error over seeds)"])


def plot(record: dict[str, Any], image: Path) -> bool:
    """Quality against the size of blocks, and against tokens a forward; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    blocks, thresholds = record["results"]["blocks"], record["settings"]["thresholds"]
    sizes = sorted(map(int, blocks))
    arms = list(dict.fromkeys(run["arm"] for run in blocks[str(sizes[0])]["runs"]))
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for arm in arms:
        own = {
            size: [run for run in blocks[str(size)]["runs"] if run["arm"] == arm] for size in sizes
        }
        style = {"marker": "o", "label": arm, "alpha": 0.4 if arm == "start" else 1.0}
        left.plot(sizes, [_mean(own[size], "bound") for size in sizes], **style)
        middle.plot(sizes, [_mean(own[size], f"teacher_{DRAWN}") for size in sizes], **style)
        right.plot(
            [_mean(own[sizes[-1]], f"parallel_{t:g}") for t in thresholds],
            [_mean(own[sizes[-1]], f"teacher_{t:g}") for t in thresholds],
            **style,
        )
    for axes in (left, middle):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, list(map(str, sizes)))
        axes.set_xlabel("tokens a block")
    left.set(ylabel="held-out bound, nats a token (lower is better)")
    middle.set(
        ylabel="teacher's log-likelihood of samples, nats a token",
        title="drawn at temperature 1",
    )
    right.set(
        xlabel="tokens a forward",
        ylabel="teacher's log-likelihood, nats a token",
        title=f"blocks of {sizes[-1]}, greedily, a point a threshold",
    )
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.savefig(image, dpi=120)
    return True


def _mean(runs: Runs, name: str) -> float:
    return statistics.fmean(run[name]["mean"] for run in runs)


def _difference(line: dict[str, Any]) -> str:
    form = "+.1%" if line["measure"].startswith("exact") else "+.3f"
    if line["interval"] is None:
        return f"{line['mean']:{form}}"
    low, high = line["interval"]
    return f"{line['mean']:{form}} ({low:{form}} … {high:{form}})"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
