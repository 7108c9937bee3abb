"""The answers of a model to many requests: known ones from the store, the others computed and kept.

Everything an evaluation asks of a model passes here: lm-eval's requests and our own tasks alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from mdm.config import to_tree
from mdm.generate import Generation, Hole
from mdm.likelihood import Likelihood, Pair

from . import sharing
from .models import Evaluated
from .progress import Progress
from .responses import Responses, key_of

COMPLETE, SCORE = "complete", "score"
# Requests handed round at a time: often enough to store progress, rarely enough to keep all busy.
ROUND_BATCHES = 4


@dataclasses.dataclass(frozen=True)
class Completion:
    """A hole and how its tokens are drawn (temperature 0 = greedy)."""

    hole: Hole
    temperature: float = 0.0
    top_p: float = 1.0


class Answers:
    """A model with a memory. Equal requests have equal answers, whenever and with whom they are asked."""

    def __init__(self, evaluated: Evaluated, responses: Responses) -> None:
        self.evaluated = evaluated
        self.responses = responses

    def complete(self, requests: Sequence[Completion]) -> list[Generation]:
        """Fill the holes of all requests."""
        sampler = to_tree(self.evaluated.settings.sampler)
        for name in ("temperature", "top_p"):
            del sampler[name]  # each request has its own
        settings = sampler if self.evaluated.kind == "student" else {}
        found = self._answer(COMPLETE, settings, [dataclasses.asdict(r) for r in requests])
        return [_generation(tree) for tree in found]

    def score(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        """log p(answer | prompt) of all pairs, with its standard error."""
        likelihood = to_tree(self.evaluated.settings.likelihood)
        del likelihood["batch_tokens"]  # changes the time, not the answer
        settings = likelihood if self.evaluated.kind == "student" else {}
        found = self._answer(SCORE, settings, [dataclasses.asdict(pair) for pair in pairs])
        return [_likelihood(tree) for tree in found]

    def follow(self) -> None:
        """Compute what the leading process hands round, until it is done."""
        sharing.follow({name: self._compute(name, None) for name in (COMPLETE, SCORE)})

    def _answer(
        self, name: str, settings: dict[str, Any], items: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        keys = [key_of(self.evaluated.identity, name, settings, item) for item in items]
        new = {
            key: item for key, item in zip(keys, items, strict=True) if key not in self.responses
        }
        # Short ones first: a batch of like lengths has little padding.
        order = sorted(new, key=lambda key: _size(new[key]))
        progress = Progress(name, len(order), known=len(set(keys)) - len(order))
        alone = sharing.world_size() == 1
        size = self.evaluated.settings.batch_size * ROUND_BATCHES
        if alone:  # each answer is stored as soon as it is there
            size = len(order)
        for asked in _rounds(order, size * sharing.world_size()):

            def keep(place: int, tree: dict[str, Any], asked: list[str] = asked) -> None:
                self.responses.add(asked[place], tree)
                progress()

            compute = self._compute(name, keep if alone else None)
            found = sharing.lead(name, [new[key] for key in asked], compute)
            if not alone:
                for place, tree in enumerate(found):
                    keep(place, tree)
        return [self.responses[key] for key in keys]

    def _compute(
        self, name: str, keep: Callable[[int, dict[str, Any]], None] | None
    ) -> sharing.Compute:
        """The function that answers items of this kind; `keep(place, answer)` as each is ready."""
        compute = {COMPLETE: self._complete, SCORE: self._score}[name]
        return lambda items: compute(items, keep or (lambda place, tree: None))

    def _complete(
        self, items: list[dict[str, Any]], keep: Callable[[int, dict[str, Any]], None]
    ) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = [{}] * len(items)
        ways = [(item["temperature"], item["top_p"]) for item in items]
        for temperature, top_p in sorted(set(ways)):
            places = [i for i, way in enumerate(ways) if way == (temperature, top_p)]

            def done(i: int, generation: Generation, places: list[int] = places) -> None:
                results[places[i]] = dataclasses.asdict(generation)
                keep(places[i], results[places[i]])

            holes = [_hole(items[i]["hole"]) for i in places]
            self.evaluated.complete(holes, temperature=temperature, top_p=top_p, done=done)
        return results

    def _score(
        self, items: list[dict[str, Any]], keep: Callable[[int, dict[str, Any]], None]
    ) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = [{}] * len(items)

        def done(place: int, likelihood: Likelihood) -> None:
            results[place] = dataclasses.asdict(likelihood)
            keep(place, results[place])

        pairs = [Pair(tuple(i["prompt"]), tuple(i["answer"]), i["key"]) for i in items]
        self.evaluated.score(pairs, done=done)
        return results


def _rounds(keys: list[str], size: int) -> list[list[str]]:
    """The requests in lists that are computed and stored together."""
    return [keys[first : first + size] for first in range(0, len(keys), max(1, size))]


def _size(item: dict[str, Any]) -> int:
    if "hole" in item:
        hole = item["hole"]
        return len(hole["before"]) + hole["length"] + len(hole["after"])
    return len(item["prompt"]) + len(item["answer"])


def _hole(tree: dict[str, Any]) -> Hole:
    return Hole(
        tuple(tree["before"]),
        tree["length"],
        tuple(tree["after"]),
        tuple(tree["stop"]),
        tuple(tree["key"]),
    )


def _generation(tree: dict[str, Any]) -> Generation:
    values = dict(tree)
    if values["confidence"] is None:  # JSON has no NaN
        values["confidence"] = float("nan")
    return Generation(**values)


def _likelihood(tree: dict[str, Any]) -> Likelihood:
    values = dict(tree)
    for name, number in (("std_err", "nan"), ("value", "-inf")):
        if values[name] is None:
            values[name] = float(number)
    return Likelihood(**values)
