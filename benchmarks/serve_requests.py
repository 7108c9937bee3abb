"""What `mdm bench serve` asks: settings, sizes of requests, and requests cut from real code."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

from mdm.config import require
from mdm.errors import DataError, check_known
from mdm.eval.human_eval_data import human_eval_problems
from mdm.vocab import Vocab

from .serve_load import Body

DTYPES = ("float32", "bfloat16")
SIDES = ("engine", "serial")
MOST_CLIENTS = 256
TEMPERATURES = (0.0, 0.7)
KINDS = 2 * len(TEMPERATURES)  # a hole or a continuation, at each temperature


@dataclasses.dataclass(frozen=True)
class Workload:
    """Tokens of code around or before what is asked for, new tokens, denoising steps."""

    prompt: int
    new: int
    steps: int

    @property
    def total(self) -> int:
        """Tokens of a canvas: the start token is one."""
        return 1 + self.prompt + self.new


WORKLOADS = {
    "short": Workload(prompt=16, new=16, steps=16),  # what an editor asks for
    "medium": Workload(prompt=32, new=32, steps=16),
    "long": Workload(prompt=64, new=64, steps=32),
}


@dataclasses.dataclass(frozen=True)
class ServeBench:
    """What is measured; see `mdm bench serve --help`."""

    model: str
    workload: str
    concurrency: tuple[int, ...]
    requests: int
    repeats: int
    dtype: str
    threads: int
    soak: float
    seed: int

    def __post_init__(self) -> None:
        check_known("workload", self.workload, WORKLOADS)
        check_known("dtype", self.dtype, DTYPES)
        levels = self.concurrency
        require(
            bool(levels) and all(1 <= level <= MOST_CLIENTS for level in levels),
            f"concurrency must be numbers of clients from 1 to {MOST_CLIENTS}; got {levels}",
        )
        require(len(set(levels)) == len(levels), f"concurrency has a number twice: {levels}")
        for name in ("requests", "repeats", "threads"):
            require(getattr(self, name) >= 1, f"{name} must be >= 1; got {getattr(self, name)}")
        require(0 <= self.soak < math.inf, f"soak must be seconds, 0 = none; got {self.soak}")


class Requests:
    """Requests made of real code: HumanEval's problems with their solutions, cut out by tokens.

    Every second one is a hole with code on both sides; temperatures take turns; seeds differ. A
    request is a function of the benchmark's seed and its number.
    """

    def __init__(self, vocab: Vocab, workload: Workload, seed: int) -> None:
        self.vocab, self.workload, self.seed = vocab, workload, seed
        problems = human_eval_problems().values()
        programs = [one["prompt"] + one["canonical_solution"] for one in problems]
        needed = workload.prompt + workload.new
        self.programs = [ids for ids in vocab.encode_batch(programs) if len(ids) >= needed]
        if not self.programs:
            raise DataError(f"no program of HumanEval has {needed} tokens; take a smaller workload")

    def __getitem__(self, number: int) -> Body:
        """The body of one request to /generate."""
        chance = random.Random(f"serve {self.seed} {number}")
        new, filled = self.workload.new, number % 2 == 0
        before, after = self._texts(chance, filled)
        place = (
            {"prefix": before, "suffix": after, "span": new}
            if filled
            else {"prompt": before, "gen_length": new}
        )
        return {
            **place,
            "steps": self.workload.steps,
            "temperature": TEMPERATURES[number // 2 % len(TEMPERATURES)],
            "seed": chance.randrange(2**31),
        }

    def _texts(self, chance: random.Random, filled: bool) -> tuple[str, str]:
        """What stands before and after; cut where the texts have just as many tokens as planned."""
        prompt, new = self.workload.prompt, self.workload.new
        after = prompt // 2 if filled else 0
        for _ in range(1000):
            ids = chance.choice(self.programs)
            start = chance.randrange(len(ids) - prompt - new + 1)
            middle = start + prompt - after
            parts = [ids[start:middle], ids[middle + new : middle + new + after]]
            texts = [self.vocab.decode(part) for part in parts]
            if self.vocab.encode_batch(texts) == parts:
                return texts[0], texts[1]
        raise DataError(
            f"HumanEval cannot be cut into pieces of {prompt - after} tokens: none that was tried"
            " has as many when it is encoded again"
        )


def soak_items(requests: dict[str, Requests], client: int) -> list[dict[str, Any]]:
    """What one client of the soak does in turn; each begins at another place."""
    own, long = requests["own"], requests["long"]
    first = 100 * client
    steps = own.workload.steps
    wrong = {**own[first], "steps": 0}
    too_long = {"prompt": "x", "gen_length": 2**20, "seed": 0}
    items: list[dict[str, Any]] = [
        {"kind": "short", "body": own[first + 1]},
        {"kind": "left", "body": own[first + 2], "leave_after": max(1, steps // 2)},
        {"kind": "wrong", "body": wrong, "status": 400},
        {"kind": "several", "body": {**own[first + 3], "n": 2}},
        {"kind": "hung_up", "body": own[first + 4], "after_s": 0.1},
        {"kind": "short", "body": own[first + 5]},
        {"kind": "long", "body": long[first + 6]},
        {"kind": "streamed", "body": own[first + 7]},
        {"kind": "wrong", "body": too_long, "status": 400},
    ]
    start = client % len(items)
    return items[start:] + items[:start]
