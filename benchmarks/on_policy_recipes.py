"""The recipes of the on-policy study (on_policy.py): an arm for each kind of text and target.

ce_corpus        cross-entropy on what stood behind the prompts
ce_teacher       cross-entropy on what the teacher wrote behind them (T = 1)
off_policy       divergence to the teacher's next-token distributions on that
on_policy        the same on the student's own rollouts, in states it went through (OPDLM as published,
                 but for the shift)
on_policy_8      the same among the teacher's 8 likeliest tokens; what is outside is not learnt
on_policy_left_8 the same from the left alone, scored as the next: its control
on_policy_right  on such states, targets that see what is visible to the right in the block
margin, margin_right  the same two, with rollouts that decide by the margin of the distributions and
                 not by the probability of the draw (docs/on_policy.md, the fixed point)
"""

from __future__ import annotations

import dataclasses

from mdm.config import require
from mdm.errors import check_known
from mdm.train.recipe import Recipe, read_recipe

CORPUS, TEACHER_TEXT = "corpus.jsonl", "teacher.jsonl"
START = "start"
CONTROL = "ce_corpus"
_CE = ("objective.kd_lambda=0",)
_KD = ("objective.kd_lambda=1", "target.kind=left", "target.top_k=0")
# Unlike the right-aware targets, which have no mass outside their candidates, this does not touch it.
_FEW = (
    "objective.kd_lambda=1",
    "target.kind=left",
    "target.top_k=8",
    "objective.tail=renormalise",
)
_RIGHT = ("objective.kd_lambda=1", "target.kind=suffix", "target.candidates=8")
_PUBLISHED = (
    "on_policy.fraction=1",
    "on_policy.states=round",
    "on_policy.eos=published",
    "on_policy.reduce=rollout",
)
_BY_DRAW = ("on_policy.remasking=low_confidence",)
_BY_MARGIN = ("on_policy.remasking=margin",)
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ce_corpus": (CORPUS, _CE),
    "ce_teacher": (TEACHER_TEXT, _CE),
    "off_policy": (TEACHER_TEXT, _KD),
    "on_policy": (TEACHER_TEXT, (*_KD, *_PUBLISHED, *_BY_DRAW)),
    "on_policy_8": (TEACHER_TEXT, (*_FEW, *_PUBLISHED, *_BY_DRAW)),
    "on_policy_left_8": (TEACHER_TEXT, (*_RIGHT, "target.block=1", *_PUBLISHED, *_BY_DRAW)),
    "on_policy_right": (TEACHER_TEXT, (*_RIGHT, *_PUBLISHED, *_BY_DRAW)),
    "margin": (TEACHER_TEXT, (*_KD, *_PUBLISHED, *_BY_MARGIN)),
    "margin_right": (TEACHER_TEXT, (*_RIGHT, *_PUBLISHED, *_BY_MARGIN)),
}
BASE = (
    "student.kind=bd3lm",
    "objective.masking=exact",
    "objective.noise=block",
    "objective.weight=mean_masked",
    "data.packing=false",
    "data.eos_padding=document",
    "data.held_out_fraction=0.15",
    "data.max_held_out_rows=64",
    # Its own evaluations are not used: all students are measured alike afterwards.
    "train.eval_rows=2",
    "train.eval_draws=1",
    "train.checkpoint_every=0",
    "train.warmup_steps=2",
)


@dataclasses.dataclass(frozen=True)
class OnPolicyBench:
    """What is measured; see `mdm bench on-policy --help`. `arms` empty = all of them.

    `model` is the AR model that all students begin as, and their teacher.
    """

    model: str = "embedded"
    arms: tuple[str, ...] = ()
    blocks: tuple[int, ...] = (4, 8, 16)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 10
    rows: int = 2
    prompt_tokens: int = 23
    length: int = 40
    documents: int = 300
    learning_rate: float = 1e-4
    steps_per_batch: int = 5
    thresholds: tuple[float, ...] = (0.5, 0.8, 0.9, 1.0)
    samples: int = 4
    eval_rows: int = 12
    eval_draws: int = 1
    holes: int = 24
    recipe: str = "ce"
    assignments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_known("arm", arm, ARMS)
        for name in ("blocks", "seeds", "thresholds"):
            values = getattr(self, name)
            require(bool(values), f"{name} must name at least one")
            require(len({*values}) == len(values), f"{name} must differ; got {values}")
        for threshold in self.thresholds:
            require(0 < threshold <= 1, f"thresholds must be in (0, 1]; got {threshold}")
        for name, least in (
            ("samples", 2), ("holes", 2), ("eval_rows", 2), ("eval_draws", 1), ("steps", 1),
            ("documents", 1), ("steps_per_batch", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            require(value >= least, f"{name} must be >= {least}; got {value}")
        total = self.prompt_tokens + 1 + self.length
        for block in self.blocks:
            require(
                total % block == 0,
                f"prompt_tokens={self.prompt_tokens}, a start token and length={self.length} are {total}"
                f" tokens, which blocks of {block} do not divide: rollouts would be longer than other rows",
            )

    @property
    def chosen(self) -> tuple[str, ...]:
        """The arms, with the control."""
        wanted = self.arms or tuple(ARMS)
        return tuple(arm for arm in ARMS if arm in wanted or arm == CONTROL)


def recipe_of(settings: OnPolicyBench, arm: str, block: int, seed: int) -> Recipe:
    """The recipe of one run; its sources are named, not placed."""
    source, own = ARMS[CONTROL if arm == START else arm]
    total = settings.prompt_tokens + 1 + settings.length
    return read_recipe(
        settings.recipe,
        (
            *BASE,
            f"name={arm}-block{block}-seed{seed}",
            f"student.init={settings.model}",
            f"teacher.model={settings.model}",
            f"student.block_size={block}",
            f"target.block={block}",
            f"data.length={total}",
            f"data.eos_block={block}",
            f"train.seed={seed}",
            f"train.steps={settings.steps}",
            f"train.batch_rows={settings.rows}",
            f"train.micro_rows={settings.rows}",
            f"train.learning_rate={settings.learning_rate}",
            f"on_policy.length={settings.length}",
            f"on_policy.prompt_tokens={settings.prompt_tokens}",
            f"on_policy.steps_per_batch={settings.steps_per_batch}",
            *settings.assignments,
            f"data.sources=[{source}]",
            *own,
        ),
    )
