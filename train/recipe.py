"""A recipe: everything `mdm train` needs, from YAML. Shipped ones are found by name."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mdm.checkpoint import QUANTIZATIONS
from mdm.config import build, override, read_yaml, require, to_tree
from mdm.convert import StudentSettings
from mdm.errors import ConfigError, check_known, unknown

from .checks import check_objective
from .dataset import DataSettings
from .lambdas import MixSettings
from .objective import ObjectiveSettings
from .on_policy import OnPolicySettings
from .optimizer import LR_SCHEDULES
from .placement import MaskSettings, check_masks
from .targets import TargetSettings
from .teachers.denoised import SEES_MASKS

DEFAULT_RECIPE = "demo"
PRECISIONS = ("bf16", "fp32")
SHARDINGS = ("none", "full")


@dataclasses.dataclass(frozen=True)
class TeacherSettings:
    """The teacher: an AR model, or for target.kind=denoised and chunks a diffusion model.

    model         AR: folder, .gguf file, hub name or "embedded"; diffusion: a folder of mdm or a published
                  one. Not loaded if objective.kd_lambda and on_policy.fraction are 0. With target.cache
                  also weights:HASH, where the weights themselves are not at hand
    dtype         of its weights: bf16 or fp32
    quantization  int8 or nf4: linear layers in 8 or 4 bits (`pip install mdm-code[quant]`); "" = off
    offload       weights stay in CPU memory and go to the device layer by layer: slow, but it fits
    trust_remote_code  a published diffusion model may run code that comes with it; only for code you trust
    """

    model: str = "embedded"
    dtype: str = "bf16"
    quantization: str = ""
    offload: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_known("teacher.dtype", self.dtype, PRECISIONS)
        check_known("teacher.quantization", self.quantization, ("", *QUANTIZATIONS))
        require(
            not (self.quantization and self.offload),
            "teacher.quantization and teacher.offload do not go together: quantised weights stay on"
            " the device; choose one",
        )


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """The optimisation.

    steps             optimizer steps
    batch_rows        rows per step, over all processes
    micro_rows        rows per forward pass; fewer saves memory and changes nothing else
    learning_rate     peak of AdamW
    lr_schedule       wsd (warm-up, stable, linear decay), cosine or constant
    warmup_steps      steps of linear warm-up
    decay_fraction    wsd: last part of the steps that decays
    lr_floor          the schedule ends at this fraction of the peak
    weight_decay      of matrices; norms and biases never decay
    betas             of AdamW
    clip              largest gradient norm; 0 = no clipping
    ema_decay         average of the weights, used for evaluation and final/; 0 = off
    precision         bf16 = float32 master weights, bfloat16 autocast; fp32
    gradient_checkpointing  recompute layers in the backward pass: less memory, more time
    sharding          under torchrun: none = every process holds all weights; full = each holds a part of
                      student, teacher, gradients and moments (FSDP2), which costs exchanges
    lora_rank         train low-rank adapters of this rank on the linear layers, and nothing else
                      (`pip install mdm-code[lora]`); 0 = all weights are trained
    lora_alpha        adapters are scaled by lora_alpha / lora_rank; 0 = twice the rank
    seed              of masks and of the order of rows
    eval_every        steps between evaluations on held-out rows; 0 = only before and after
    eval_rows         held-out rows evaluated
    eval_draws        masks drawn for each of them
    checkpoint_every  steps between checkpoints; 0 = only when stopped early
    keep_checkpoints  newest ones kept
    max_minutes       stop (with a checkpoint) after this long; 0 = no limit
    tensorboard       also write TensorBoard events
    """

    steps: int = 100
    batch_rows: int = 8
    micro_rows: int = 8
    learning_rate: float = 1e-4
    lr_schedule: str = "wsd"
    warmup_steps: int = 10
    decay_fraction: float = 0.3
    lr_floor: float = 0.0
    weight_decay: float = 0.1
    betas: tuple[float, ...] = (0.9, 0.95)
    clip: float = 1.0
    ema_decay: float = 0.0
    precision: str = "bf16"
    gradient_checkpointing: bool = False
    sharding: str = "none"
    lora_rank: int = 0
    lora_alpha: int = 0
    seed: int = 0
    eval_every: int = 0
    eval_rows: int = 64
    eval_draws: int = 2
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    max_minutes: float = 0.0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in (
            "steps", "batch_rows", "micro_rows", "eval_rows", "eval_draws", "keep_checkpoints"
        ):  # fmt: skip
            value = getattr(self, name)
            require(value >= 1, f"train.{name} must be at least 1; got {value}")
        for name in (
            "warmup_steps", "weight_decay", "clip", "eval_every", "checkpoint_every", "max_minutes",
            "lora_rank", "lora_alpha",
        ):  # fmt: skip
            value = getattr(self, name)
            require(value >= 0, f"train.{name} must be >= 0; got {value}")
        require(
            self.learning_rate > 0, f"train.learning_rate must be > 0; got {self.learning_rate}"
        )
        for name in ("decay_fraction", "lr_floor"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"train.{name} must be in [0, 1]; got {value}")
        require(0 <= self.ema_decay < 1, f"train.ema_decay must be in [0, 1); got {self.ema_decay}")
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"train.betas must be two numbers in [0, 1); got {list(self.betas)}",
        )
        check_known("train.lr_schedule", self.lr_schedule, LR_SCHEDULES)
        check_known("train.precision", self.precision, PRECISIONS)
        check_known("train.sharding", self.sharding, SHARDINGS)
        require(
            not self.lora_alpha or self.lora_rank > 0,
            f"train.lora_alpha={self.lora_alpha} scales adapters, but train.lora_rank is 0; set both",
        )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One training run."""

    name: str = "run"
    student: StudentSettings = StudentSettings()
    teacher: TeacherSettings = TeacherSettings()
    data: DataSettings = DataSettings()
    target: TargetSettings = TargetSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    masks: MaskSettings = MaskSettings()
    mix: MixSettings = MixSettings()
    on_policy: OnPolicySettings = OnPolicySettings()
    train: TrainSettings = TrainSettings()

    def __post_init__(self) -> None:
        require(
            bool(self.name) and Path(self.name).name == self.name and not self.name.startswith("."),
            f"name must be a plain folder name; got {self.name!r}",
        )
        require(
            self.data.held_out_fraction > 0,
            "data.held_out_fraction must be above 0: training reports the bound on held-out rows",
        )
        check_objective(self.objective, self.target, self.masks, self.mix, self.on_policy)
        if self.distils:
            self._check_teacher()
        check_masks(
            self.masks,
            masking=self.objective.masking,
            language=self.data.language,
            distils=self.objective.distils,
            kd_positions=self.objective.kd_positions,
            ce_positions=self.objective.ce_positions,
        )

    @property
    def distils(self) -> bool:
        """Is a teacher asked, about the data or about rollouts?"""
        return self.objective.distils or self.on_policy.active

    def _check_teacher(self) -> None:
        kind, teacher = self.target.kind, self.teacher
        seen = kind in SEES_MASKS
        require(
            not (seen and (teacher.quantization or teacher.offload)),
            f"teacher.quantization={teacher.quantization!r}, teacher.offload={teacher.offload} with"
            f" target.kind={kind}: a diffusion teacher is held in teacher.dtype on the device; leave both"
            " out, or share it out over processes with train.sharding=full",
        )
        require(
            seen or not teacher.trust_remote_code,
            f"teacher.trust_remote_code is for published diffusion models; target.kind={kind} asks an AR"
            " model: leave it out",
        )


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with mdm."""
    folder = resources.files("mdm.train.recipes")
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def read_recipe(name: str, assignments: Sequence[str] = ()) -> Recipe:
    """A shipped recipe by name, or a YAML file by path, with `section.key=value` overrides."""
    tree: dict[str, Any]
    if name in shipped_recipes():
        with resources.as_file(resources.files("mdm.train.recipes") / f"{name}.yaml") as path:
            tree = read_yaml(path)
    elif Path(name).suffix in (".yaml", ".yml"):
        tree = {"name": Path(name).stem, **read_yaml(name)}
    else:
        raise ConfigError(unknown("recipe", name, shipped_recipes()) + ", or give a .yaml file")
    return build(Recipe, override(tree, assignments))


def named(recipe: Recipe, name: str | None) -> Recipe:
    """The recipe under another name, if one is given."""
    return recipe if name is None else dataclasses.replace(recipe, name=name)


def describe_settings() -> str:
    """Every setting with its default and what it means, from the docstrings of the sections."""
    lines = []
    for section in dataclasses.fields(Recipe)[1:]:
        settings = getattr(Recipe(), section.name)
        lines.append(f"{section.name}")
        meanings = inspect.getdoc(type(settings)) or ""
        for name, value in to_tree(settings).items():
            lines.append(f"  {name} = {json.dumps(value)}")
            lines += [f"      {line}" for line in meaning_of(name, meanings)]
    return "\n".join(lines)


def meaning_of(name: str, docstring: str) -> list[str]:
    """The lines of a docstring's table that belong to `name`: its own, and indented ones after it."""
    found: list[str] = []
    for line in docstring.splitlines():
        key, _, text = line.partition(" ")
        if key == name:
            found.append(text.strip())
        elif found and line.startswith("  "):
            found.append(line.strip())
        elif found:
            break
    return found
