"""The recipes of the small TIDE pipelines (tide.py): teacher, first students, and an arm for each loss.

    shared   the tokenizer of the teacher; noise by blocks
        ce                 control: cross-entropy alone
        kl                 KL(teacher ‖ student), T = 2
        kl_weak            the same at the mean strength of tidal's signal, a weight of .09
        tidal              towards a mixture of both, weighed by noise level, as published
        tidal_comp_demo    the same, the teacher asked in two passes
        tidal_normalised   tidal with weights of mean 1 and KL weighed as the cross-entropy
    cross    a tokenizer learnt on the corpus; noise by rows, which chunks need
        ce_cross           control: masks fall token by token
        ce_chunks          control: masks as below, distillation at a weight of 1e-9, lost in rounding
        forward_calm, reverse_calm (the loss as published), bernoulli_kl (what that is said to be)
        published_calm     reverse_calm as released: its masks, which count long chunks more, and T = 5
        calm_tidal         forward_calm towards a mixture of both, uniform over noise levels as published

TIDE: arXiv 2604.26951.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from mdm.config import require
from mdm.convert import StudentSettings
from mdm.errors import check_known
from mdm.record import to_json
from mdm.train.dataset import DataSettings
from mdm.train.masking import WEIGHTS
from mdm.train.recipe import Recipe, read_recipe
from mdm.train.teachers.denoised import CHUNKS

TEACHER = "teacher"
FIRST = "first"  # what the students of a pipeline begin from
TEACHER_SEED, FIRST_SEED = 1000, 2000  # the order of their rows is no student's
TEACHER_SAVED = 25  # steps between its checkpoints: its training may be longer than a session
# 0.5 is the default that kd_weight takes the place of.
_KD = ("objective.kd_lambda=0.5", "objective.kd_weight=1", "objective.kd_reduce=mean_masked",
       "objective.kd_temperature=2")  # fmt: skip
_DENOISED = ("target.kind=denoised", *_KD)
_MIX = ("mix.first=0.1", "mix.last=0.9", "mix.by_noise=true")
_TIDAL = (*_DENOISED, *_MIX, "mix.weight=midrange")
_CALM = (f"target.kind={CHUNKS}", "masks.where=chunks", *_KD, "objective.temperature_squared=false")
_NO_TEACHER = ("objective.kd_lambda=0",)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Arms that can be compared: what all of them have, and what each adds; the first is the control."""

    common: tuple[str, ...]
    arms: dict[str, tuple[str, ...]]
    controls: tuple[str, ...]


PIPELINES = {
    "shared": Pipeline(
        ("objective.noise=block",),
        {
            "ce": _NO_TEACHER,
            "kl": _DENOISED,
            "kl_weak": (*_DENOISED, "objective.kd_weight=0.09"),
            "tidal": _TIDAL,
            "tidal_comp_demo": (*_TIDAL, "target.comp_demo=bernoulli"),
            "tidal_normalised": (
                *_DENOISED, *_MIX, "mix.weight=midrange_normalised", "objective.kd_reduce=same"
            ),
        },
        ("ce",),
    ),
    "cross": Pipeline(
        ("objective.noise=row",),
        {
            "ce_cross": _NO_TEACHER,
            "ce_chunks": (*_CALM, "objective.kd_weight=1e-9"),
            "forward_calm": (*_CALM, "objective.chunk_loss=forward_calm"),
            "reverse_calm": (*_CALM, "objective.chunk_loss=reverse_calm"),
            "bernoulli_kl": (*_CALM, "objective.chunk_loss=bernoulli_kl"),
            "published_calm": (
                *_CALM, "objective.chunk_loss=reverse_calm", "objective.kd_temperature=5",
                "masks.where=chunks_published",
            ),
            "calm_tidal": (*_CALM, "objective.chunk_loss=forward_calm", *_MIX),
        },
        ("ce_cross", "ce_chunks"),
    ),
}  # fmt: skip
PIPELINE_OF = {arm: name for name, pipeline in PIPELINES.items() for arm in pipeline.arms}
# Of the teacher's training as well; what --set may change.
BASE = ("train.eval_rows=64", "train.eval_draws=2", "train.max_minutes=0")


@dataclasses.dataclass(frozen=True)
class TideBench:
    """What is measured; see `mdm bench tide --help`.

    arms           empty = all; with the first control of their pipeline, and `ce`, which the teacher is
                   compared with
    first_steps    training of the student that all students of a pipeline begin from; 0 = the AR model
                   with some of its layers
    layers         of the students; null = all, as the teacher
    block          tokens a block, of teacher and students
    holes          held-out holes that each student fills
    tokens         of the tokenizer of the pipeline `cross`, learnt on the first `documents` documents
    weight         objective.weight of the students: bound (1/t, as TIDE) or mean_masked
    recipe         of the teacher's training and, but for its objective, of the students'
    assignments    settings of it that are changed, for both; the arms' own go last
    """

    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 40
    teacher_steps: int = 100
    first_steps: int = 100
    layers: int | None = 6
    block: int = 8
    length: int = 128
    rows: int = 4
    holes: int = 64
    tokens: int = 2**13
    documents: int = 400
    weight: str = "bound"
    recipe: str = "demo"
    assignments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_known("arm", arm, PIPELINE_OF)
        check_known("weight", self.weight, WEIGHTS)
        require(bool(self.seeds), "seeds must name at least one seed")
        require(len({*self.seeds}) == len(self.seeds), f"seeds must differ; got {self.seeds}")
        for name, least in (
            ("steps", 1), ("teacher_steps", 1), ("first_steps", 0), ("rows", 1), ("block", 1),
            ("documents", 1), ("holes", 2),
        ):  # fmt: skip
            value = getattr(self, name)
            require(value >= least, f"{name} must be >= {least}; got {value}")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The arms, with the controls of every pipeline they are of, and `ce` for the teacher."""
        wanted = self.arms or tuple(PIPELINE_OF)
        controls = {"ce"}.union(*(PIPELINES[PIPELINE_OF[arm]].controls for arm in wanted))
        return tuple(arm for arm in PIPELINE_OF if arm in wanted or arm in controls)


def short_hash(value: Any) -> str:
    """Of plain values; for names of folders."""
    return hashlib.sha256(to_json(value).encode()).hexdigest()[:8]


def everywhere(settings: TideBench) -> tuple[str, ...]:
    """What teacher and students have alike."""
    return (
        *BASE,
        "student.kind=bd3lm",
        f"student.block_size={settings.block}",
        f"data.length={settings.length}",
        f"train.batch_rows={settings.rows}",
        f"train.micro_rows={settings.rows}",
        *settings.assignments,
    )


def of_student(settings: TideBench, arm: str) -> tuple[str, ...]:
    """What a student's recipe changes beyond that."""
    pipeline = PIPELINES[PIPELINE_OF[arm]]
    return (
        f"train.steps={settings.steps}",
        "train.checkpoint_every=0",
        *_of_pipeline(settings, PIPELINE_OF[arm]),
        *pipeline.arms[arm],
    )


def _of_pipeline(settings: TideBench, pipeline: str) -> tuple[str, ...]:
    return (
        f"student.layers={'null' if settings.layers is None else settings.layers}",
        f"objective.weight={settings.weight}",
        *PIPELINES[pipeline].common,
    )


def teacher_recipe(settings: TideBench) -> Recipe:
    """The recipe of the teacher's training."""
    return read_recipe(
        settings.recipe, (*everywhere(settings), *of_teacher(settings), f"name={TEACHER}")
    )


def first_recipe(settings: TideBench, pipeline: str) -> Recipe:
    """The recipe of the student that those of a pipeline begin from."""
    own = (f"name={FIRST}-{pipeline}", f"train.seed={FIRST_SEED}")
    recipe = read_recipe(
        settings.recipe,
        (
            *everywhere(settings),
            *_of_pipeline(settings, pipeline),
            *own,
            *_NO_TEACHER,
            f"train.steps={settings.first_steps}",
            f"train.checkpoint_every={TEACHER_SAVED}",
        ),
    )
    return recipe if pipeline == "shared" else with_own_tokens(recipe, settings)


def with_own_tokens(recipe: Recipe, settings: TideBench) -> Recipe:
    """The recipe with the name of the students' own tokenizer."""
    name = tokenizer_name(settings, recipe.data)
    return dataclasses.replace(recipe, student=dataclasses.replace(recipe.student, tokenizer=name))


def of_teacher(settings: TideBench) -> tuple[str, ...]:
    """What the teacher's recipe changes: its training outlives a session that is cut off."""
    return (
        f"train.steps={settings.teacher_steps}",
        f"train.seed={TEACHER_SEED}",
        f"train.checkpoint_every={TEACHER_SAVED}",
        "train.keep_checkpoints=1",
    )


def recipe_of(settings: TideBench, arm: str, seed: int) -> Recipe:
    """The recipe of one run, with names in the places of teacher and tokenizer.

    Of the arm `teacher`, which is not trained again: how it is measured.
    """
    own = (f"name={arm}-seed{seed}", f"train.seed={seed}")
    changed = _NO_TEACHER if arm == TEACHER else of_student(settings, arm)
    recipe = read_recipe(settings.recipe, (*everywhere(settings), *own, *changed))
    recipe = dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, model=TEACHER))
    if arm != TEACHER and settings.first_steps:
        return dataclasses.replace(recipe, student=StudentSettings(init=FIRST))
    return with_own_tokens(recipe, settings) if PIPELINE_OF.get(arm) == "cross" else recipe


def tokenizer_name(settings: TideBench, data: DataSettings) -> str:
    """The folder of the students' own tokenizer, which tells apart what it was made from."""
    texts = (data.sources, data.extensions, data.max_file_kib)
    return f"tokenizer-{short_hash([texts, settings.tokens, settings.documents])}"


def assignments_of(settings: TideBench) -> dict[str, list[str]]:
    """What the record says of the recipes: settings that all change, the teacher's and each arm's own."""
    return {
        "all": [*everywhere(settings)],
        TEACHER: [*of_teacher(settings)],
        **{arm: [*of_student(settings, arm)] for arm in settings.chosen},
    }
