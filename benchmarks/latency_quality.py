"""Quality beside speed: the texts of the table judged by the teacher, and holes in real solutions.

A decoding that is fast because it writes badly must show it here. The teacher's log-likelihood alone can
be fooled by repetition, which it finds likely, so repetition is counted as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mdm.autoregressive import log_likelihood
from mdm.denoiser import Denoiser
from mdm.diffusion import generator
from mdm.errors import DataError
from mdm.eval.human_eval_data import human_eval_problems
from mdm.likelihood import Pair
from mdm.sampler import denoise, make_canvas
from mdm.vocab import Vocab

from .latency_models import Models, Prompts
from .latency_settings import Decoding, LatencyBench
from .latency_table import Written, jackknife
from .serve_report import mean_and_error

GRAM = 4
HEAVY = 0.5  # a text is repetitive if fewer of its 4-grams are different
FILL_ROWS = 8


# --- texts ------------------------------------------------------------------------------------------


def text_lines(
    all_written: Sequence[Written], models: Models, prompts: Prompts, reference: str
) -> list[dict[str, Any]]:
    """A line for each side: the teacher's nats a token, and repetition, text by text.

    Differences are to the student's text of the `reference` decoding behind the same prompt.
    """
    scores = {
        written.side.name: nats_per_token(written, models, prompts) for written in all_written
    }
    base = next(w.side.name for w in all_written if w.side.decoding == reference)
    lines = []
    for written in all_written:
        own = scores[written.side.name]
        mean, std_err = mean_and_error(own)
        gap, gap_error = mean_and_error(
            [a - b for a, b in zip(own, scores[base], strict=True)],
        )
        distinct, distinct_error = mean_and_error(
            [distinct_share(ids) for ids in written.first.values()]
        )
        heavy, heavy_error = mean_and_error(
            [float(distinct_share(ids) < HEAVY) for ids in written.first.values()]
        )
        lines.append({
            "who": written.side.who,
            "mode": written.side.mode,
            "decoding": written.side.decoding,
            "n": len(own),
            "log_likelihood": mean,
            "log_likelihood_std_err": std_err,
            "minus_reference": gap,
            "minus_reference_std_err": gap_error,
            "distinct_grams": distinct,
            "distinct_grams_std_err": distinct_error,
            "repetitive": heavy,
            "repetitive_std_err": heavy_error,
        })  # fmt: skip
    return lines


def nats_per_token(written: Written, models: Models, prompts: Prompts) -> list[float]:
    """The teacher's log-likelihood a token of each text behind its prompt.

    An end token that was written counts: it was decided, too. With another vocabulary the text is encoded
    anew, and the tokens are the teacher's.
    """
    side, teacher = written.side, models.teacher
    pairs = []
    for number, some in sorted(written.texts.items()):
        row = some[0].rows[0]
        seen = side.visible(row)
        if models.shared or side.who == "teacher":
            answer = row[: len(seen) + 1] if len(seen) < len(row) else seen
        else:
            answer = teacher.vocab.encode(models.student.vocab.decode(seen))
            if len(seen) < len(row) or not answer:
                answer = [*answer, teacher.vocab.eos_id]
        pairs.append(Pair(tuple(prompts.teacher[number]), tuple(answer)))
    scores = log_likelihood(teacher, pairs)
    return [score.value / score.num_tokens for score in scores]


def distinct_share(ids: Sequence[int], gram: int = GRAM) -> float:
    """Different 4-grams over all 4-grams; 1 for a text too short to have one."""
    grams = [tuple(ids[i : i + gram]) for i in range(len(ids) - gram + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


# --- holes ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CodeHole:
    """A span of a solution of HumanEval: what stands before it, the span, and what follows."""

    before: list[int]
    truth: list[int]
    after: list[int]


def code_holes(
    vocab: Vocab, count: int, span: int, *, context: int, longest: int, seed: int
) -> list[CodeHole]:
    """At most `count` holes, one in a solution, at a random place; prompts are cut on the left.

    Solutions that do not fit into `longest` tokens are passed over. Raises DataError if none is left with a
    token on either side of a span as long as this.
    """
    problems = list(human_eval_problems().values())
    order = torch.randperm(len(problems), generator=generator("latency holes", seed)).tolist()
    holes: list[CodeHole] = []
    for index in order:
        solution = vocab.encode(problems[index]["canonical_solution"])
        places = len(solution) - span - 1  # something stands after the hole
        prompt = vocab.encode(problems[index]["prompt"])[-context:]
        if places < 1 or 1 + len(prompt) + len(solution) > longest:
            continue
        random = generator("latency hole", seed, index)
        at = 1 + int(torch.randint(places, (), generator=random))
        before = [vocab.start_id, *prompt, *solution[:at]]
        holes.append(CodeHole(before, solution[at : at + span], solution[at + span :]))
        if len(holes) == count:
            break
    if not holes:
        raise DataError(
            f"no solution of HumanEval has {span + 2} tokens and fits into {longest} with its prompt; take"
            " a smaller --span"
        )
    return holes


@dataclasses.dataclass(frozen=True)
class Filled:
    """One hole: tokens that are right, of how many, and the forwards it took."""

    right: int
    tokens: int
    forwards: int


def fill_holes(
    denoiser: Denoiser, holes: Sequence[CodeHole], decoding: Decoding, settings: LatencyBench
) -> list[Filled]:
    """The holes filled by one decoding; the end token is suppressed, a hole has its length."""
    sampler = dataclasses.replace(settings.sampler(decoding), suppress_eos=True)
    canvases = [
        make_canvas(
            denoiser,
            [*hole.before, *[denoiser.mask_id] * len(hole.truth), *hole.after],
            sampler,
            key=("latency hole", row),
            tokens_per_step=decoding.tokens_per_step,
        )
        for row, hole in enumerate(holes)
    ]
    for _ in denoise(denoiser, canvases, batch_size=FILL_ROWS):
        pass
    found = []
    for canvas, hole in zip(canvases, holes, strict=True):
        start, span = len(hole.before), len(hole.truth)
        own = canvas.ids_L[start : start + span].tolist()
        right = sum(a == b for a, b in zip(own, hole.truth, strict=True))
        found.append(Filled(right, span, canvas.nfe))
    return found


def hole_lines(fills: Mapping[str, Sequence[Filled]], reference: str) -> list[dict[str, Any]]:
    """A line for each decoding: share of right tokens, the same minus the reference, tokens a forward."""
    lines = []
    for name, filled in fills.items():
        shares = [one.right / one.tokens for one in filled]
        gaps = [
            share - one.right / one.tokens
            for share, one in zip(shares, fills[reference], strict=True)
        ]
        right, right_error = mean_and_error(shares)
        gap, gap_error = mean_and_error(gaps)
        each, each_error = jackknife(filled, filled_per_forward)
        lines.append({
            "decoding": name,
            "n": len(filled),
            "right": right,
            "right_std_err": right_error,
            "minus_reference": gap,
            "minus_reference_std_err": gap_error,
            "tokens_per_forward": each,
            "tokens_per_forward_std_err": each_error,
        })  # fmt: skip
    return lines


def filled_per_forward(filled: Sequence[Filled]) -> float:
    """Tokens over forwards."""
    return sum(one.tokens for one in filled) / sum(one.forwards for one in filled)


# --- both -------------------------------------------------------------------------------------------


def quality(
    all_written: Sequence[Written],
    models: Models,
    prompts: Prompts,
    settings: LatencyBench,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """What became of the texts, and the holes, under every decoding.

    A teacher of random weights judges nothing: `texts` is empty then, and `texts_left_out` says why.
    """
    random = settings.random_teacher
    left_out = "the teacher has random weights, its log-likelihood is no quality" if random else ""
    note(f"texts are not judged: {left_out}" if left_out else "the teacher judges the texts")
    mode = all_written[0].side.mode
    judged = [
        w for w in all_written if w.side.mode == mode and w.side.who in ("student", "teacher")
    ]
    reference = settings.reference.name
    found: dict[str, Any] = {
        "reference": reference,
        "repetitive_below": HEAVY,
        "gram": GRAM,
        "texts": [] if left_out else text_lines(judged, models, prompts, reference),
        "texts_left_out": left_out,
        "infilling": None,
    }
    if settings.holes:
        holes = code_holes(
            models.student.vocab,
            settings.holes,
            settings.span,
            context=settings.prompt_length,
            longest=models.student.max_length,
            seed=settings.seed,
        )
        fills = {}
        for decoding in settings.decodings:
            note(f"filling {len(holes)} holes: {decoding.name}")
            fills[decoding.name] = fill_holes(models.student, holes, decoding, settings)
        found["infilling"] = {"span": settings.span, "lines": hole_lines(fills, reference)}
    return found
