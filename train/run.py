"""A run: its folder, and everything a step needs.

runs/<name>/  recipe.yaml  data/  checkpoints/step-…/  metrics.jsonl  loss.png  record.jsonl  final/
and, of a run that learns from its own text,  prompts/  rollouts/batch-….safetensors  samples.jsonl
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mdm.checkpoint import is_denoiser, load_vocab, save_denoiser, weights_hash
from mdm.config import build, read_yaml, to_tree
from mdm.convert import initial, student_vocab
from mdm.denoiser import Denoiser
from mdm.errors import CheckpointError, ConfigError, DataError
from mdm.record import append_record, commit, make_record, peak_rss_bytes
from mdm.sampler import check_blocks as check_decoding
from mdm.vocab import Vocab

from . import processes
from .checks import check_blocks
from .dataset import PreparedData, open_prepared, prepare, reader_identity
from .held_out import HeldOut, held_out_bound
from .lora import merged, with_adapters
from .objective import loss_meaning
from .on_policy import shares
from .optimizer import WeightAverage, adamw
from .progress import plot_loss
from .prompts import Prompts, write_prompts
from .recipe import Recipe
from .rollouts import Rollout
from .sharding import check_sharding, shared_student, whole_state
from .state import save_state, saved_steps
from .supervision import Ask, bind, open_teacher, require_context
from .teachers.ar import ARTeacher
from .teachers.foreign import projection

WRITTEN = (
    "checkpoints",
    "final",
    "metrics.jsonl",
    "before.safetensors",
    "loss.png",
    "record.jsonl",
    "tensorboard",
    "prompts",
    "rollouts",
    "samples.jsonl",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run; `module` is the denoiser as it is called in training, wrapped by DDP or not.

    `rollouts` are the batches at hand, by number; the trainer renews them.
    """

    recipe: Recipe
    folder: Path
    denoiser: Denoiser
    module: nn.Module
    ask: Ask | None
    data: PreparedData
    optimizer: torch.optim.AdamW
    average: WeightAverage | None
    prompts: Prompts | None = None
    rollouts: dict[int, list[Rollout]] = dataclasses.field(default_factory=dict)

    @property
    def data_identity(self) -> str:
        """Hash of everything the rows were made from."""
        made_from = json.dumps(self.data.manifest["made_from"], sort_keys=True)
        return hashlib.sha256(made_from.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What training did: the held-out evaluations and the totals of this session."""

    folder: Path
    before: HeldOut
    after: HeldOut
    steps: int
    tokens: int
    seconds: float


def new_run(recipe: Recipe, runs: Path, *, overwrite: bool = False) -> Path:
    """Make the folder of a new run. Raises ConfigError if there is one, unless it is to be replaced."""
    folder = runs / recipe.name
    if not overwrite:
        refuse_existing(folder)
    for part in WRITTEN:
        path = folder / part
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(to_tree(recipe), sort_keys=False)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return folder


def refuse_existing(folder: Path) -> None:
    """Raise ConfigError if a run has written anything there."""
    if any((folder / part).exists() for part in WRITTEN):
        raise ConfigError(
            f"{folder} holds a run already; continue it with `mdm train --resume {folder}`,"
            " replace it with --overwrite, or give another --name"
        )


def read_run(folder: Path) -> Recipe:
    """The recipe of an existing run. Raises ConfigError if there is none."""
    if not (folder / "recipe.yaml").is_file():
        raise ConfigError(f"{folder} holds no run to resume: it has no recipe.yaml")
    return build(Recipe, read_yaml(folder / "recipe.yaml"))


def start(recipe: Recipe, folder: Path) -> Run:
    """Student, teacher, data and optimizer as they are before the first step."""
    settings, world = recipe.train, processes.world_size()
    if settings.batch_rows % world:
        raise ConfigError(
            f"train.batch_rows ({settings.batch_rows}) must be a multiple of the number of"
            f" processes ({world})"
        )
    own = recipe.on_policy.rows(settings.batch_rows)
    if own % world:
        raise ConfigError(
            f"train.batch_rows={settings.batch_rows} with on_policy.fraction="
            f"{recipe.on_policy.fraction}: {own} rollouts a step cannot be shared out evenly among"
            f" {world} processes"
        )
    check_sharding(recipe)
    torch.manual_seed(settings.seed)
    denoiser = with_adapters(initial_student(recipe), settings)
    check_blocks(recipe.objective, recipe.data, denoiser)
    check_decoding(denoiser, recipe.on_policy.sampler)
    teacher = open_teacher(recipe, denoiser.vocab)
    if recipe.target.kind == "embedding" and isinstance(teacher, ARTeacher):
        denoiser.projection = projection(denoiser, teacher)
    data = prepare_data(recipe, denoiser.vocab, folder, teacher.vocab if teacher else None)
    require_classes(recipe, data)
    prompts = prepare_prompts(recipe, denoiser.vocab, folder, data)
    if prompts is not None:
        longest = {
            "student": denoiser.max_length,
            **({"teacher": teacher.max_length} if teacher else {}),
        }
        require_rollout_room(recipe, prompts.longest, denoiser.block_size or 1, longest)
    ask = bind(recipe, teacher, denoiser.vocab, data)
    if settings.gradient_checkpointing:
        denoiser.model.activation_checkpointing_enable()
    module = shared_student(denoiser, settings)
    optimizer = adamw(denoiser, weight_decay=settings.weight_decay, betas=settings.betas)
    average = WeightAverage(denoiser, settings.ema_decay) if settings.ema_decay else None
    return Run(recipe, folder, denoiser, module, ask, data, optimizer, average, prompts)


def initial_student(recipe: Recipe) -> Denoiser:
    """What the recipe starts from: a converted AR model, or a denoiser to train further."""
    student = initial(recipe.student)
    require_context(recipe, student.max_length, "student")
    return student


def initial_vocab(recipe: Recipe) -> Vocab:
    """The vocabulary of the initial student, without its weights."""
    init = recipe.student.init
    return load_vocab(init) if is_denoiser(init) else student_vocab(recipe.student)


def require_classes(recipe: Recipe, data: PreparedData) -> None:
    """Raise DataError if masks are weighted by classes that the data does not have."""
    if not recipe.masks.looks_at_classes:
        return
    counts = data.manifest["splits"]["train"]["classes"]
    if sum(count > 0 for count in counts.values()) < 2:
        raise DataError(
            f"masks.where={recipe.masks.where}, masks.distilled={recipe.masks.distilled} go by the class"
            f" of a token, but all tokens are {next(iter(counts))!r}: the rows name no files"
            f" (data.language={recipe.data.language}); set data.language to the name of their language"
        )


def prepare_data(
    recipe: Recipe, vocab: Vocab, folder: Path, read_by: Vocab | None = None
) -> PreparedData:
    """Tokenised rows in the run's folder; the first process makes them, all read them.

    `read_by` is the vocabulary of a teacher with another tokenizer, which then reads them, too.

    A run that has a checkpoint goes on with the rows it began with, whatever the corpus is now.
    """
    if saved_steps(folder / "checkpoints"):
        data = open_prepared(folder / "data")
        if read_by is not None and data.manifest["made_from"].get("reader") != reader_identity(
            read_by
        ):
            raise DataError(
                f"the rows in {folder / 'data'} were read by a teacher with another tokenizer than"
                f" {recipe.teacher.model!r} has now; put the teacher back, or start a new run"
            )
        return data
    if processes.rank() == 0:
        prepare(recipe.data, vocab, folder / "data", read_by)
    processes.barrier()
    return prepare(recipe.data, vocab, folder / "data", read_by)


def prepare_prompts(
    recipe: Recipe, vocab: Vocab, folder: Path, data: PreparedData
) -> Prompts | None:
    """Prompts in the run's folder, which the first process writes; None if there are no rollouts.

    A run that has a checkpoint goes on with those it began with.
    """
    settings = recipe.on_policy
    if not settings.active:
        return None
    if processes.rank() == 0 and not saved_steps(folder / "checkpoints"):
        below = int(data.manifest["held_out_below"])
        write_prompts(settings, recipe.data, vocab, folder / "prompts", below)
    processes.barrier()
    return Prompts(folder / "prompts")


def require_rollout_room(
    recipe: Recipe, prompt: int, block_size: int, longest: dict[str, int]
) -> None:
    """Raise ConfigError if the longest prompt and its rollout do not fit into a model's context."""
    settings = recipe.on_policy
    needed = -(-(prompt + settings.length) // block_size) * block_size
    for who, length in longest.items():
        if needed > length:
            raise ConfigError(
                f"a prompt of {prompt} tokens and on_policy.length={settings.length} are up to {needed}"
                f" tokens, but the {who} was built for at most {length}; lower on_policy.length or"
                " max_prompt_tokens"
            )


def evaluate(run: Run) -> HeldOut:
    """The held-out bound of the averaged weights, or of the weights if there is no average."""
    settings = run.recipe.train
    with averaged_weights(run), precision(run):
        return held_out_bound(
            run.denoiser,
            run.data.held_out,
            num_rows=settings.eval_rows,
            draws=settings.eval_draws,
            batch_rows=settings.micro_rows,
            seed=settings.seed,
        )


def evaluate_before(run: Run, finished_steps: int) -> HeldOut:
    """The evaluation before the first step; a resumed run reads it back."""
    path = run.folder / "before.safetensors"
    if finished_steps > 0:
        try:
            return HeldOut(load_file(path)["values"], run.recipe.train.eval_draws)
        except (OSError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {path}: {error}; start the run again") from error
    before = evaluate(run)
    if processes.rank() == 0:
        save_file({"values": before.values_R4}, path)
    return before


@contextlib.contextmanager
def averaged_weights(run: Run) -> Iterator[None]:
    """Within this context the model holds the averaged weights."""
    if run.average is None:
        yield
        return
    run.average.swap(run.denoiser)
    try:
        yield
    finally:
        run.average.swap(run.denoiser)


def precision(run: Run) -> torch.autocast:
    """bfloat16 autocast if the recipe asks for it; parameters stay float32 either way."""
    return torch.autocast(
        run.denoiser.device.type,
        dtype=torch.bfloat16,
        enabled=run.recipe.train.precision == "bf16",
    )


def save(run: Run, step: int) -> None:
    """A checkpoint after `step` finished steps; all processes write it."""
    save_state(
        run.folder / "checkpoints",
        step,
        run.denoiser,
        run.optimizer,
        run.average,
        data=run.data_identity,
        keep=run.recipe.train.keep_checkpoints,
    )


def finish(run: Run, outcome: Outcome) -> list[str]:
    """Write final/, the loss curve and the record; returns lines that say where they are."""
    lines = []
    settings = to_tree(run.recipe)
    run.denoiser.lineage += (
        {"step": "train", "recipe": settings, "steps": outcome.steps, "commit": commit()},
    )
    with averaged_weights(run):
        student = merged(run.denoiser)
        state = whole_state(student.model)
        if processes.rank() == 0:
            save_denoiser(student, run.folder / "final", state)
    if processes.rank() == 0:
        record = make_record(
            "train",
            {"loss": told_loss(run.recipe), **results_of(outcome)},
            settings=settings,
            seed=run.recipe.train.seed,
            checkpoint=weights_hash(run.folder / "final"),
        )
        append_record(run.folder / "record.jsonl", record)
        image = run.folder / "loss.png"
        drawn = plot_loss(run.folder / "metrics.jsonl", image)
        lines.append(f"loss curve: {image}" if drawn else "no loss curve: install mdm-code[plots]")
        lines.append(f"finished model: {run.folder / 'final'}")
    processes.barrier()
    return lines


def told_loss(recipe: Recipe) -> str:
    """What the loss is, in words for the log and the record."""
    settings, rows = recipe.on_policy, recipe.train.batch_rows
    meaning = loss_meaning(recipe.objective, recipe.masks)
    own = shares(settings, rows, recipe.train.steps - 1)[1]
    if not own:
        never = f"on_policy.start_step={settings.start_step} is not before the last step"
        return f"{meaning}; there are no rollouts, as {never}" if settings.active else meaning
    rollouts = (
        "the teacher's divergence alone, no likelihood bound, on rollouts of the student:"
        f" {own} of {rows} rows a step, new ones every {settings.steps_per_batch} steps"
    )
    start = settings.start_step
    if own == rows and not start:
        return rollouts
    beside = "then" if own == rows else "beside it"
    return f"{meaning}, on the data; {f'after {start} steps, ' if start else ''}{beside} {rollouts}"


def results_of(outcome: Outcome) -> dict[str, Any]:
    """The numbers of a record: before, after, their paired difference, totals."""
    fall, fall_std_err = outcome.before.improvement(outcome.after)
    return {
        "before": outcome.before.summary(),
        "after": outcome.after.summary(),
        "improvement": fall,
        "improvement_std_err": fall_std_err,
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "seconds": outcome.seconds,
        "peak_rss_bytes": peak_rss_bytes(),
    }
