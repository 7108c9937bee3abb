"""Suffix scoring of many candidates on real code: the plain loop, the exact mode, the fast mode.

One mask in 256 tokens of the standard library, 128 candidates, the whole right side as evidence.

    loop         one full forward of `transformers` for each candidate, logits at all positions, the
                 log-probabilities from the mask to the end of the text added up
    exact        target.kind=suffix: shared prefix, packed branches, head on the rows that are needed
    fast         the same with target.prune: hopeless candidates are dropped early
    exact_alone  with one position in a question; without "alone" all positions of a row are asked for
    fast_alone   at once. The other masks then hold the text, so each position still has one unknown

The sides take turns. A turn is all positions of one row; the loop and the sides that work alone may be
timed on fewer of them, the same ones. Ratios compare seconds a position within a turn.
Shapes: L length, N positions, C candidates, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mdm.checkpoint import load_vocab
from mdm.config import require
from mdm.diffusion import generator
from mdm.record import append_record, make_record, to_json
from mdm.train.targets import Question, SoftTargets, TargetSettings
from mdm.train.teachers.ar import ARTeacher, load_teacher
from mdm.train.teachers.kinds import answer, check_target

from .counting import CountingTeacher
from .target_texts import library_rows
from .targets import clustered

OURS = ("exact", "fast", "exact_alone", "fast_alone")
SIDES = ("loop", *OURS)
LIKELY = (
    1e-6  # candidates of at least this probability are compared in logarithms by themselves, too
)
AIMS = {"exact_ratio": 2.0, "fast_ratio": 20.0, "agreement": 1e-4, "fast_tv": 1e-3}


@dataclasses.dataclass(frozen=True)
class SuffixBench:
    """What is measured; see `mdm bench suffix --help`."""

    model: str
    candidates: int
    length: int
    rows: int
    positions: int
    loop_positions: int
    repeats: int
    prune: float
    tail_draws: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("candidates", "rows", "positions", "loop_positions", "repeats", "tail_draws"):
            value = getattr(self, name)
            option = name.replace("_", "-")
            require(value >= 1, f"--{option} must be >= 1; got {value}")
        require(
            self.positions <= self.length - 2,
            f"--positions: a row of {self.length} tokens has {max(0, self.length - 2)} with something to"
            f" the left and to the right; got {self.positions}",
        )
        require(
            self.loop_positions <= self.positions,
            f"--loop-positions cannot be more than --positions {self.positions}; got"
            f" {self.loop_positions}",
        )
        require(0 < self.prune < 1, f"--prune must be in (0, 1); got {self.prune}")

    @property
    def exact(self) -> TargetSettings:
        """The exact mode; all candidates are kept in the answer."""
        return TargetSettings(
            kind="suffix", window=0, candidates=self.candidates, top_k=self.candidates
        )

    @property
    def fast(self) -> TargetSettings:
        """The fast mode."""
        return dataclasses.replace(self.exact, prune=self.prune)

    @property
    def checked(self) -> TargetSettings:
        """The fast mode with an estimate of the mass outside the candidates; not timed."""
        return dataclasses.replace(self.fast, tail_draws=self.tail_draws)


def run(
    settings: SuffixBench, path: Path, tell: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure, append the record to `path`, return it. `tell` hears how far it is."""
    vocab = load_vocab(settings.model)
    loaded = load_teacher(settings.model, vocab, dtype=torch.float32)
    teacher = CountingTeacher.of(loaded)
    check_target(settings.checked, teacher.num_tokens)
    require(
        settings.length <= teacher.max_length,
        f"--length {settings.length} is more than the {teacher.max_length} tokens that"
        f" {settings.model} was built for",
    )
    x0_RL = library_rows(vocab, settings.rows, settings.length, settings.seed)
    places = [positions_of(settings, row) for row in range(settings.rows)]
    warm_up(teacher, x0_RL[0], settings)
    results, answers = times(teacher, x0_RL, places, settings, tell)
    tell("the mass outside the candidates")
    results |= quality(teacher, x0_RL, places, answers, settings)
    results["aims"] = aims(results)
    record = make_record(
        "bench suffix", results, settings=dataclasses.asdict(settings), seed=settings.seed
    )
    append_record(path, record)
    return record


def positions_of(settings: SuffixBench, row: int) -> list[int]:
    """Random positions of a row, ascending: never the first (no left side) or last (no right side)."""
    random = generator("bench suffix", settings.seed, row)
    chosen = torch.randperm(settings.length - 2, generator=random)[: settings.positions] + 1
    return sorted(chosen.tolist())


def warm_up(teacher: ARTeacher, x0_L: torch.Tensor, settings: SuffixBench) -> None:
    """Each side once, at a position near the end, where ours have little to do."""
    position = settings.length - 2
    ids_C = ask(teacher, x0_L, [position], settings.exact).token_ids_NK[0]
    ask(teacher, x0_L, [position], settings.fast)
    loop_scores(teacher, x0_L, position, ids_C[:1])


# --- the sides --------------------------------------------------------------------------------------


@torch.no_grad()
def loop_scores(
    teacher: ARTeacher, x0_L: torch.Tensor, position: int, ids_C: torch.Tensor
) -> torch.Tensor:
    """(C,) float64 log p(candidate and all that follows | left), as one would write it."""
    scores = []
    for token in ids_C.tolist():
        text_L = x0_L.clone()
        text_L[position] = token
        logits_LV = teacher.model(text_L[None], use_cache=False).logits[0, :, : teacher.num_tokens]
        log_probs_LV = logits_LV.log_softmax(-1)
        found_L = log_probs_LV[:-1].gather(-1, text_L[1:, None])[:, 0]
        scores.append(found_L[position - 1 :].double().sum())
    return torch.stack(scores)


def ask(
    teacher: ARTeacher, x0_L: torch.Tensor, positions: Sequence[int], target: TargetSettings
) -> SoftTargets:
    """Our answer at these positions of one text, in one question."""
    masked_1L = torch.zeros(1, len(x0_L), dtype=torch.bool)
    masked_1L[0, list(positions)] = True
    question = Question(
        x0_L[None], masked_1L, masked_1L, torch.zeros_like(x0_L)[None], ((*positions,),)
    )
    return answer(teacher, question, settings=target, temperature=1.0)


def ask_alone(
    teacher: ARTeacher, x0_L: torch.Tensor, positions: Sequence[int], target: TargetSettings
) -> list[SoftTargets]:
    """The same with a question for each position."""
    return [ask(teacher, x0_L, [position], target) for position in positions]


# --- time and agreement -----------------------------------------------------------------------------


def times(
    teacher: CountingTeacher,
    x0_RL: torch.Tensor,
    places: Sequence[Sequence[int]],
    settings: SuffixBench,
    tell: Callable[[str], None],
) -> tuple[dict[str, Any], list[dict[str, SoftTargets]]]:
    """Seconds, teacher tokens, ratios, and how well exact and loop agree; our answers for each row."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}  # a position, one entry a turn
    tokens: dict[str, list[float]] = {side: [] for side in SIDES}
    gaps: list[dict[str, float]] = []
    answers: list[dict[str, SoftTargets]] = []
    for repeat in range(settings.repeats):
        for row, positions in enumerate(places):
            tell(f"turn {repeat * len(places) + row + 1} of {settings.repeats * len(places)}")

            def timed(side: str, count: int, work: Callable[[], Any]) -> Any:
                teacher.take()
                began = time.perf_counter()
                found = work()
                seconds[side].append((time.perf_counter() - began) / count)
                tokens[side].append(teacher.take()["tokens"] / count)
                return found

            found = one_turn(teacher, x0_RL[row], positions, settings, timed)
            gaps += found.pop("gaps")
            if repeat == 0:
                answers.append(found)
    # The loop calls the model itself, past the teacher's counts.
    tokens["loop"] = [settings.candidates * settings.length]
    results = {
        "sides": {
            side: {
                "seconds_per_position": statistics.fmean(seconds[side]),
                "seconds_all": seconds[side],
                "tokens_per_position": statistics.fmean(tokens[side]),
            }
            for side in SIDES
        },
        "ratios": {side: ratio(seconds["loop"], seconds[side]) for side in OURS},
        "agreement": {
            **{name: max(found[name] for found in gaps) for name in gaps[0]},
            "n": settings.rows * settings.loop_positions,
        },
    }
    return results, answers


def one_turn(
    teacher: ARTeacher,
    x0_L: torch.Tensor,
    positions: Sequence[int],
    settings: SuffixBench,
    timed: Callable[[str, int, Callable[[], Any]], Any],
) -> dict[str, Any]:
    """Every side once on one row: answers of exact and fast, and the gaps between exact and loop."""
    few = range(0, len(positions), len(positions) // settings.loop_positions)
    few = few[: settings.loop_positions]  # spread over the text
    exact, fast = (
        timed(side, len(positions), partial(ask, teacher, x0_L, positions, target))
        for side, target in (("exact", settings.exact), ("fast", settings.fast))
    )
    # Both score the same candidates: which they are, the exact mode has found out.
    todo = [(n, positions[n], exact.token_ids_NK[n]) for n in few]
    scores = timed(
        "loop", len(few), lambda: [loop_scores(teacher, x0_L, i, ids_C) for _, i, ids_C in todo]
    )
    for side, target in (("exact_alone", settings.exact), ("fast_alone", settings.fast)):
        timed(side, len(few), partial(ask_alone, teacher, x0_L, [i for _, i, _ in todo], target))
    gaps = [gap(exact, n, scores_C) for n, scores_C in zip(few, scores, strict=True)]
    return {"exact": exact, "fast": fast, "gaps": gaps}


def gap(exact: SoftTargets, index: int, scores_C: torch.Tensor) -> dict[str, float]:
    """Largest differences between the exact mode and the loop over the candidates of one position."""
    log_p_C = exact.log_probs_NK[index].double()
    log_q_C = scores_C.log_softmax(0)
    apart_C = (log_p_C - log_q_C).abs()
    return {
        "log_prob": float(apart_C.max()),
        "log_prob_likely": float(apart_C[log_q_C.exp() >= LIKELY].max()),
        "tv": float((log_p_C.exp() - log_q_C.exp()).abs().sum() / 2),
    }


def ratio(loop: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How many times as long the loop takes in all, with the standard error over turns.

    Of the sums: our time depends on the text, and the mean of the ratios would be that of the easy texts.
    """
    count, found = len(loop), sum(loop) / sum(ours)
    own = statistics.fmean(ours)
    errors = [(theirs - found * mine) / own for theirs, mine in zip(loop, ours, strict=True)]
    error = statistics.stdev(errors) / count**0.5 if count > 1 else float("nan")
    return {"ratio": found, "std_err": error, "n": count}


def quality(
    teacher: ARTeacher,
    x0_RL: torch.Tensor,
    places: Sequence[Sequence[int]],
    answers: Sequence[dict[str, SoftTargets]],
    settings: SuffixBench,
) -> dict[str, Any]:
    """Distance of the fast mode from the exact one, and the mass that neither has, over all positions."""
    apart = [total_variation(own["exact"], own["fast"], teacher.num_tokens) for own in answers]
    dropped_N = torch.cat([own["fast"].measures["dropped"] for own in answers])
    outside_N = torch.cat(
        [
            ask(teacher, x0_L, own, settings.checked).measures["outside"]
            for x0_L, own in zip(x0_RL, places, strict=True)
        ]
    )
    row_N = torch.arange(settings.rows).repeat_interleave(settings.positions)
    return {
        "fast": {
            **spread("tv", torch.cat(apart), row_N),
            **spread("dropped", dropped_N, row_N),
            "n": len(row_N),
        },
        "outside": {**spread("mass", outside_N, row_N), "n": len(row_N)},
    }


def total_variation(one: SoftTargets, other: SoftTargets, num_tokens: int) -> torch.Tensor:
    """(N,) distance of two answers whose tails are empty."""
    dense = [
        torch.zeros(len(targets), num_tokens, dtype=torch.float64).scatter_add_(
            1, targets.token_ids_NK, targets.log_probs_NK.double().exp()
        )
        for targets in (one, other)
    ]
    return (dense[0] - dense[1]).abs().sum(-1) / 2


def spread(name: str, value_N: torch.Tensor, row_N: torch.Tensor) -> dict[str, float]:
    """Mean with standard error (clustered by row), 95th percentile and maximum."""
    mean, error = clustered(value_N, row_N)
    value_N = value_N.double()
    return {
        f"{name}_mean": mean,
        f"{name}_std_err": error,
        f"{name}_95": float(value_N.quantile(0.95)),
        f"{name}_max": float(value_N.max()),
    }


def aims(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the project asks for, what was found, and whether that is enough."""
    found = {
        "exact_ratio": results["ratios"]["exact"]["ratio"],
        "fast_ratio": results["ratios"]["fast"]["ratio"],
        "agreement": results["agreement"]["tv"],
        "fast_tv": results["fast"]["tv_mean"],
    }
    return {
        name: {
            "aim": aim,
            "found": found[name],
            "met": found[name] >= aim if name.endswith("ratio") else found[name] <= aim,
        }
        for name, aim in AIMS.items()
    }


def describe(record: dict[str, Any]) -> str:
    """The card for people and, last, the record as one JSON line."""
    results, settings = record["results"], record["settings"]
    lines = [
        f"suffix scoring of {settings['candidates']} candidates, {settings['model']} (fp32):"
        f" {settings['rows']} rows of {settings['length']} tokens, {settings['positions']} positions each"
        f" (loop: {settings['loop_positions']}), {settings['repeats']} repeats",
        f"{'':13}{'s a position':>13}{'tokens':>10}{'loop / it':>18}",
    ]
    for side in SIDES:
        own = results["sides"][side]
        times_faster = ""
        if side in OURS:
            found = results["ratios"][side]
            times_faster = f"{found['ratio']:.1f} ± {found['std_err']:.1f}"
        lines.append(
            f"{side:13}{own['seconds_per_position']:>13.3f}{own['tokens_per_position']:>10.0f}"
            f"{times_faster:>18}"
        )
    agreement, fast, outside = results["agreement"], results["fast"], results["outside"]
    lines += [
        f"exact and loop differ by at most {agreement['log_prob']:.1e} in log-probability"
        f" ({agreement['log_prob_likely']:.1e} where p >= {LIKELY:g}), {agreement['tv']:.1e} in TV"
        f" (n={agreement['n']})",
        f"fast and exact: TV {fast['tv_mean']:.1e} ± {fast['tv_std_err']:.1e}, 95 %"
        f" {fast['tv_95']:.1e}, max {fast['tv_max']:.1e}; dropped mass reported"
        f" {fast['dropped_mean']:.1e}, max {fast['dropped_max']:.1e} (n={fast['n']})",
        f"mass outside the candidates: {outside['mass_mean']:.1e} ± {outside['mass_std_err']:.1e},"
        f" max {outside['mass_max']:.1e}",
    ]
    for name, line in results["aims"].items():
        verdict = "met" if line["met"] else "MISSED"
        lines.append(f"aim {name} {line['aim']:g}: {line['found']:.3g}, {verdict}")
    return "\n".join([*lines, to_json(record)])
