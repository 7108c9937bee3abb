"""The models of a recipe, as far as their configs tell: how large, in what blocks, for how many tokens;
and the rows they will read.

Nothing but JSON is read, and code that comes with a model is not run: of such a model the size is reckoned
from the numbers in its config.json, or not known. Whatever the run would refuse in the settings of a
model is refused here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mdm.checkpoint import (
    load_config,
    load_vocab,
    opens_as_denoiser,
    published_at,
    read_settings,
    saved_layout,
)
from mdm.convert import StudentSettings, check_settings, layout, student_config
from mdm.denoiser import max_length
from mdm.errors import CheckpointError, ConfigError
from mdm.published import (
    Published,
    config_of,
    has_own_code,
    layout_of,
    read_json,
    require_consent,
)

from .corpus import HUB
from .recipe import Recipe
from .sizes import Size, mixture_size, size_of
from .target_cache import BY_WEIGHTS
from .teachers.denoised import SEES_MASKS


@dataclasses.dataclass(frozen=True)
class Outline:
    """A model before it is loaded.

    size        None = not known
    layers      decoder layers
    width       of the residual stream
    inner       width of the feed-forward layers that a token passes through
    heads       query heads times their width
    keys        key heads times their width
    rows        of the head
    max_length  longest row the model was built for, in tokens
    reckoned    its code was not run; the size is arithmetic
    block_size, attention, shift  as in Denoiser; what an AR model has not is None, "" and False
    """

    size: Size | None
    layers: int
    width: int
    inner: int
    heads: int
    keys: int
    rows: int
    max_length: int
    reckoned: bool = False
    block_size: int | None = None
    attention: str = ""
    shift: bool = False

    def told(self) -> str:
        """Parameters, and blocks if there are any."""
        if self.size is None:
            found = "size unknown: its code is not run in a dry run"
        else:
            found = f"{self.size.parameters / 1e6:.1f}M parameters"
        if self.reckoned and self.size is not None:
            found = f"about {found} by its config.json (its code is not run in a dry run)"
        if self.block_size is not None:
            found += f", blocks of {self.block_size} tokens, attention {self.attention}"
        return found

    def streams(self, rows: RowShape) -> int:
        """How often the tokens of a row are read at once: its noisy copies, and for blocks clean, too."""
        return rows.copies + (self.block_size is not None)

    def pairs(self, rows: RowShape) -> int:
        """Queries times keys of a row; copies see one another's clean tokens only in one sequence."""
        if self.block_size is None:
            return rows.copies * rows.length**2
        return (self.streams(rows) * rows.length) ** 2


# --- rows ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Rows of one kind that a step learns from.

    count   of all processes
    length  tokens of each
    copies  noisy copies of each
    """

    count: int
    length: int
    copies: int


def copies(recipe: Recipe) -> int:
    """Noisy copies of a row of the data."""
    return 2 if recipe.objective.complementary else 1


def data_rows(recipe: Recipe, count: int | None = None) -> RowShape:
    """Rows of the data: `count` of them, or all of a step."""
    count = recipe.train.batch_rows if count is None else count
    return RowShape(count, recipe.data.length, copies(recipe))


def read_by_teacher(recipe: Recipe, rows: RowShape) -> RowShape:
    """The rows as the teacher reads them: where masks do not matter, copies are one and the same."""
    target = recipe.target
    once = target.kind == "left" and not target.infill
    return dataclasses.replace(rows, copies=1) if once else rows


def prompt_lengths(recipe: Recipe) -> tuple[int, int]:
    """Tokens of a prompt, and most tokens of one. Where sources have prompts of their own, whose lengths
    only the run will know, the first is taken to be what a plain text would give."""
    settings = recipe.on_policy
    plain = settings.prompt_tokens + 1  # a start token goes before it
    return plain, settings.max_prompt_tokens if rows_have_prompts(recipe) else plain


def rows_have_prompts(recipe: Recipe) -> bool:
    """Can a source of prompts hold rows, and these prompts of their own?"""
    names = recipe.on_policy.prompts or recipe.data.sources
    return any(name.startswith(HUB) or name.endswith(ROW_FILES) for name in names)


ROW_FILES = (".jsonl", ".jsonl.gz", ".json")


def rollout_length(student: Outline, prompt: int, limit: int) -> int:
    """Tokens of a row: the prompt, at most `limit` behind it, and the rest of the last block."""
    block = student.block_size or 1
    return -(-(prompt + limit) // block) * block


# --- student and teacher -------------------------------------------------------------------------


def student_outline(recipe: Recipe) -> Outline:
    """The student that training begins with. Raises ConfigError or CheckpointError as the run would."""
    settings, rank = recipe.student, recipe.train.lora_rank
    check_settings(settings)
    if opens_as_denoiser(settings.init):
        return denoiser_outline(settings, rank=rank)
    block_size, attention = layout(settings)
    return dataclasses.replace(
        outline(config_of_student(recipe), rank),
        block_size=block_size,
        attention=attention,
        shift=settings.shift,
    )


def teacher_outline(recipe: Recipe) -> Outline:
    """The teacher that would be loaded. Raises ConfigError or CheckpointError as the run would."""
    settings = recipe.teacher
    if settings.model.startswith(BY_WEIGHTS):
        raise ConfigError(
            f"teacher.model={settings.model} names weights that are not at hand, which goes with"
            " target.cache only; name a model"
        )
    if recipe.target.kind in SEES_MASKS:
        return denoiser_outline(
            StudentSettings(init=settings.model, trust_remote_code=settings.trust_remote_code)
        )
    if opens_as_denoiser(settings.model):
        raise CheckpointError(
            f"teacher.model={settings.model} is a diffusion model, but target.kind={recipe.target.kind}"
            f" asks an autoregressive one; set target.kind to one of {', '.join(SEES_MASKS)}"
        )
    return outline(load_config(settings.model))


def config_of_student(recipe: Recipe) -> Any:
    """The config of a student made from an AR model, with its rows for another tokenizer."""
    settings = recipe.student
    config = student_config(
        load_config(settings.init), layers=settings.layers, width=settings.width
    )
    if settings.tokenizer is not None:
        config.vocab_size = len(load_vocab(settings.tokenizer)) + 1
    return config


# --- from configs --------------------------------------------------------------------------------


def denoiser_outline(settings: StudentSettings, *, rank: int = 0) -> Outline:
    """A denoiser of ours or a published one, with what the settings change in it.

    Raises ConfigError or CheckpointError as loading it would.
    """
    source = settings.init
    if found := published_at(source):
        return published_outline(found, settings, rank=rank)
    saved = read_settings(source)
    if has_own_code(source):
        require_consent(source, settings.trust_remote_code)
        known = reckoned(read_json(source, "config.json") or {})
    else:
        known = outline(load_config(source), rank)
    block_size, attention = layout(settings, saved_layout(saved))
    return dataclasses.replace(
        known, block_size=block_size, attention=attention, shift=saved["shift"]
    )


def published_outline(found: Published, settings: StudentSettings, *, rank: int) -> Outline:
    """A published model, with what the settings change in it."""
    block_size, attention = layout_of(
        found,
        kind=settings.kind,
        block_size=settings.block_size,
        attention=settings.attention,
    )
    config = config_of(found)
    if config is None:
        require_consent(found.source, settings.trust_remote_code)
    return dataclasses.replace(
        reckoned(found.config) if config is None else outline(config, rank),
        block_size=block_size,
        attention=attention,
        shift=found.family.shift and settings.shift,
    )


def outline(config: Any, rank: int = 0) -> Outline:
    """A model of `transformers`: built, but without memory for its weights."""
    return _numbers(config.get_text_config(), size_of(config, rank), max_length(config))


def reckoned(config: Mapping[str, Any]) -> Outline:
    """A model with code of its own, from the fields of its config.json."""
    fields = SimpleNamespace(**config)
    longest = int(config.get("max_position_embeddings") or 2**30)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        setattr(fields, name, config.get(name) or 0)
    known = _numbers(fields, mixture_size(config), longest)
    return dataclasses.replace(known, reckoned=True)


def _numbers(config: Any, size: Size | None, longest: int) -> Outline:
    width, heads = config.hidden_size, config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or width // max(1, heads)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    if expert := getattr(config, "moe_intermediate_size", None):
        chosen = getattr(config, "num_experts_per_tok", None) or 1
        inner = expert * (chosen + (getattr(config, "num_shared_experts", None) or 0))
    return Outline(
        size,
        layers=config.num_hidden_layers,
        width=width,
        inner=inner,
        heads=heads * head,
        keys=keys * head,
        rows=config.vocab_size,
        max_length=longest,
    )


def has_tokenizer(source: str) -> bool:
    """Can the tokenizer be read without fetching weights?"""
    place = Path(source).expanduser()
    if place.is_dir():
        return any((place / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    return published_at(source) is None  # of a published one everything would be fetched
