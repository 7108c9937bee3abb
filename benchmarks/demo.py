"""The demo: distil the embedded teacher on the standard library and show what was gained.

Everything is measured on held-out files that the student never saw, with the same masks and the same
holes before and after. The teacher fills a hole from its left side alone: it cannot look right.
Shapes: B batch, L length.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mdm.canvas import SamplerSettings
from mdm.checkpoint import load_denoiser, weights_hash
from mdm.config import require, to_tree
from mdm.denoiser import Denoiser
from mdm.diffusion import generator
from mdm.record import append_record, make_record, peak_rss_bytes, to_json
from mdm.sampler import denoise, make_canvas
from mdm.train.dataset import prepare
from mdm.train.recipe import DEFAULT_RECIPE, Recipe
from mdm.train.rows import Rows
from mdm.train.run import Outcome, initial_student, new_run, refuse_existing, results_of
from mdm.train.teachers.ar import ARTeacher, load_teacher
from mdm.train.trainer import train

SPAN, CONTEXT, SHOWN = 3, 24, 4


@dataclasses.dataclass(frozen=True)
class Hole:
    """A span of a held-out row: the tokens of its document up to there, the span, and what follows."""

    before: list[int]
    truth: list[int]
    after: list[int]


def run_demo(recipe: Recipe, runs: Path, *, num_holes: int, console: Console) -> dict[str, Any]:
    """Train, compare, print tables; returns the demo's numbers."""
    began = time.monotonic()
    folder = runs / recipe.name
    if recipe.name != DEFAULT_RECIPE:
        refuse_existing(folder)  # only the demo's own run is replaced without asking
    console.print("[bold]1/3[/] teacher, student and held-out files …")
    student = initial_student(recipe)
    rows = prepare(recipe.data, student.vocab, folder / "data").held_out
    holes = find_holes(rows, student.vocab.start_id, count=num_holes, seed=recipe.train.seed)
    require(
        len(holes) > 1,
        f"the held-out rows have room for {len(holes)} holes; raise data.length above"
        f" {2 * CONTEXT + SPAN}",
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        teacher = load_teacher(recipe.teacher.model, student.vocab, dtype=torch.bfloat16)
        fills = {"teacher, left side only": fill_from_left(teacher, holes)}
        fills["student before"] = fill(student, holes)
    del student, teacher
    new_run(recipe, runs, overwrite=True)
    console.print(f"[bold]2/3[/] distilling into {folder} …")
    outcome = train(recipe, folder)
    console.print("[bold]3/3[/] filling the same holes again …")
    finished = load_denoiser(folder / "final")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fills["student after"] = fill(finished, holes)
    show_levels(console, outcome)
    show_fills(console, finished, holes, fills)
    seconds = time.monotonic() - began
    numbers = summary(outcome, recipe.train.steps, holes, fills, seconds)
    console.print(
        f"{outcome.steps} steps, {outcome.tokens:,} tokens in {outcome.seconds:.0f} s"
        f" ({numbers['train_tokens_per_second']:.0f} tokens/s); whole demo {seconds:.0f} s, peak memory"
        f" {numbers['peak_rss_bytes'] / 2**30:.1f} GiB\n"
        f"model: {folder / 'final'}, loss curve: {folder / 'loss.png'}\n"
        "try:   mdm generate --prefix 'def add(a, b):\\n    total = ' --suffix '\\n    return total'"
        " --span 3 --show",
        soft_wrap=True,
    )
    record = make_record(
        "demo",
        numbers,
        settings=to_tree(recipe),
        seed=recipe.train.seed,
        checkpoint=weights_hash(folder / "final"),
    )
    append_record(folder / "record.jsonl", record)
    return numbers


def find_holes(rows: Rows, start_id: int, *, count: int, seed: int) -> list[Hole]:
    """At most `count` holes in rows drawn at random, one a row, inside its longest document."""
    holes = []
    order = torch.randperm(len(rows), generator=generator("holes", seed)).tolist()
    for index in order:
        data = rows.batch([index])
        ids, documents = data.tokens_BL[0].tolist(), data.document_ids_BL[0]
        longest = max(set(documents.tolist()) - {-1}, key=lambda d: int((documents == d).sum()))
        where = (documents == longest).nonzero()[:, 0].tolist()
        first, last = where[0] + CONTEXT, where[-1] + 1 - CONTEXT - SPAN
        if last < first:
            continue
        draw = torch.randint(first, last + 1, (), generator=generator("hole", seed, index))
        at = int(draw)
        document = ids[where[0] : where[-1] + 1]
        cut = at - where[0]
        assert document[0] == start_id, "a document begins with the start token"
        holes.append(Hole(document[:cut], document[cut : cut + SPAN], document[cut + SPAN :]))
        if len(holes) == count:
            break
    return holes


def fill(student: Denoiser, holes: Sequence[Hole]) -> list[list[int]]:
    """The student's fills: one token a step, the surest first."""
    settings = SamplerSettings(suppress_eos=True)
    canvases = [
        make_canvas(student, [*h.before, *[student.mask_id] * len(h.truth), *h.after], settings)
        for h in holes
    ]
    for _ in denoise(student, canvases):
        pass
    return [
        canvas.ids_L[len(h.before) : len(h.before) + len(h.truth)].tolist()
        for canvas, h in zip(canvases, holes, strict=True)
    ]


@torch.no_grad()
def fill_from_left(teacher: ARTeacher, holes: Sequence[Hole]) -> list[list[int]]:
    """The teacher's greedy continuation of the left side, as many tokens as the hole has."""
    texts = [list(hole.before) for hole in holes]
    for _ in range(SPAN):
        width = max(map(len, texts))
        x_BL = torch.tensor([ids + [0] * (width - len(ids)) for ids in texts])
        last_B = torch.tensor([len(ids) - 1 for ids in texts])
        outputs_BL = torch.zeros_like(x_BL, dtype=torch.bool)
        outputs_BL[torch.arange(len(texts)), last_B] = True
        next_B = teacher.head(teacher.call(x_BL, outputs_BL, None)).argmax(-1)
        texts = [[*ids, token] for ids, token in zip(texts, next_B.tolist(), strict=True)]
    return [ids[-SPAN:] for ids in texts]


def summary(
    outcome: Outcome,
    steps: int,
    holes: list[Hole],
    fills: dict[str, list[list[int]]],
    seconds: float,
) -> dict[str, Any]:
    """The numbers of the demo, flat."""
    results = results_of(outcome)
    names = {"before": "student before", "after": "student after"}
    accuracy = {key: token_accuracy(holes, fills[name]) for key, name in names.items()}
    accuracy["teacher"] = token_accuracy(holes, fills["teacher, left side only"])
    return {
        "nelbo_before": results["before"]["nelbo"],
        "nelbo_before_std_err": results["before"]["nelbo_std_err"],
        "nelbo_after": results["after"]["nelbo"],
        "nelbo_after_std_err": results["after"]["nelbo_std_err"],
        "improvement": results["improvement"],
        "improvement_std_err": results["improvement_std_err"],
        "infill_holes": len(holes),
        **{f"infill_accuracy_{key}": value[0] for key, value in accuracy.items()},
        **{f"infill_accuracy_{key}_std_err": value[1] for key, value in accuracy.items()},
        "seconds": seconds,
        "train_seconds": outcome.seconds,
        "train_steps": outcome.steps,
        "train_steps_planned": steps,
        "train_tokens": outcome.tokens,
        "train_tokens_per_second": outcome.tokens / outcome.seconds,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def token_accuracy(holes: list[Hole], fills: list[list[int]]) -> tuple[float, float]:
    """Share of hole tokens that are right, and its standard error over holes."""
    share = torch.tensor(
        [
            sum(a == b for a, b in zip(hole.truth, ids, strict=True)) / len(ids)
            for hole, ids in zip(holes, fills, strict=True)
        ]
    )
    return float(share.mean()), float(share.std() / len(share) ** 0.5)


def show_levels(console: Console, outcome: Outcome) -> None:
    """The bound and the profile by noise level, before and after."""
    before, after = outcome.before.summary(), outcome.after.summary()
    table = Table(title="Held-out files: masked-token loss (nats) and accuracy by noise level")
    for name in ("masked", "loss before", "loss after", "accuracy before", "accuracy after"):
        table.add_column(name, justify="right")
    for a, b in zip(before["by_noise_level"], after["by_noise_level"], strict=True):
        table.add_row(
            f"{a['t_low']:.0%}-{a['t_high']:.0%}",
            f"{a['cross_entropy']:.2f} ± {a['cross_entropy_std_err']:.2f}",
            f"{b['cross_entropy']:.2f} ± {b['cross_entropy_std_err']:.2f}",
            f"{a['accuracy']:.1%}",
            f"{b['accuracy']:.1%}",
        )
    table.add_section()
    table.add_row(
        "bound",
        f"{before['nelbo']:.2f} ± {before['nelbo_std_err']:.2f}",
        f"{after['nelbo']:.2f} ± {after['nelbo_std_err']:.2f}",
    )
    console.print(table)


def show_fills(
    console: Console, student: Denoiser, holes: list[Hole], fills: dict[str, list[list[int]]]
) -> None:
    """A few holes with every fill, and the share of right tokens over all holes."""
    decode = student.vocab.decode
    for number, hole in enumerate(holes[:SHOWN]):
        left = decode(hole.before).splitlines()[-3:]
        right = decode(hole.after).splitlines()[:2]
        console.print(
            f"\n[bold]hole {number + 1}[/]\n[dim]{escape(chr(10).join(left))}[/]"
            f"[reverse]{'░' * SPAN}[/][dim]{escape(chr(10).join(right))}[/]"
        )
        answers = {"the file": hole.truth, **{k: v[number] for k, v in fills.items()}}
        for name, ids in answers.items():
            right_tokens = sum(a == b for a, b in zip(hole.truth, ids, strict=True))
            console.print(f"  {name:<24} {escape(repr(decode(ids))):<40} {right_tokens}/{SPAN}")
    table = Table(
        title=f"\nRight tokens over {len(holes)} holes of {SPAN} tokens in held-out files"
    )
    table.add_column("filled by")
    table.add_column("right", justify="right")
    for name, all_ids in fills.items():
        share, std_err = token_accuracy(holes, all_ids)
        table.add_row(name, f"{share:.1%} ± {std_err:.1%}")
    console.print(table)


def last_line(numbers: dict[str, Any]) -> str:
    """The demo's result for programs."""
    return to_json({"demo": numbers})
