"""HumanEval infilling: a part of a right solution is hidden, the model writes it, the tests decide.

`infill_single_line` hides each line once (Fried et al., arXiv 2204.05999), `infill_random_span` what
is between two random characters (Bavarian et al., arXiv 2207.14255). A diffusion student sees both
sides (with blocks: of the right one what lies in the last block of the hole). An AR teacher sees the
left one, or both if it was trained to (fim.py).
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from mdm.config import require, to_tree
from mdm.diffusion import generator
from mdm.errors import ConfigError, RequestError, check_known
from mdm.fim import nearest
from mdm.generate import Generation, Hole
from mdm.vocab import Vocab

from . import sandbox
from .answers import Answers, Completion
from .human_eval_data import human_eval_problems, solution_check
from .metrics import clustered_std_err, mean_and_std_err, wilson_interval
from .models import STUDENT
from .outcome import Outcome, Score
from .progress import Progress
from .responses import key_of

SINGLE_LINE, RANDOM_SPAN = "infill_single_line", "infill_random_span"
TRUE, SEARCH = "true", "search"
LEFT, FIM = "left", "fim"
TEXT, TOKEN = "text", "token"
COUNTS = ("tokens", "nfe")  # metrics that are no proportions: written tokens, forwards of the model

Problem = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class InfillSettings:
    """What is hidden and what the model is told.

    length            true: the hole has as many tokens as the hidden text; search: each candidate
                      is tried and the surest result taken, a heuristic (see `surest`)
    boundary          text: prefix, hidden text and suffix are tokenised each by itself, as published;
                      token: the tokens of the whole program that hold the text are hidden (see
                      `split_tokens`)
    teacher           what an AR model sees: left, or fim (both sides, if it was trained to)
    spans_per_problem random spans a problem; 10 as published
    max_span          characters of a random span; null = up to the whole solution
    context           tokens the model sees on each side; null = all that fit
    candidates        lengths in tokens that `search` tries
    seed              of the random spans, and of sampling at a temperature above 0
    """

    length: str = TRUE
    boundary: str = TOKEN
    teacher: str = LEFT
    spans_per_problem: int = 1
    max_span: int | None = None
    context: int | None = None
    candidates: tuple[int, ...] = (2, 4, 6, 8, 12, 16, 24, 32, 48)
    seed: int = 0

    def __post_init__(self) -> None:
        check_known("length mode", self.length, (TRUE, SEARCH))
        check_known("boundary", self.boundary, SPLITS)
        check_known("teacher mode", self.teacher, (LEFT, FIM))
        for name in ("spans_per_problem", "max_span", "context"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1; got {value}")
        require(
            len(self.candidates) > 0 and min(self.candidates) >= 1,
            f"candidates must be lengths of at least 1 token; got {list(self.candidates)}",
        )


@dataclasses.dataclass(frozen=True)
class Item:
    """One hidden text: prefix + target + suffix is a right program."""

    id: str
    problem: Problem
    prefix: str
    target: str
    suffix: str


# --- what is hidden ------------------------------------------------------------------------------


def single_lines(problem: Problem, settings: InfillSettings) -> Iterator[Item]:
    """Each line of the solution that is not blank, without its newline; numbered from 0 with blanks.

    Of all 164 problems these are 1033, the number that Fried et al. and Bavarian et al. report.
    """
    start = 0
    for number, line in enumerate(problem["canonical_solution"].split("\n")):
        if line.strip():
            yield _item(problem, f"line{number}", start, start + len(line))
        start += len(line) + 1


def random_spans(problem: Problem, settings: InfillSettings) -> Iterator[Item]:
    """What is between two distinct random places of the solution; longer than max_span: its start.

    Fixed by seed, problem and number alone, so a limit or more spans leave the others as they are.
    """
    places = len(problem["canonical_solution"]) + 1
    for number in range(settings.spans_per_problem):
        random = generator("infill", settings.seed, problem["task_id"], number)
        start, end = sorted(torch.randperm(places, generator=random)[:2].tolist())
        if settings.max_span is not None:
            end = min(end, start + settings.max_span)
        yield _item(problem, f"span{number}", start, end)


# Each yields the items of one problem.
TASKS: dict[str, Callable[[Problem, InfillSettings], Iterator[Item]]] = {
    SINGLE_LINE: single_lines,
    RANDOM_SPAN: random_spans,
}


def _item(problem: Problem, name: str, start: int, end: int) -> Item:
    prompt, solution = problem["prompt"], problem["canonical_solution"]
    item_id = f"{problem['task_id']}:{name}"
    return Item(item_id, problem, prompt + solution[:start], solution[start:end], solution[end:])


# --- where tokens are cut ------------------------------------------------------------------------

Split = tuple[Item, list[int], list[int], list[int]]  # and the tokens of its three parts


def split_text(item: Item, vocab: Vocab) -> Split:
    """Each part by itself. At a line this makes tokens that no model has seen side by side.

    Tokenizers of the GPT-2 kind have tokens of a newline and the indentation after it, so after a
    newline token alone a model expects no indentation, only a line that begins at the margin.
    """
    before, target, after = vocab.encode_batch([item.prefix, item.target, item.suffix])
    return item, before, target, after


def split_tokens(item: Item, vocab: Vocab) -> Split:
    """The program's own tokens: hidden are those that hold some of the hidden text, whole.

    The hidden text grows by what else they hold, such as the newline before a line. Raises
    RequestError if the tokenizer does not give the program back.
    """
    text = item.prefix + item.target + item.suffix
    ids = vocab.encode(text)
    if vocab.decode(ids) != text:
        raise RequestError(
            f"{item.id}: this tokenizer does not give a program back as it was; use boundary=text"
        )

    def length(count: int) -> int:
        return len(vocab.decode(ids[:count]))

    def whole(count: int) -> bool:  # not in the middle of a character
        return text.startswith(vocab.decode(ids[:count]))

    counts = range(len(ids) + 1)
    first = bisect.bisect_right(counts, len(item.prefix), key=length) - 1
    while not whole(first):
        first -= 1
    last = bisect.bisect_left(counts, len(item.prefix + item.target), key=length)
    while not whole(last):
        last += 1
    start, end = length(first), length(last)
    grown = Item(item.id, item.problem, text[:start], text[start:end], text[end:])
    return grown, ids[:first], ids[first:last], ids[last:]


SPLITS: dict[str, Callable[[Item, Vocab], Split]] = {TEXT: split_text, TOKEN: split_tokens}


# --- what the model is asked ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Asked:
    """An item as the model sees it: one hole, or one for each candidate length."""

    item: Item
    true_length: int
    holes: tuple[Hole, ...]


def holes_of(answers: Answers, task: str, item: Item, settings: InfillSettings) -> Asked:
    """The hole or holes of an item, with as much text on both sides as fits into the context.

    Raises RequestError if no hole fits.
    """
    model = answers.evaluated
    item, before, target, after = SPLITS[settings.boundary](item, model.vocab)
    marks = 0
    stop: tuple[str, ...] = ()
    lengths: Sequence[int] = (len(target),) if settings.length == TRUE else settings.candidates
    if model.kind != STUDENT:
        # It writes until it stops by itself, so that it needs no search. A line ends at a newline.
        lengths = (max(lengths),)
        stop = ("\n",) if task == SINGLE_LINE and "\n" not in item.target else ()
        if settings.teacher == FIM:
            marks = model.template.num_marks if model.template else 0
        else:
            after = []
    room = model.max_length - len(model.opening) - marks
    lengths = [length for length in lengths if length < room]
    if not lengths:
        raise RequestError(
            f"{item.id}: a hole of {len(target)} tokens does not fit into the context of"
            f" {model.max_length}; use max_span or smaller candidates"
        )
    # The longest hole decides for all candidates, so that they see the same.
    before, after = cut_to_fit(before, after, room - max(lengths), settings.context)
    start, key = (*model.opening, *before), ("infill", settings.seed, item.id)
    holes = (Hole(start, length, tuple(after), stop, key) for length in lengths)
    return Asked(item, len(target), tuple(holes))


def cut_to_fit(
    before: list[int], after: list[int], room: int, context: int | None
) -> tuple[list[int], list[int]]:
    """Both sides without their far ends: at most `context` tokens each, `room` together."""
    if context is not None:
        before, after = before[max(0, len(before) - context) :], after[:context]
    return nearest(before, after, room)


def surest(found: Sequence[Generation]) -> int:
    """Which candidate length to believe: the one whose tokens were decided most confidently.

    The mean log-probability is no likelihood of the length: it compares texts of different lengths
    by how predictable a token of theirs is, each when it was decided. The first of equals wins.
    """
    return max(range(len(found)), key=lambda i: found[i].confidence)


def written(answers: Answers, task: str, item: Item, text: str) -> str:
    """What stands in the hole: of a teacher's text only the line, where a line was hidden.

    Its hole may begin with a newline (boundary=token): it has as many as the hidden text.
    """
    if answers.evaluated.kind == STUDENT or task != SINGLE_LINE:
        return text
    return "\n".join(text.split("\n")[: 1 + item.target.count("\n")])


def is_nearest(length: int, true_length: int, candidates: Sequence[int]) -> bool:
    """Is no other candidate nearer to the true length?"""
    return abs(length - true_length) == min(abs(c - true_length) for c in candidates)


# --- the evaluation ------------------------------------------------------------------------------


def run_infilling(
    answers: Answers,
    task: str,
    settings: InfillSettings,
    *,
    limits: sandbox.Limits,
    limit: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    workers: int | None = None,
) -> Outcome:
    """Fill every hole of a task once and run the programs.

    `limit` takes the first problems, not holes: the items of a limited run are among those of a
    longer one. pass@1 is the share of programs that pass, exact_match of texts equal to the hidden
    one but for white space at the end. Holes of one problem are not independent, so problems are
    the clusters of the standard errors. Raises ConfigError for settings that do not go together.
    """
    check_known("infilling task", task, TASKS)
    require(limit is None or limit >= 1, f"limit must be at least 1; got {limit}")
    _require_possible(answers, task, settings)
    problems = list(human_eval_problems().values())[:limit]
    asked = [
        holes_of(answers, task, item, settings)
        for problem in problems
        for item in TASKS[task](problem, settings)
    ]
    items = [one.item for one in asked]
    generations = iter(
        answers.complete([Completion(h, temperature, top_p) for one in asked for h in one.holes])
    )
    found = [[next(generations) for _ in one.holes] for one in asked]
    chosen = [surest(results) for results in found]
    texts = [
        written(answers, task, item, results[i].text)
        for item, results, i in zip(items, found, chosen, strict=True)
    ]
    progress = Progress("tests", len(items))
    verdicts = sandbox.run_checks(
        [
            solution_check(item.problem, item.prefix + text + item.suffix)
            for item, text in zip(items, texts, strict=True)
        ],
        limits,
        workers=workers,
        progress=lambda done: progress(),
    )
    searched = settings.length == SEARCH and answers.evaluated.kind == STUDENT
    samples = [
        _sample(task, *parts, searched)
        for parts in zip(asked, found, chosen, texts, verdicts, strict=True)
    ]
    clusters = [sample["cluster"] for sample in samples]
    scores = {
        name: _score(name, [sample["metrics"][name] for sample in samples], clusters)
        for name in samples[0]["metrics"]
    }
    described = {
        **to_tree(settings),
        "limit": limit,
        "temperature": temperature,
        "top_p": top_p,
        "problems": len(problems),
        "limits": dataclasses.asdict(limits),
        "sandbox": sandbox.describe(),
    }
    return Outcome(task, scores, samples, described)


def _require_possible(answers: Answers, task: str, settings: InfillSettings) -> None:
    model = answers.evaluated
    if settings.length != SEARCH:
        return
    if model.kind == STUDENT:
        rule = model.settings.sampler.remasking
        require(
            rule == "low_confidence",
            "length=search chooses by confidence, which only remasking=low_confidence gives; got"
            f" remasking={rule}",
        )
    elif task == RANDOM_SPAN and settings.teacher == LEFT:
        raise ConfigError(
            "a teacher that sees the left side only cannot know where a random span ends; use"
            " length=true or teacher=fim"
        )


def _sample(
    task: str,
    asked: Asked,
    found: Sequence[Generation],
    chosen: int,
    text: str,
    verdict: sandbox.Verdict,
    searched: bool,
) -> dict[str, Any]:
    item, hole, generation = asked.item, asked.holes[chosen], found[chosen]
    metrics: dict[str, float] = {
        "pass@1": float(verdict.passed),
        "exact_match": float(text.rstrip() == item.target.rstrip()),
        "tokens": generation.num_tokens,
        "nfe": sum(result.nfe for result in found),
    }
    if searched:
        lengths = [hole.length for hole in asked.holes]
        metrics["nearest_length"] = float(is_nearest(hole.length, asked.true_length, lengths))
    return {
        "task": task,
        "id": item.id,
        "cluster": item.problem["task_id"],
        "doc_hash": key_of(dict(item.problem), item.prefix, item.target, item.suffix),
        "metrics": metrics,
        "target": item.target,
        "outputs": [text],
        "passed": [verdict.passed],
        "reasons": [verdict.reason],
        "prefix_tokens": len(hole.before),
        "suffix_tokens": len(hole.after),
        "target_tokens": asked.true_length,
        "length": hole.length,
        "finish_reason": generation.finish_reason,
        "confidence": generation.confidence,
    }


def _score(name: str, values: Sequence[float], clusters: Sequence[str]) -> Score:
    """The mean; a proportion of 0 or 1, whose standard error of 0 misleads, also has an interval.

    It is Wilson's for as many items as there are problems.
    """
    value, _ = mean_and_std_err(values)
    count = len(set(clusters))
    extreme = name not in COUNTS and value in (0.0, 1.0)
    interval = wilson_interval(value * count, count) if extreme else None
    return Score(value, len(values), clustered_std_err(values, clusters), interval=interval)
