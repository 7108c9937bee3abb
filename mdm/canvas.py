"""A canvas: one row on its way from masks to text, and the settings it is denoised with.

Holds no model and takes no step; the sampler does. Shapes: L length, k positions decided in a step.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from .buffers import Prefix
from .config import require
from .errors import check_known
from .remasking import REMASKING
from .rules import CONFIDENCES, RULES
from .schedule import tokens_due

COMPAT = ("default", "llada")
CACHES = ("none", "prefix", "dual")

Prefixes = tuple[Prefix, Prefix]
NOTHING_READ: Prefixes = (Prefix(), Prefix())


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """How masks become tokens.

    steps         denoising steps for all open positions; null = one token a step
    block_length  tokens decoded together, left to right; null = all at once (plain diffusion), or
                  the blocks that the model has
    temperature   of proposals; 0 = greedy
    top_p         proposals come from the likeliest tokens that hold this probability; 1 = all
    remasking     which proposals are kept: low_confidence, random, margin or entropy
    threshold     keep every proposal at least this sure, one a step if none is; null = by steps
    factor        keep the n surest while (n + 1)(1 - confidence of the n-th) is below this; null = by steps
    entropy_bound keep the surest while the entropies of all but the last sum to this, nats (needs
                  remasking=entropy); null = by steps
    cfg_scale     s of guidance, logits = (1+s)·conditional - s·unconditional; 0 = off
    suppress_eos  never propose the end token (LLaDA's logits_eos_inf)
    eos_last      keep an end token only when nothing else is left (confidence_eos_eot_inf)
    stop_at_eos   close a row once an end token is reached without a gap before it
    cache         approximate, of a model without blocks: "prefix" keeps keys and values of what stands
                  before the current block, "dual" of all that is not in it; "none" = exact. A model with
                  blocks has an exact cache, always
    refresh       steps after which an approximate cache is made anew; null = at the start of a block
    compat        "llada" reproduces the published sampler with its oddities; default: fixed
    """

    steps: int | None = None
    block_length: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    remasking: str = "low_confidence"
    threshold: float | None = None
    factor: float | None = None
    entropy_bound: float | None = None
    cfg_scale: float = 0.0
    suppress_eos: bool = False
    eos_last: bool = False
    stop_at_eos: bool = True
    cache: str = "none"
    refresh: int | None = None
    compat: str = "default"

    def __post_init__(self) -> None:
        for name in ("steps", "block_length", "refresh"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1; got {value}")
        for name in ("temperature", "cfg_scale"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} must be >= 0 (0 = off); got {value}")
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1] (1 = all tokens); got {self.top_p}")
        check_known("remasking strategy", self.remasking, REMASKING)
        check_known("compat mode", self.compat, COMPAT)
        check_known("cache", self.cache, CACHES)
        if self.threshold is not None:
            require(0 < self.threshold <= 1, f"threshold must be in (0, 1]; got {self.threshold}")
        if self.factor is not None:
            require(0 < self.factor < math.inf, f"factor must be > 0; got {self.factor}")
        if self.entropy_bound is not None:
            require(
                0 <= self.entropy_bound < math.inf,
                f"entropy_bound must be >= 0; got {self.entropy_bound}",
            )
        self._check_rule()
        require(
            self.refresh is None or self.cache != "none",
            f"refresh={self.refresh} is for an approximate cache; choose cache=prefix or cache=dual",
        )
        if self.compat == "llada":
            require(
                self.top_p == 1,
                f"the published sampler has no top_p; got {self.top_p} with compat=llada",
            )
            require(
                self.cache == "none",
                f"the published sampler has no cache; got {self.cache} with compat=llada",
            )

    def _check_rule(self) -> None:
        given = [name for name in RULES if getattr(self, name) is not None]
        if not given:
            return
        require(
            len(given) == 1, f"{' and '.join(given)} are rules that exclude each other; give one"
        )
        (rule,) = given
        require(
            self.steps is None,
            f"{rule} decides how many steps there are; leave steps out (got {self.steps})",
        )
        require(
            self.remasking in CONFIDENCES[rule],
            f"{rule} needs another confidence: remasking {' or '.join(CONFIDENCES[rule])}; got"
            f" {self.remasking!r}",
        )
        require(self.compat != "llada", f"the published sampler has no {rule}")

    @property
    def rule(self) -> str | None:
        """The rule that decides how many proposals are kept; None = a fixed schedule."""
        return next((name for name in RULES if getattr(self, name) is not None), None)


@dataclasses.dataclass
class Canvas:
    """One row: tokens given and open positions, and how far its denoising has come; on the host.

    ids_L           current tokens; open positions hold the mask
    valid_L         false at padding
    given_L         true at the prompt (and suffix): replaced by masks in the unconditional pass
    open_L          true where a token is still to be decided
    blocks          slices of the row, decoded in turn
    block_steps     denoising steps of each block
    due             tokens to commit in each remaining step of the current block
    decided_L       step at which a position was decided, from 0; -1 = given or open
    nfe             denoiser forwards of this row so far; guidance counts 2
    has_end         an end token was decided somewhere
    prefixes        what a model with blocks keeps of the clean tokens, and of the same with the given
                    tokens masked (guidance); freed when the canvas is finished
    """

    ids_L: torch.Tensor
    valid_L: torch.Tensor
    given_L: torch.Tensor
    open_L: torch.Tensor
    mask_id: int
    settings: SamplerSettings
    random: torch.Generator
    blocks: list[slice]
    block_steps: list[int]
    due: list[int] = dataclasses.field(default_factory=list)
    decided_L: torch.Tensor = dataclasses.field(init=False)
    step: int = 0
    nfe: int = 0
    ended: bool = False
    has_end: bool = False
    prefixes: Prefixes = NOTHING_READ

    def __post_init__(self) -> None:
        self.decided_L = torch.full_like(self.ids_L, -1)
        self.enter_block()

    @property
    def finished(self) -> bool:
        """Nothing is left to decide."""
        return not self.blocks

    def enter_block(self) -> None:
        """Plan the steps of the first block that needs any; without one the canvas is finished."""
        while self.blocks and not self.due:
            due = tokens_due(int(self.open_L[self.blocks[0]].sum()), self.block_steps[0])
            # The published sampler runs every step; a step that commits nothing is a wasted forward.
            self.due = due if self.settings.compat == "llada" else [k for k in due if k]
            if not self.due:
                self._leave_block()
        if self.finished:
            self.prefixes = NOTHING_READ

    def open_positions(self) -> torch.Tensor:
        """(n,) open positions of the current block."""
        block = self.blocks[0]
        return self.open_L[block].nonzero()[:, 0] + block.start

    def commit(self, positions_k: torch.Tensor, tokens_k: torch.Tensor) -> None:
        """Decide these positions and go on to the next step."""
        self.ids_L[positions_k] = tokens_k
        # The published sampler may "decide" on the mask itself; then the position stays open.
        decided_k = positions_k[tokens_k != self.mask_id]
        self.open_L[decided_k] = False
        self.decided_L[decided_k] = self.step
        self.step += 1
        # A step of a schedule is one step however many it decided; by a rule, one due is one token.
        del self.due[: 1 if self.settings.rule is None else len(positions_k)]
        if not self.due:
            self._leave_block()
            self.enter_block()

    def _leave_block(self) -> None:
        del self.blocks[0], self.block_steps[0]

    def end(self, fill_id: int) -> None:
        """Close the row: what is still open becomes `fill_id`."""
        self.ids_L[self.open_L] = fill_id
        self.open_L[:] = False
        self.blocks, self.due, self.ended = [], [], True
        self.prefixes = NOTHING_READ


@dataclasses.dataclass(frozen=True)
class Commit:
    """What one step decided in one canvas (`row` numbers the canvases given to `denoise`).

    log_prob_k   of the tokens at temperature 1, nats; None from the published sampler
    kind         of forward it came from: "prefill" is the first of a row in blocks, which reads the prompt,
                 too; "store" reads a finished block beside the current one; "refresh" makes an approximate
                 cache anew; all others "denoise"
    tokens_read  positions of the row computed in it; of a guided row, in both
    """

    row: int
    positions_k: torch.Tensor
    tokens_k: torch.Tensor
    confidence_k: torch.Tensor
    log_prob_k: torch.Tensor | None = None
    kind: str = "denoise"
    tokens_read: int = 0
