"""Settings of training on the student's own text (on-policy), and which rollouts a step learns from.

The student continues prompts by its own sampler; a frozen teacher says what should have stood at the masks
of states it passed through (OPDLM, arXiv 2606.06712; for autoregressive models GKD, 2306.13649). A batch of
rollouts is written with the weights of one step and lasts for `steps_per_batch` steps:

    step          s0 … s0+S-1   s0+S … s0+2S-1   …     s0 = start_step, S = steps_per_batch
    batch         0             1                …
    replayed      –             of batch 0       …     of the `max_staleness` batches before

All of it is a function of (seed, step, sample): a run resumes exactly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from mdm.canvas import SamplerSettings
from mdm.config import require
from mdm.diffusion import generator
from mdm.errors import ConfigError, check_known

from .states import EOS_RULES, STATES


@dataclasses.dataclass(frozen=True)
class OnPolicySettings:
    """Learning from the student's own text. Distillation alone: its tokens are no truth.

    fraction         share of a step's rows that are rollouts, and the weight of their term in the loss;
                     1 = nothing else; 0 = off
    start_step       steps that learn from the data alone, before the first rollouts
    prompts          sources of prompts, as in data.sources; [] = those of data, whose held-out documents
                     are never prompts (known by content, or by the origin that rows name: of the same
                     rows in another form they can be)
    prompt_tokens    of a plain text that make its prompt; 0 = the start token alone
    max_prompt_tokens  longer prompts are left out
    max_prompts      read no more than these; null = all
    length           most tokens of a rollout
    first_length     most of them in the first batch of rollouts
    length_growth    from first_length to length: linear, or cosine as published
    growth_batches   batches of rollouts that takes; 0 = length from the start
    steps_per_batch  optimizer steps that a batch of rollouts lasts; more = fewer weights are switched, but
                     its text gets older
    decode_rows      rollouts that are written together
    temperature      of the tokens drawn
    top_p            nucleus that they are drawn from; 1 = all tokens
    threshold        tokens whose margin (or probability, with low_confidence) reaches it are decided
                     together; null = tokens_per_step
    tokens_per_step  tokens decided in a step, if there is no threshold; fewer in the last step of a block
    remasking        which tokens are decided first: margin, entropy or random, which have the text drawn
                     from the student as it is, or low_confidence as published, which makes likely texts
                     likelier
    block_length     tokens decoded together; null = a block, or all of a student without blocks
    states           round (one that each block passed through), complement (that and the one with masks
                     where it has none), all (every one of them), random (masks by objective)
    eos              what is learnt of a text's end: padded (end tokens, to the end of the block; without
                     blocks of all that it had room for), learnt (the end token, nothing behind it),
                     published (not even that)
    reduce           token: every masked token counts alike; rollout: every rollout does, as published
    replay           share of the rollout rows that come from earlier batches; 0 = off
    max_staleness    batches that a replayed one may be old
    samples          rollouts of each batch that are kept as text in samples.jsonl
    """

    fraction: float = 0.0
    start_step: int = 0
    prompts: tuple[str, ...] = ()
    prompt_tokens: int = 32
    max_prompt_tokens: int = 1024
    max_prompts: int | None = None
    length: int = 256
    first_length: int = 64
    length_growth: str = "linear"
    growth_batches: int = 0
    steps_per_batch: int = 4
    decode_rows: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    threshold: float | None = 0.9
    tokens_per_step: int = 1
    remasking: str = "margin"
    block_length: int | None = None
    states: str = "round"
    eos: str = "padded"
    reduce: str = "token"
    replay: float = 0.0
    max_staleness: int = 4
    samples: int = 1

    def __post_init__(self) -> None:
        for name in ("fraction", "replay"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"on_policy.{name} must be in [0, 1]; got {value}")
        require(self.replay < 1, "on_policy.replay must be below 1: some text has to be new; got 1")
        for name, least in (
            ("start_step", 0), ("prompt_tokens", 0), ("max_prompt_tokens", 1), ("max_prompts", 1),
            ("length", 1), ("first_length", 1), ("growth_batches", 0), ("steps_per_batch", 1),
            ("decode_rows", 1), ("tokens_per_step", 1), ("max_staleness", 1), ("samples", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            require(
                value is None or value >= least,
                f"on_policy.{name} must be at least {least}; got {value}",
            )
        require(
            self.prompt_tokens < self.max_prompt_tokens,
            f"on_policy.prompt_tokens={self.prompt_tokens} and a start token are more than"
            f" max_prompt_tokens={self.max_prompt_tokens}: no plain text could be a prompt; raise it",
        )
        require(
            not self.growth_batches or self.first_length <= self.length,
            f"on_policy.first_length={self.first_length} grows to length={self.length}: it has to be"
            " the smaller one",
        )
        require(
            self.threshold is None or self.tokens_per_step == 1,
            f"on_policy.tokens_per_step={self.tokens_per_step} counts without a threshold only; set"
            f" on_policy.threshold=null (it is {self.threshold}), or leave tokens_per_step out",
        )
        check_known("on_policy.length_growth", self.length_growth, GROWTHS)
        check_known("on_policy.states", self.states, STATES)
        check_known("on_policy.eos", self.eos, EOS_RULES)
        check_known("on_policy.reduce", self.reduce, ("token", "rollout"))
        require(
            self.reduce == "token" or self.states != "random",
            "on_policy.reduce=rollout with states=random: masks by the objective have its weights, too;"
            " set reduce=token",
        )
        try:
            _ = self.sampler  # checks what it has in common with this
        except ConfigError as error:
            raise ConfigError(f"on_policy: {error}") from error

    @property
    def active(self) -> bool:
        """Is anything learnt from rollouts?"""
        return self.fraction > 0

    @property
    def sampler(self) -> SamplerSettings:
        """How it is written, but for tokens_per_step. Raises ConfigError if that cannot be."""
        return SamplerSettings(
            block_length=self.block_length,
            temperature=self.temperature,
            top_p=self.top_p,
            threshold=self.threshold,
            remasking=self.remasking,
        )

    def rows(self, batch_rows: int) -> int:
        """How many of a step's rows are rollouts, once there are any. Raises ConfigError if that is no
        whole number."""
        found = self.fraction * batch_rows
        rows = round(found)
        require(
            abs(found - rows) < 1e-6 and (rows > 0) == self.active,
            f"on_policy.fraction={self.fraction} of train.batch_rows={batch_rows} is {found:g} rows; make"
            " it a whole number of them",
        )
        old = self.replay * rows
        require(
            not self.active
            or not self.replay
            or (abs(old - round(old)) < 1e-6 and 1 <= old < rows),
            f"on_policy.replay={self.replay} of {rows} rows of rollouts a step is {old:g}; make it a whole"
            " number of them, and leave one for new ones",
        )
        return rows

    def new_rows(self, rows: int) -> int:
        """How many of a step's `rows` rollouts are new ones once some can be replayed."""
        return rows - round(self.replay * rows)


# --- how long rollouts may be ------------------------------------------------------------------------

# From 0 … 1 of the way to 0 … 1 of the growth. Cosine: slow at first (the code of OPDLM).
GROWTHS: dict[str, Callable[[float], float]] = {
    "linear": lambda way: way,
    "cosine": lambda way: 1 - math.cos(math.pi / 2 * way),
}


def length_limit(settings: OnPolicySettings, batch: int) -> int:
    """Most tokens of a rollout in this batch (0-based)."""
    if not settings.growth_batches:
        return settings.length
    way = GROWTHS[settings.length_growth](min(1.0, batch / settings.growth_batches))
    return settings.first_length + round((settings.length - settings.first_length) * way)


# --- which rollouts a step learns from ---------------------------------------------------------------


def shares(settings: OnPolicySettings, batch_rows: int, step: int) -> tuple[int, int]:
    """Rows of a step (0-based) that are data, and that are rollouts."""
    own = settings.rows(batch_rows) if step >= settings.start_step else 0
    return batch_rows - own, own


def batch_of(settings: OnPolicySettings, step: int) -> int:
    """The batch of rollouts that a step (0-based) belongs to; negative before the first one."""
    return (step - settings.start_step) // settings.steps_per_batch


def is_due(settings: OnPolicySettings, step: int) -> bool:
    """Is a batch of rollouts written before this step?"""
    since = step - settings.start_step
    return since >= 0 and since % settings.steps_per_batch == 0


def batch_size(settings: OnPolicySettings, rows: int, batch: int) -> int:
    """Rollouts of a batch, for steps with `rows` rows of them; the first replays nothing."""
    new = settings.new_rows(rows) if batch else rows
    return new * settings.steps_per_batch


def first_of(settings: OnPolicySettings, rows: int, batch: int) -> int:
    """How many rollouts were written before this batch."""
    return batch_size(settings, rows, 0) * min(batch, 1) + batch_size(settings, rows, 1) * max(
        0, batch - 1
    )


def needed_batches(settings: OnPolicySettings, step: int) -> range:
    """The batches of rollouts that a step may learn from, oldest first."""
    batch = batch_of(settings, step)
    oldest = max(0, batch - settings.max_staleness) if settings.replay else batch
    return range(oldest, batch + 1)


def chosen(
    settings: OnPolicySettings, rows: int, seed: int, step: int, sample: int
) -> tuple[int, int]:
    """(batch, number in it) of the rollout that is sample 0 … rows-1 of this step.

    New rollouts come once; a replayed one is drawn uniformly from the batches before.
    """
    batch = batch_of(settings, step)
    within = (step - settings.start_step) % settings.steps_per_batch
    new = settings.new_rows(rows) if batch else rows
    if sample < new:
        return batch, within * new + sample
    earlier = [number for number in needed_batches(settings, step) if number < batch]
    sizes = [batch_size(settings, rows, number) for number in earlier]
    random = generator("replay", seed, step, sample)
    place = int(torch.randint(sum(sizes), (), generator=random))
    for number, size in zip(earlier, sizes, strict=True):
        if place < size:
            return number, place
        place -= size
    raise AssertionError("a place outside all batches")
