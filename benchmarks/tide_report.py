"""The TIDE pipelines for people: tables of students and of differences, and what to mind."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from mdm.record import to_json

EXACT = ("exact_1", "exact_2", "exact_3")
TITLES = {
    "shared": "One tokenizer (noise by blocks)",
    "cross": "A tokenizer of the student's own (noise by rows)",
}
NOTES = {
    "shared": "",
    "cross": "`ce_cross` masks token by token, the others whole chunks; `ce_chunks` has their masks and a"
    " distillation weight of 1e-9. What an arm owes to its teacher is its difference to `ce_chunks`"
    " (`published_calm` has masks of its own, too). Bounds a byte are of the same held-out part, but not of"
    " the same text: other tokens make other rows.",
}


def describe(record: dict[str, Any]) -> str:
    """The page and, last, the record as one JSON line."""
    return "\n".join([page(record), to_json(record)])


def page(record: dict[str, Any]) -> str:
    """All of it as Markdown."""
    results, settings = record["results"], record["settings"]
    return "\n\n".join([
        title(settings),
        teacher(results["teacher"]),
        *(
            "\n\n".join([
                *pipeline(name, found),
                *filter(None, [doubt(results["pipelines"]["shared"]["differences"])]),
                *first(results["first"].get(name)),
            ])
            for name, found in results["pipelines"].items()
        ),
    ])  # fmt: skip


def title(settings: dict[str, Any]) -> str:
    """What all numbers have in common."""
    seeds = len(settings["seeds"])
    interval = "its 95 % t-interval" if seeds > 1 else "no interval, as there is one seed"
    return (
        f"Students of {settings['layers'] or 'all'} layers in blocks of {settings['block']},"
        f" {settings['steps']} steps of {settings['rows']} × {settings['length']} tokens,"
        f" objective.weight={settings['weight']}, {seeds} seed{'s' * (seeds > 1)},"
        f" {settings['holes']} held-out holes of each length; bounds in nats a token. Differences are"
        f" paired (same rows, masks and holes): mean over seeds and {interval}, each by itself, not"
        " corrected for their number. Seeds vary the order of rows, masks and holes; teacher, first"
        " student, tokenizer and held-out rows are the same: intervals say nothing about others."
    )


def teacher(found: dict[str, Any]) -> str:
    """How good the teacher is by itself."""
    bound = found["bound"]
    return (
        f"The teacher has all layers and was trained for {found['steps']} steps: bound"
        f" {found['bound_before']:.3f} before, {bound['mean']:.3f} ± {bound['std_err']:.3f} after, on"
        " masks of its own. As `teacher` below it is measured on the students'."
    )


def first(found: dict[str, Any] | None) -> list[str]:
    """What the students began from; nothing if it was not trained."""
    if found is None:
        return []
    bound = found["bound"]
    return [
        f"All students began from one that was trained for {found['steps']} steps on cross-entropy alone:"
        f" bound {found['bound_before']:.3f} before, {bound['mean']:.3f} ± {bound['std_err']:.3f} after,"
        " on masks of its own."
    ]


def pipeline(name: str, found: dict[str, Any]) -> list[str]:
    """A heading, the students, their differences to the controls, and what to mind."""
    runs, lines = found["runs"], found["differences"]
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    students = [_row(["arm", "bound", "a byte", "exact 1 / 2 / 3", "s a step", "teacher s a step"]),
                _row(["---", *["--:"] * 5])]  # fmt: skip
    for arm in arms:
        own = [run for run in runs if run["arm"] == arm]
        bound = statistics.fmean(run["bound"]["mean"] for run in own)
        exact = (statistics.fmean(run[measure]["mean"] for run in own) for measure in EXACT)
        students.append(
            _row([
                f"`{arm}`",
                f"{bound:.3f}",
                f"{bound / found['bytes_per_token']:.3f}",
                " / ".join(f"{share:.1%}" for share in exact),
                *(_seconds(own, measure) for measure in ("seconds", "teacher_seconds")),
            ])
        )  # fmt: skip
    text = [f"### {TITLES[name]}", "\n".join(students)]
    references = list(dict.fromkeys(line["minus"] for line in lines))
    if references:
        differences = [_row(["arm", "minus", "bound", *(m.replace("_", " ") for m in EXACT)]),
                       _row(["---", "---", *["--:"] * 4])]  # fmt: skip
        for reference in references:
            for arm in arms:
                own = [line for line in lines if (line["arm"], line["minus"]) == (arm, reference)]
                if own:
                    differences.append(_differences(arm, reference, own))
        text.append("\n".join(differences))
    return [*text, *filter(None, [NOTES[name]])]


def doubt(lines: Sequence[dict[str, Any]]) -> str:
    """What to say of a teacher that is not surely better than the control, if one was compared."""
    for line in lines:
        if (line["arm"], line["measure"]) == ("teacher", "bound"):
            interval = line["interval"]
            if interval is None or interval[1] >= 0:
                return (
                    "**The teacher is not shown to be better than the control**, so nothing here says what"
                    " a better one would do."
                )
    return ""


def _differences(arm: str, reference: str, lines: Sequence[dict[str, Any]]) -> str:
    of = {line["measure"]: line for line in lines}
    shares = (_difference(of[measure], "+.1%") for measure in EXACT)
    return _row([f"`{arm}`", f"`{reference}`", _difference(of["bound"], "+.3f"), *shares])


def _difference(line: dict[str, Any], form: str) -> str:
    if line["interval"] is None:
        return f"{line['mean']:{form}}"
    low, high = line["interval"]
    return f"{line['mean']:{form}} ({low:{form}} … {high:{form}})"


def _seconds(runs: Sequence[dict[str, Any]], name: str) -> str:
    total = sum(run[name] for run in runs)
    return f"{total / sum(run['steps'] for run in runs):.2f}" if total else "–"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
