"""The student against its teacher: who writes faster, by how much, and at what quality.

TIDE's table (arXiv 2604.26951, table 3: parameters, memory, latency and tokens a second for 256 tokens
at batch 1) and what it leaves out: tokens a forward, forwards by kind, spread, quality at every speed, the
batch from which the teacher is ahead, memory against context. All sides run in one process on one
machine with the same prompts, number type, threads, lengths and policy of ends, and take turns text by
text, so that what else the machine does hits all alike.

Tokens are visible ones: after the prompt, before the first end token. Rates are sums over sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mdm.autoregressive import Autoregressive
from mdm.denoiser import Denoiser
from mdm.errors import ConfigError
from mdm.record import append_record, make_record

from .latency_batches import batches
from .latency_memory import contexts
from .latency_models import (
    Model,
    Models,
    Prompts,
    fallbacks,
    human_eval_prompts,
    in_mode,
    open_models,
    read_bandwidth,
)
from .latency_quality import quality
from .latency_settings import BLOCK_LENGTH, LatencyBench
from .latency_sides import Side, hf_side, plain_side, student_side, teacher_side
from .latency_table import Written, ratios, side_line, take_turns

METRICS = 1  # version of what the numbers mean
Note = Callable[[str], None]

DEFINITIONS = {
    "tokens": "visible: after the prompt, before the first end token; prompt and padding never count."
    " Where texts may end and the vocabulary is shared, the end tokens of all sides end any text; else each"
    " side has its own",
    "timing": "from token ids to the new ids on the host, prefill included, encoding and decoding of text"
    " excluded; one uncounted text a side before (of the plain loop two steps)",
    "tokens_per_forward": "tokens / forwards of a row; forwards that read the prompt or store finished"
    " tokens count, as they decide tokens too",
    "first": "until the first token behind the prompt stands with no gap before it",
    "std_err": "jackknife over texts; of latency, log-likelihood and holes: standard error of the mean",
    "peak_bytes": "weights and the growth of the process (on a GPU: of the allocator) in the uncounted"
    " text, after freed memory was given back",
    "floor_s": "bytes of weights that a forward reads / bandwidth that was measured here",
    "batches": "visible tokens of all rows / seconds until the last row ended",
}


def run(settings: LatencyBench, path: Path, note: Note = lambda _: None) -> dict[str, Any]:
    """Measure, append the record to `path`, return it. `note` hears each line as it comes.

    Raises ConfigError for settings that do not fit the models. Interrupted it leaves no record.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        note("loading both models")
        models = open_models(settings)
        settings = settings.of_student(models.student.block_size)
        results = measured(settings, models, note)
        record = make_record(
            "bench latency",
            results,
            settings=dataclasses.asdict(settings),
            seed=settings.seed,
            checkpoint=results["models"]["student"]["weights"],
        )
    finally:
        torch.set_num_threads(threads)
    append_record(path, record)
    return record


def measured(settings: LatencyBench, models: Models, note: Note) -> dict[str, Any]:
    """All parts that were asked for, the table first."""
    count = max(settings.texts, *settings.batches, 1)
    prompts = human_eval_prompts(models, count, settings.prompt_length, settings.seed)
    described = models.describe(settings)
    device = models.student.device
    opened = open_sides(settings, models, note)
    bandwidth = read_bandwidth(device)
    written = take_turns(
        opened.sides,
        prompts,
        texts=settings.texts,
        plain_texts=settings.plain_texts,
        repeats=settings.repeats,
        length=settings.gen_length,
        device=device,
        note=note,
    )
    pairs = chosen_pairs(settings, opened.sides)
    results: dict[str, Any] = {
        "metrics": METRICS,
        "definitions": DEFINITIONS,
        "device": device.type,
        "shared_vocabulary": models.shared,
        "models": described,
        "bytes_per_s": bandwidth,
        "prompt_tokens": [len(prompts.student[number]) for number in range(settings.texts)],
        "left_out": opened.left_out,
        "sides": table_lines(written, models, described, bandwidth),
        "ratios": ratios(written),
        "quality": quality(written, models, prompts, settings, note) if settings.quality else None,
        "batches": batches(
            pairs,
            prompts,
            settings.batches,
            repeats=settings.repeats,
            length=settings.batch_length,
            note=note,
        )
        if settings.batches
        else None,
        "contexts": contexts(
            [side for pair in pairs for side in pair],
            models,
            settings.contexts,
            student_keeps=models.student.block_size is not None or settings.cache != "none",
            note=note,
        )
        if settings.contexts
        else None,
        "overhead": own_overhead(settings, models, prompts, note) if settings.overhead else None,
    }
    return {**results, "fallbacks": opened.fallbacks()}  # once all is measured


@dataclasses.dataclass(frozen=True)
class Opened:
    """All sides, in the order of the table.

    left_out  modes that cannot be, with the reason
    readers   (who, mode, model) behind the others
    """

    sides: list[Side]
    left_out: list[dict[str, str]]
    readers: list[tuple[str, str, Denoiser | Autoregressive]]

    def fallbacks(self) -> list[dict[str, Any]]:
        """Why forwards of a mode were run eagerly all the same."""
        return [
            {"who": who, "mode": mode, "reason": reason, "forwards": count}
            for who, mode, model in self.readers
            for reason, count in fallbacks(model).items()
        ]


def open_sides(settings: LatencyBench, models: Models, note: Note) -> Opened:
    """Both models in every mode, each with all that it is measured by.

    Raises ConfigError if one of the models can be run in none of the modes.
    """
    opened = Opened([], [], [])
    suppress = settings.suppressed
    for mode in settings.modes:
        student = _opened(opened, "student", models.student, mode, settings, note)
        if student is not None:
            opened.sides.extend(
                student_side(student, decoding, settings.sampler(decoding), mode)
                for decoding in settings.decodings
            )
    if settings.plain_decoding is not None:
        length = settings.block_length or BLOCK_LENGTH
        plain = plain_side(
            models.student, settings.plain_decoding, suppress_eos=suppress, block_length=length
        )
        opened.sides.append(plain)
    for mode in settings.modes:
        teacher = _opened(opened, "teacher", models.teacher, mode, settings, note)
        if teacher is not None:
            opened.sides.append(teacher_side(teacher, suppress_eos=suppress, mode=mode))
    opened.sides.append(hf_side(models.teacher, suppress_eos=suppress))
    if models.shared and not suppress:  # the teacher may know more end tokens than the student
        ends = frozenset().union(*(side.ends for side in opened.sides))
        opened.sides[:] = [dataclasses.replace(side, ends=ends) for side in opened.sides]
    for who in ("student", "teacher"):
        if not any(side.who == who for side in opened.sides):
            reasons = "; ".join(one["reason"] for one in opened.left_out if one["who"] == who)
            raise ConfigError(f"the {who} can be run in no --mode of {settings.modes}: {reasons}")
    return opened


def _opened(
    opened: Opened, who: str, model: Model, mode: str, settings: LatencyBench, note: Note
) -> Model | None:
    """The model in this mode, noted; None if it cannot be, noted with the reason."""
    try:
        found = in_mode(model, mode, cache=settings.cache)
    except ConfigError as error:
        opened.left_out.append({"who": who, "mode": mode, "reason": str(error)})
        note(f"left out: {who} {mode}: {error}")
        return None
    opened.readers.append((who, mode, found))
    return found


def chosen_pairs(settings: LatencyBench, sides: list[Side]) -> list[tuple[Side, Side]]:
    """Student and teacher of every mode that both have, the student with the chosen decoding."""
    return [
        (student, teacher)
        for student in sides
        if student.who == "student" and student.decoding == settings.chosen.name
        for teacher in sides
        if teacher.who == "teacher" and teacher.mode == student.mode
    ]


def table_lines(
    written: list[Written], models: Models, described: dict[str, Any], bandwidth: float
) -> list[dict[str, Any]]:
    """A line for every side."""
    return [
        side_line(
            one,
            described["student" if one.side.who in ("student", "plain") else "teacher"],
            bandwidth,
            twin_of(one, written, models),
        )
        for one in written
    ]


def twin_of(one: Written, written: list[Written], models: Models) -> Written | None:
    """The side that must write the same as this one: a mode or a loop changes time, not text.

    The plain loop reads a model with blocks as it was not trained: then there is none.
    """
    if one.side.who == "plain" and models.student.block_size is not None:
        return None
    who = {"teacher_hf": "teacher", "plain": "student"}.get(one.side.who, one.side.who)
    first = next(w for w in written if (w.side.who, w.side.decoding) == (who, one.side.decoding))
    return None if first is one else first


def own_overhead(
    settings: LatencyBench, models: Models, prompts: Prompts, note: Note
) -> dict[str, Any]:
    """What mdm's loop takes beside the calls of the model."""
    from .latency_overhead import overhead

    note("overhead of the loop")
    return dict(overhead(settings, models, prompts, note))
