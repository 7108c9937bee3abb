"""What `mdm bench latency` is asked for: settings, and the ways in which the student decodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mdm.canvas import SamplerSettings
from mdm.config import require
from mdm.errors import check_known
from mdm.int8 import check_quantization
from mdm.loading import DTYPES

MODES = ("eager", "compile", "graphs")
ENDS = ("suppressed", "natural")
BLOCK_LENGTH = 32  # decoded together where the model has no blocks, as LLaDA's scripts have it


@dataclasses.dataclass(frozen=True)
class Decoding:
    """One way in which the student writes: a fixed schedule, or a rule with its parameter.

    `entropy_bound` goes with the confidence of its own; everything else decides by probability.
    """

    rule: str
    value: float

    @property
    def name(self) -> str:
        """`schedule=2` decides two tokens a step; rules go by their name, `threshold=0.9`."""
        return f"{self.rule}={self.value:g}"

    @property
    def tokens_per_step(self) -> int:
        """Of a fixed schedule; a rule does not ask for it."""
        return int(self.value) if self.rule == "schedule" else 1

    def sampler(
        self,
        *,
        suppress_eos: bool,
        block_length: int | None = None,
        cache: str = "none",
        refresh: int | None = None,
    ) -> SamplerSettings:
        """The settings of the sampler. Raises ConfigError for a parameter out of range."""
        return SamplerSettings(
            block_length=block_length,
            remasking="entropy" if self.rule == "entropy_bound" else "low_confidence",
            threshold=self.value if self.rule == "threshold" else None,
            factor=self.value if self.rule == "factor" else None,
            entropy_bound=self.value if self.rule == "entropy_bound" else None,
            suppress_eos=suppress_eos,
            cache=cache,
            refresh=refresh,
        )


@dataclasses.dataclass(frozen=True)
class LatencyBench:
    """What is measured; see `mdm bench latency --help`.

    An empty list (or 0) leaves a part out: no batches, no contexts, no holes, no plain loop.
    """

    model: str
    teacher: str = "embedded"
    texts: int = 5
    repeats: int = 1
    prompt_length: int = 64
    gen_length: int = 256
    ends: str = "suppressed"
    tokens_per_step: tuple[int, ...] = (1, 2, 4)
    thresholds: tuple[float, ...] = (0.5, 0.7, 0.9)
    factors: tuple[float, ...] = ()
    entropy_bounds: tuple[float, ...] = ()
    block_length: int | None = None
    cache: str = "none"
    refresh: int | None = None
    modes: tuple[str, ...] = ("eager",)
    plain_texts: int = 1
    quality: bool = True
    holes: int = 32
    span: int = 16
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    batch_length: int = 64
    batch_decoding: str = ""
    contexts: tuple[int, ...] = (64, 256, 1024)
    dtype: str = "float32"
    threads: int = 1
    quantization: str = ""
    device: str | None = None
    random_teacher: bool = False
    overhead: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("texts", "repeats", "gen_length", "span", "batch_length", "threads"):
            value = getattr(self, name)
            require(value >= 1, f"{_option(name)} must be at least 1; got {value}")
        require(
            self.prompt_length >= 2,
            f"--prompt-length must be at least 2, the start token is one; got {self.prompt_length}",
        )
        for name in ("plain_texts", "holes"):
            value = getattr(self, name)
            require(value >= 0, f"{_option(name)} must be at least 0 (0 = none); got {value}")
        for name in ("tokens_per_step", "batches", "contexts"):
            values = getattr(self, name)
            require(
                all(value >= 1 for value in values) and len(set(values)) == len(values),
                f"{_option(name)} must be different whole numbers from 1 on; got {values}",
            )
        require(
            bool(self.modes) and len(set(self.modes)) == len(self.modes),
            f"--mode must name one or more of {', '.join(MODES)}, each once; got {self.modes}",
        )
        for mode in self.modes:
            check_known("mode", mode, MODES)
        check_known("policy of --ends", self.ends, ENDS)
        check_known("dtype", self.dtype, DTYPES)
        check_quantization(self.quantization, self.dtype)
        names = [decoding.name for decoding in self.decodings]
        require(bool(names), "give at least one decoding: --tokens-per-step or --thresholds")
        require(len(set(names)) == len(names), f"a decoding is there twice: {', '.join(names)}")
        for decoding in self.decodings:
            decoding.sampler(suppress_eos=self.suppressed)  # a parameter out of range shows now
        if self.batch_decoding:
            check_known("decoding of --batch-decoding", self.batch_decoding, names)

    @property
    def suppressed(self) -> bool:
        """Is nobody allowed to end a text?"""
        return self.ends == "suppressed"

    @property
    def decodings(self) -> list[Decoding]:
        """All ways in which the student writes, schedules first."""
        rules: tuple[tuple[str, Sequence[float]], ...] = (
            ("schedule", self.tokens_per_step),
            ("threshold", self.thresholds),
            ("factor", self.factors),
            ("entropy_bound", self.entropy_bounds),
        )
        return [Decoding(rule, value) for rule, values in rules for value in values]

    @property
    def reference(self) -> Decoding:
        """What decodings are compared with: one token a step, or else the first there is."""
        return next((one for one in self.decodings if one.name == "schedule=1"), self.decodings[0])

    @property
    def chosen(self) -> Decoding:
        """The decoding of batches and contexts: as asked for, or the first of several tokens a step."""
        if self.batch_decoding:
            return next(one for one in self.decodings if one.name == self.batch_decoding)
        many = (one for one in self.decodings if one.rule == "schedule" and one.value > 1)
        return next(many, self.decodings[0])

    @property
    def plain_decoding(self) -> Decoding | None:
        """The schedule that the plain loop shares: the first; None without schedules or plain texts."""
        if not self.plain_texts or not self.tokens_per_step:
            return None
        return Decoding("schedule", self.tokens_per_step[0])

    def of_student(self, block_size: int | None) -> LatencyBench:
        """The settings for a student with these blocks: without any it decodes 32 tokens together."""
        if block_size is not None or self.block_length is not None:
            return self
        return dataclasses.replace(self, block_length=BLOCK_LENGTH)

    def sampler(self, decoding: Decoding) -> SamplerSettings:
        """A decoding as settings of the sampler, with what all decodings share."""
        return decoding.sampler(
            suppress_eos=self.suppressed,
            block_length=self.block_length,
            cache=self.cache,
            refresh=self.refresh,
        )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
