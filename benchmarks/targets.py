"""Soft targets on a real teacher: what each costs, and how far it is from q(v) = P(x_i = v | visible).

Rows of real code: clean context, then one block with an exact number of masks. In every row of a noise
level all masks are asked for at once, first those with visible tokens to their right in the block
("hole"), then the others ("tail"); evidence ends with the block. The truth is not known: the reference
is the mean of two independent answers with many fills, and what separates the two is its own error.
On real code the visible tokens surprise fresh fills so much that a few of hundreds carry the weight; so
fills for the reference are drawn from a proposal that has learnt from earlier ones (`adaptive`). What both
halves have missed is in no number here: see the effective number of fills beside them.

The mean over positions of a distance contains the randomness of the answer: a hard target is far from q
at every position and may still be right on average. So each line has
    tv       ½ Σ |e - q|, noise and bias of the estimate e, and at most `floor` of the reference
    kl       KL(q ‖ 0.99 e + 0.01 left-only), nats: finite also where e misses tokens
    squared  Σ (e - q)², made of the two halves A, B of the reference as Σ (e - A)(e - B), so that the
             reference's own variance drops out
    lean     Σ (e - q) q as Σ e (A + B)/2 - Σ A B: over texts drawn from the teacher its mean is 0 for
             every unbiased target. On other texts it also shows how well the teacher knows the text
Tokens that an estimate has not kept share its tail in the proportions of left-only.
Shapes: B rows, L length, N positions asked for, V teacher vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mdm.checkpoint import load_denoiser, load_vocab, weights_hash
from mdm.config import require
from mdm.denoiser import Denoiser
from mdm.diffusion import apply_mask, mask_exactly, row_uniforms
from mdm.errors import check_known
from mdm.record import append_record, make_record
from mdm.train.asking import own_distributions
from mdm.train.masking import MaskedBatch
from mdm.train.supervision import DTYPES
from mdm.train.targets import Question, SoftTargets, TargetSettings
from mdm.train.teachers.ar import ARTeacher, load_teacher
from mdm.train.teachers.kinds import answer, asks_student, check_target

from .counting import COUNTS, CountingTeacher
from .target_references import REFERENCES, dense, left_only, with_draw
from .target_texts import TEXTS

TOP_K = 64  # tokens kept, as in training
KL_MIX = 0.01
MARGIN = 0.01
DISTANCES = ("tv", "kl", "squared", "lean")
# Estimators with a number of fills, and how they differ from the settings of all.
FILLED: dict[str, dict[str, Any]] = {
    "mc_literal": {"kind": "mc_literal"},
    "importance": {"kind": "importance"},
    "smc": {"kind": "smc"},
    "i_sir": {"kind": "i_sir"},
    "i_sir_span": {"kind": "i_sir", "fill": "span"},
    "csmc": {"kind": "csmc"},
    "student": {"kind": "student"},
    "student_span": {"kind": "student", "fill": "span"},
}


@dataclasses.dataclass(frozen=True)
class TargetsBench:
    """What is measured; see `mdm bench targets --help`. `student` None: no student is asked."""

    teacher: str
    student: str | None
    text: str
    rows: int
    context: int
    block: int
    levels: tuple[float, ...]
    fills: tuple[int, ...]
    candidates: int
    prune: float
    draws: int
    reference: str
    reference_fills: int
    dtype: str
    seed: int

    def __post_init__(self) -> None:
        check_known("--text", self.text, TEXTS)
        check_known("--reference", self.reference, REFERENCES)
        check_known("--dtype", self.dtype, DTYPES)
        for name, least in {
            "rows": 1,
            "draws": 1,
            "context": 1,
            "block": 2,
            "candidates": 1,
        }.items():
            value = getattr(self, name)
            require(value >= least, f"--{name} must be >= {least}; got {value}")
        require(min(self.fills, default=0) >= 1, f"--fills must be numbers >= 1; got {self.fills}")
        require(bool(self.levels), "--levels must name a noise level")
        for level in self.levels:
            require(
                1 <= round(level * self.block) <= self.block,
                f"--levels must mask 1 to {self.block} tokens of a block; {level} masks"
                f" {round(level * self.block)}",
            )
        require(
            self.reference_fills >= 2 * max(self.fills),
            f"--reference-fills are for two halves, each with at least as many as --fills has; got"
            f" {self.reference_fills} for {max(self.fills)}",
        )
        require(0 < self.prune < 1, f"--prune must be in (0, 1); got {self.prune}")


@dataclasses.dataclass(frozen=True)
class Estimator:
    """A line of the table. `target` None is the hard target: the text's own token."""

    name: str
    fills: int | None
    target: TargetSettings | None


@dataclasses.dataclass(frozen=True)
class Group:
    """Positions of one noise level and kind; `row_N` is the row of the text each is from.

    `halves` are two independent references, `left_NV` the left-only distribution, `ess_N` the effective
    number of fills in a half.
    """

    level: float
    masks: int
    where: str
    question: Question
    row_N: torch.Tensor
    left_NV: torch.Tensor
    halves: tuple[torch.Tensor, torch.Tensor]
    ess_N: torch.Tensor

    @property
    def num_rows(self) -> int:
        """Rows that have such positions."""
        return len(self.question.x0_BL)


def run(
    settings: TargetsBench, path: Path, tell: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure, append the record to `path`, return it. `tell` hears how far it is."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = load_denoiser(settings.student).to(device) if settings.student else None
    vocab = student.vocab if student else load_vocab(settings.teacher)
    loaded = load_teacher(settings.teacher, vocab, dtype=DTYPES[settings.dtype])
    teacher = CountingTeacher.of(loaded)
    teacher.model.to(device)
    todo = estimators(settings, with_student=student is not None)
    for estimator in todo:
        if estimator.target:
            check_target(estimator.target, teacher.num_tokens)
    length = settings.context + settings.block
    require(
        length <= teacher.max_length,
        f"--context and --block make {length} tokens, more than the {teacher.max_length} that"
        f" {settings.teacher} was built for",
    )
    x0_BL = TEXTS[settings.text](teacher, vocab, settings).to(device)
    results: dict[str, Any] = {"references": [], "lines": [], "front": []}
    for group in groups(teacher, x0_BL, settings):
        tell(f"{group.masks} masks, {group.where}: {len(group.row_N)} positions")
        if not results["lines"]:
            warm_up(teacher, student, group, todo)
        results["references"].append(reference_line(group))
        lines = measure(teacher, student, group, todo, settings)
        results["lines"] += lines
        results["front"] += front(lines)
    record = make_record(
        "bench targets",
        results,
        settings=dataclasses.asdict(settings),
        seed=settings.seed,
        checkpoint=weights_hash(settings.student) if settings.student else None,
    )
    append_record(path, record)
    return record


# --- questions --------------------------------------------------------------------------------------


def groups(teacher: ARTeacher, x0_BL: torch.Tensor, settings: TargetsBench) -> Iterator[Group]:
    """Holes, then tails, of every noise level, each with its reference; empty groups are left out."""
    num_rows, length = x0_BL.shape
    able_BL = torch.zeros(num_rows, length, dtype=torch.bool)
    able_BL[:, settings.context :] = True
    uniforms_BL = row_uniforms("bench masks", settings.seed, 0, range(num_rows), length)
    for level in settings.levels:
        masks = round(level * settings.block)
        masked_BL = mask_exactly(torch.full((num_rows,), masks), able_BL, uniforms_BL)
        followed_BL = (able_BL & ~masked_BL).flip(1).cumsum(1).flip(1) > 0
        whole = question_of(x0_BL, masked_BL, masked_BL, (settings.seed, masks), range(num_rows))
        left_MV = left_only(teacher, whole)
        found = REFERENCES[settings.reference](teacher, whole, settings, left_MV)
        half_MV = [dense(half, left_MV) for half in found]
        ess_M = torch.stack([half.measures["ess"].cpu() for half in found]).mean(0)
        for where, own_BL in {"hole": followed_BL, "tail": ~followed_BL}.items():
            wanted_BL = masked_BL & own_BL
            if bool(wanted_BL.any()):
                rows = wanted_BL.any(1).nonzero()[:, 0].tolist()
                own_M = wanted_BL[masked_BL]
                yield Group(
                    level,
                    masks,
                    where,
                    question_of(x0_BL, masked_BL, wanted_BL, (settings.seed, masks), rows),
                    wanted_BL.nonzero()[:, 0],
                    left_MV[own_M],
                    (half_MV[0][own_M], half_MV[1][own_M]),
                    ess_M[own_M],
                )


def question_of(
    x0_BL: torch.Tensor,
    masked_BL: torch.Tensor,
    wanted_BL: torch.Tensor,
    key: tuple[int, ...],
    rows: Sequence[int],
) -> Question:
    """The question about these rows of the text."""
    index, device = list(rows), x0_BL.device
    return Question(
        x0_BL[index],
        masked_BL[index].to(device),
        wanted_BL[index].to(device),
        torch.zeros_like(x0_BL[index]),
        tuple((*key, row) for row in rows),
    )


def reference_line(group: Group) -> dict[str, Any]:
    """How sure the reference is.

    floor: half the total variation between its halves. Their difference has twice the standard
    deviation that their mean has, so this is about the distance of the mean from the truth.
    """
    a_NV, b_NV = group.halves
    floor, error = clustered((a_NV - b_NV).abs().sum(-1) / 4, group.row_N)
    q_NV = (a_NV + b_NV) / 2
    entropy, entropy_error = clustered(-torch.xlogy(q_NV, q_NV).sum(-1), group.row_N)
    return {
        "level": group.level,
        "masks": group.masks,
        "where": group.where,
        "floor": floor,
        "floor_std_err": error,
        "entropy": entropy,
        "entropy_std_err": entropy_error,
        "ess_of_half": _mean_known(group.ess_N.tolist()),
        "n": len(group.row_N),
        "rows": group.num_rows,
    }


# --- estimators -------------------------------------------------------------------------------------


def estimators(settings: TargetsBench, *, with_student: bool) -> list[Estimator]:
    """All lines of the table, in its order."""
    base = TargetSettings(top_k=TOP_K, window=0, candidates=settings.candidates)
    scored = dataclasses.replace(base, kind="suffix")
    found = [
        Estimator("hard", None, None),
        Estimator("left", None, base),
        Estimator("suffix", None, scored),
        Estimator("suffix_pruned", None, dataclasses.replace(scored, prune=settings.prune)),
    ]
    for name, change in FILLED.items():
        if change["kind"] == "student" and not with_student:
            continue
        for fills in settings.fills:
            found.append(Estimator(name, fills, dataclasses.replace(base, **change, fills=fills)))
    return found


def measure(
    teacher: CountingTeacher,
    student: Denoiser | None,
    group: Group,
    todo: Sequence[Estimator],
    settings: TargetsBench,
) -> list[dict[str, Any]]:
    """One line for each estimator; they take turns, once a draw."""
    turns: dict[int, list[Turn]] = {number: [] for number in range(len(todo))}
    for draw in range(settings.draws):
        question = with_draw(group.question, draw)
        for number, estimator in enumerate(todo):
            turns[number].append(turn(teacher, student, group, question, estimator))
    return [line_of(group, todo[number], found) for number, found in turns.items()]


def warm_up(
    teacher: ARTeacher, student: Denoiser | None, group: Group, todo: Sequence[Estimator]
) -> None:
    """Each estimator once, those with fills with the fewest; not timed."""
    seen: set[str] = set()
    for estimator in todo:
        if estimator.target and estimator.name not in seen:
            seen.add(estimator.name)
            ask(teacher, student, group.question, estimator.target)


@dataclasses.dataclass(frozen=True)
class Turn:
    """One answer: seconds it took, what the teacher read, and (N,) distances and measures."""

    seconds: float
    counts: dict[str, int]
    distances: dict[str, torch.Tensor]
    measures: dict[str, torch.Tensor]


def turn(
    teacher: CountingTeacher,
    student: Denoiser | None,
    group: Group,
    question: Question,
    estimator: Estimator,
) -> Turn:
    """Ask once and compare with the reference."""
    if estimator.target is None:
        one_N = question.x0_BL[question.wanted_BL].cpu()
        hard_NV = torch.zeros_like(group.left_NV).scatter_(1, one_N[:, None], 1.0)
        return Turn(0.0, dict.fromkeys(COUNTS, 0), distances(hard_NV, group), {})
    teacher.take()
    _synchronize(question.x0_BL.device)
    began = time.perf_counter()
    found = ask(teacher, student, question, estimator.target)
    _synchronize(question.x0_BL.device)
    seconds = time.perf_counter() - began
    measures = {name: value_N.cpu() for name, value_N in found.measures.items()}
    return Turn(seconds, teacher.take(), distances(dense(found, group.left_NV), group), measures)


def ask(
    teacher: ARTeacher, student: Denoiser | None, question: Question, target: TargetSettings
) -> SoftTargets:
    """The answer as a training step asks for it, the student's proposals included."""
    if asks_student(target):
        assert student is not None, "estimators() leaves these out"
        question = dataclasses.replace(question, proposals=proposals(student, question))
    return answer(teacher, question, settings=target, temperature=1.0)


def proposals(student: Denoiser, question: Question) -> SoftTargets:
    """The student's distributions at all masks of the question."""
    masked_BL = question.masked_BL
    batch = MaskedBatch(
        x0_BL=question.x0_BL,
        xt_BL=apply_mask(question.x0_BL, masked_BL, student.mask_id),
        document_ids_BL=question.document_ids_BL,
        maskable_BL=masked_BL,
        masked_BL=masked_BL,
        distilled_BL=question.wanted_BL,
        ce_weight_BL=masked_BL.float(),
        kd_weight_BL=masked_BL.float(),
        level_BL=masked_BL.float(),
        denominator=1.0,
        kd_denominator=1.0,
        keys=question.keys,
        block_size=student.block_size or 0,
    )
    return own_distributions(student, batch, TOP_K)


def line_of(group: Group, estimator: Estimator, turns: Sequence[Turn]) -> dict[str, Any]:
    """A line of the record: means over positions, errors clustered by row; costs a target."""
    count = len(group.row_N)
    milliseconds = [1000 * found.seconds / count for found in turns]
    line: dict[str, Any] = {
        "level": group.level,
        "masks": group.masks,
        "where": group.where,
        "estimator": estimator.name,
        "fills": estimator.fills,
    }
    for name in DISTANCES:
        value_N = torch.stack([found.distances[name] for found in turns]).mean(0)
        line[name], line[f"{name}_std_err"] = clustered(value_N, group.row_N)
    for name in ("ess", "fell_back", "dropped"):
        known = [value for found in turns for value in found.measures.get(name, torch.empty(0))]
        line[name] = _mean_known([float(value) for value in known])
    line["ms"] = statistics.fmean(milliseconds)
    line["ms_std_err"] = (
        statistics.stdev(milliseconds) / len(turns) ** 0.5 if len(turns) > 1 else math.nan
    )
    for name in COUNTS:
        line[name] = statistics.fmean(found.counts[name] for found in turns) / count
    return {**line, "n": count, "rows": group.num_rows, "draws": len(turns)}


def front(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines that are closer, by MARGIN of total variation, than all that take less time; by time."""
    best, found = math.inf, []
    for line in sorted(lines, key=lambda line: (line["ms"], line["tv"])):
        if line["tv"] < best - MARGIN:
            best = line["tv"]
            found.append(line)
    keys = ("level", "masks", "where", "estimator", "fills", "ms", "tv")
    return [{key: line[key] for key in keys} for line in found]


# --- distances --------------------------------------------------------------------------------------


def distances(estimate_NV: torch.Tensor, group: Group) -> dict[str, torch.Tensor]:
    """(N,) each of DISTANCES, see the top of this file."""
    a_NV, b_NV = group.halves
    q_NV = (a_NV + b_NV) / 2
    mixed_NV = (1 - KL_MIX) * estimate_NV + KL_MIX * group.left_NV
    return {
        "tv": (estimate_NV - q_NV).abs().sum(-1) / 2,
        "kl": (torch.xlogy(q_NV, q_NV) - torch.xlogy(q_NV, mixed_NV)).sum(-1),
        "squared": ((estimate_NV - a_NV) * (estimate_NV - b_NV)).sum(-1),
        "lean": (estimate_NV * q_NV - a_NV * b_NV).sum(-1),
    }


def clustered(value_N: torch.Tensor, row_N: torch.Tensor) -> tuple[float, float]:
    """Mean and its standard error when values of one row depend on one another; NaN for one row.

    The error of a ratio of sums over rows, with the correction R / (R - 1).
    """
    mean = value_N.double().mean()
    rows, index_N = row_N.unique(return_inverse=True)
    sums_R = torch.zeros(len(rows), dtype=torch.float64)
    sums_R.index_add_(0, index_N, value_N.double() - mean)
    if len(rows) < 2:
        return float(mean), math.nan
    variance = sums_R.square().sum() * len(rows) / (len(rows) - 1)
    return float(mean), float(variance.sqrt()) / len(value_N)


def _mean_known(values: Sequence[float]) -> float | None:
    """The mean of those that are numbers; None if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
