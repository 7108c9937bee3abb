"""AR checkpoint → initial student: same weights, fewer layers, smaller width, or random weights.

The student is the same architecture with bidirectional attention (`config.is_causal = False`; blocks
are a matter of masks), no dropout and a mask token. Layers and channels that remain keep the teacher's
weights: layers evenly spread from first to last, channels evenly spread ("weight selection",
arXiv 2311.18823). A published diffusion model (published.py) becomes a student as it is.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .attention import BLOCK_ATTENTIONS, FULL
from .checkpoint import (
    is_denoiser,
    load_ar,
    load_config,
    load_denoiser,
    load_tokenizer,
    published_at,
    read_settings,
    saved_layout,
    source_path,
    weights_hash,
)
from .config import require
from .denoiser import Denoiser
from .errors import CheckpointError, ConfigError, VocabError, check_known
from .new_tokens import give_tokens, set_tokens
from .published import (
    Published,
    code_hash,
    has_own_code,
    load_published,
    published_vocab,
    stored_dtype,
)
from .vocab import Vocab, read_vocab

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

KINDS = ("mdlm", "bd3lm")

# What a published diffusion model has instead of the settings of the same name.
AS_IT_IS = {"layers": None, "width": 1.0, "random": False, "tokenizer": None}

# Projections and the dimension of their weight along which attention heads lie.
QUERY_HEADS = {("q_proj", 0), ("o_proj", 1)}
KEY_VALUE_HEADS = {("k_proj", 0), ("v_proj", 0)}


@dataclasses.dataclass(frozen=True)
class StudentSettings:
    """How the initial student is made.

    init         AR model: folder, .gguf file, hub name or "embedded"; or a student to train further; or a
                 published diffusion model, for which null means "as published" and which keeps its layers,
                 its width, its weights and its tokenizer
    layers       layers kept; null = all
    width        fraction of channels and heads kept, 0 < width <= 1
    random       true = random weights in the shape of the config; no weights are read
    kind         "mdlm": every token sees the whole canvas; "bd3lm": block diffusion; null = as init, or
                 mdlm if that is an AR model
    block_size   bd3lm: tokens a block; null = that of init, or 4 if it has no blocks
    attention    bd3lm: what blocks see: block, context_causal or reordered; null = that of init, or block
    shift        position i is predicted from output i - 1, as in the AR model; false takes it from a
                 published model that has it, true gives it to none
    mask_token   special token of the tokenizer to reuse as mask; null = add a new one
    tokenizer    another tokenizer for the student: folder, or any model; null = that of init. Its tokens
                 start as means of the rows of what init's tokenizer makes of them
    start_token  token that opens every document; null = the tokenizer's bos, or its eos
    end_token    token that closes every document; null = the tokenizer's eos
    seed         of random weights
    trust_remote_code  true = run the code that comes with a published model, if it has no other, or with
                 a student made from one
    """

    init: str = "embedded"
    layers: int | None = None
    width: float = 1.0
    random: bool = False
    kind: str | None = None
    block_size: int | None = None
    attention: str | None = None
    shift: bool = True
    mask_token: str | None = None
    tokenizer: str | None = None
    start_token: str | None = None
    end_token: str | None = None
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        require(0 < self.width <= 1, f"student.width must be in (0, 1]; got {self.width}")
        require(
            self.layers is None or self.layers >= 1,
            f"student.layers must be at least 1 or null; got {self.layers}",
        )
        if self.kind is not None:
            check_known("student.kind", self.kind, KINDS)
        for name in ("block_size", "attention"):
            value = getattr(self, name)
            require(
                value is None or self.kind == "bd3lm",
                f"student.{name}={value} needs student.kind=bd3lm; got kind {self.kind}",
            )
        require(
            self.block_size is None or self.block_size >= 1,
            f"student.block_size must be at least 1; got {self.block_size}",
        )
        if self.attention is not None:
            check_known("student.attention", self.attention, BLOCK_ATTENTIONS)

    @property
    def blocks(self) -> int | None:
        """Tokens a block of a student made from an AR model; None if it has none."""
        return layout(self)[0]


def layout(
    settings: StudentSettings, before: tuple[int | None, str] = (None, FULL)
) -> tuple[int | None, str]:
    """(tokens of a block or None, attention) of a student made from one with the layout `before`.

    What the settings do not name stays; where there were no blocks they have 4 tokens and see themselves.
    """
    if settings.kind == "mdlm":
        return None, FULL
    if settings.kind is None:
        return before
    had, saw = before
    seen = saw if had is not None else "block"
    return settings.block_size or had or 4, settings.attention or seen


def check_settings(settings: StudentSettings) -> None:
    """Raise ConfigError for settings that mean nothing for what `init` is."""
    if is_denoiser(settings.init):
        meant = ("init", "kind", "block_size", "attention", "trust_remote_code")
        if settings != StudentSettings(**{name: getattr(settings, name) for name in meant}):
            raise _already(settings)
    elif found := published_at(settings.init):
        for name, value in AS_IT_IS.items():
            asked = getattr(settings, name)
            require(
                asked == value,
                f"student.{name}={asked} is for students made from an AR model; {found.source} is a"
                f" published diffusion model ({found.family.name}), which is taken as it is",
            )
    else:
        require(
            not settings.trust_remote_code,
            f"student.trust_remote_code is for published diffusion models; {settings.init} is none",
        )


def _already(settings: StudentSettings) -> ConfigError:
    return ConfigError(
        f"{settings.init} is a student already: only kind, block_size and attention can be changed;"
        " train it further with student.init and no other student settings, or convert the AR model it"
        " came from"
    )


def initial(settings: StudentSettings) -> Denoiser:
    """The student that training begins with: what `convert` makes, or one that was trained, as it is."""
    if not is_denoiser(settings.init) or settings.kind is not None:
        return convert(settings)
    check_settings(settings)
    return load_denoiser(settings.init, trust_remote_code=settings.trust_remote_code)


def convert(settings: StudentSettings, *, as_stored: bool = False) -> Denoiser:
    """The initial student, in float32. Raises CheckpointError, VocabError or ConfigError.

    `as_stored`: weights that are only copied, those of a diffusion model, keep their number type.
    """
    check_settings(settings)
    if is_denoiser(settings.init):
        return in_other_blocks(settings, as_stored=as_stored)
    if found := published_at(settings.init):
        return convert_published(found, settings, as_stored=as_stored)
    vocab = student_vocab(settings)
    if settings.random:
        student = random_student(settings, vocab)
    else:
        student = initialised_student(settings)
        if settings.tokenizer is not None:
            give_tokens(student, read_vocab(load_tokenizer(settings.init)), vocab)
    make_bidirectional(student)
    add_mask_row(student, vocab)
    block_size, attention = layout(settings)
    return Denoiser(
        student,
        vocab,
        shift=settings.shift,
        block_size=block_size,
        attention=attention,
        lineage=(lineage_step(settings),),
    ).eval()


def in_other_blocks(settings: StudentSettings, *, as_stored: bool = False) -> Denoiser:
    """A student with its weights, that reads a full canvas or blocks from now on as `layout` says.

    Raises ConfigError if nothing is asked of it.
    """
    if settings.kind is None:
        raise _already(settings)
    folder = Path(settings.init).expanduser()
    block_size, attention = layout(settings, saved_layout(read_settings(folder)))
    student = load_denoiser(
        settings.init,
        dtype=stored_dtype(folder) if as_stored else torch.float32,
        trust_remote_code=settings.trust_remote_code,
    )
    became = {"block_size": block_size, "attention": attention}
    return Denoiser(
        student.model,
        student.vocab,
        shift=student.shift,
        block_size=block_size,
        attention=attention,
        lineage=(*student.lineage, {**lineage_step(settings), **became}),
    ).eval()


def lineage_step(settings: StudentSettings) -> dict[str, Any]:
    """Where the weights of an initial student come from, and what was asked of it."""
    place = None if settings.random else source_path(settings.init)
    return {
        "step": "convert",
        "from": settings.init,
        "weights": weights_hash(place) if place else None,
        **({"code": code_hash(place)} if place and has_own_code(place) else {}),
        **{
            field.name: getattr(settings, field.name)
            for field in dataclasses.fields(settings)
            if field.name != "init"
        },
    }


def convert_published(
    found: Published, settings: StudentSettings, *, as_stored: bool = False
) -> Denoiser:
    """A published diffusion model as a student, ready to be trained or saved.

    Raises whatever `load_published` raises.
    """
    student = load_published(
        found,
        dtype=stored_dtype(found.folder) if as_stored else torch.float32,
        kind=settings.kind,
        block_size=settings.block_size,
        attention=settings.attention,
        shift=None if settings.shift else False,
        mask_token=settings.mask_token,
        start_token=settings.start_token,
        end_token=settings.end_token,
        trust_remote_code=settings.trust_remote_code,
    )
    make_bidirectional(student.model)
    became = {
        "family": found.family.name,
        "shift": student.shift,
        "block_size": student.block_size,
        "attention": student.attention,
    }
    student.lineage = ({**lineage_step(settings), **became},)
    return student


def student_vocab(settings: StudentSettings) -> Vocab:
    """The vocabulary that the initial student will have; no weights are read."""
    if found := published_at(settings.init):
        return published_vocab(found, settings.mask_token, settings.start_token, settings.end_token)
    try:
        tokenizer = load_tokenizer(settings.tokenizer or settings.init)
    except CheckpointError as error:
        if settings.tokenizer is None:
            raise
        raise CheckpointError(f"student.tokenizer is no tokenizer: {error}") from error
    vocab = read_vocab(tokenizer, start_token=settings.start_token, end_token=settings.end_token)
    return vocab.with_mask(settings.mask_token)


def initialised_student(settings: StudentSettings) -> PreTrainedModel:
    """The AR model itself, or a smaller one that keeps part of its weights."""
    source, _ = load_ar(settings.init)
    config = student_config(source.config, layers=settings.layers, width=settings.width)
    if config.to_dict() == source.config.to_dict():
        return source
    student = type(source)(config)
    student.load_state_dict(shrink(source, student))
    return student


def random_student(settings: StudentSettings, vocab: Vocab) -> PreTrainedModel:
    """Random weights in the shape of the config; the folder needs no weights, and no tokenizer if
    there is another."""
    from transformers import AutoModelForCausalLM

    source = load_config(settings.init)
    config = student_config(source, layers=settings.layers, width=settings.width)
    if settings.tokenizer is not None:
        set_tokens(config, vocab)
    torch.manual_seed(settings.seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def make_bidirectional(model: PreTrainedModel) -> None:
    """Set bidirectional attention and no dropout, in the config and in the modules."""
    for config in (model.config, model.config.get_text_config()):
        config.is_causal = False
        config.use_cache = False
        _zero_dropout(config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _zero_dropout(module)  # modules keep rates of their own for the functional form


def _zero_dropout(owner: Any) -> None:
    for name, value in list(vars(owner).items()):
        if isinstance(value, float) and name.endswith(("dropout", "pdrop")):
            setattr(owner, name, 0.0)


@torch.no_grad()
def add_mask_row(model: PreTrainedModel, vocab: Vocab) -> None:
    """Give the mask token a row: the mean embedding at the typical norm of a row.

    The row is set for a reused token too: an unused row may have zero norm, and a reused token
    (say, a separator) would start with a meaning. Raises VocabError if the model has too few rows.
    """
    assert vocab.mask_id is not None
    rows = model.get_input_embeddings().weight.shape[0]
    if vocab.mask_id >= rows:
        if vocab.mask_id != rows:
            raise VocabError(
                f"the tokenizer has {len(vocab)} tokens but the model only {rows} rows;"
                " tokenizer and weights do not belong together"
            )
        model.resize_token_embeddings(rows + 1, mean_resizing=False)
    weight_VD = model.get_input_embeddings().weight
    others = [i for i in range(min(len(vocab), rows)) if i != vocab.mask_id]
    table_VD = weight_VD[others].float()
    mean_D = table_VD.mean(0)
    weight_VD[vocab.mask_id] = mean_D / mean_D.norm() * table_VD.norm(dim=1).median()
    head_VD = model.get_output_embeddings().weight
    if head_VD is not weight_VD:  # never sampled; a new row must not be left to chance
        head_VD[vocab.mask_id] = head_VD[others].float().mean(0)


def student_config(
    config: PretrainedConfig, *, layers: int | None, width: float
) -> PretrainedConfig:
    """The config of a student with `layers` layers and a fraction `width` of channels and heads."""
    small = copy.deepcopy(config)
    total = config.num_hidden_layers
    if layers is not None:
        if layers > total:
            raise ConfigError(f"student.layers is {layers}, but the checkpoint has only {total}")
        small.num_hidden_layers = layers
        if getattr(config, "layer_types", None) is not None:
            small.layer_types = [config.layer_types[i] for i in _spread(total, layers).tolist()]
    if width < 1:
        if not hasattr(config, "intermediate_size"):
            raise _cannot_shrink("the layers", config)
        heads, groups = config.num_attention_heads, _kv_heads(config)
        kept_groups = max(1, round(groups * width))
        small.num_attention_heads = heads // groups * kept_groups
        if hasattr(config, "num_key_value_heads"):
            small.num_key_value_heads = kept_groups
        small.head_dim = _head_dim(config)
        small.hidden_size = _multiple_of_8(config.hidden_size * width)
        small.intermediate_size = _multiple_of_8(config.intermediate_size * width)
    return small


def shrink(source: PreTrainedModel, student: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The student's state dict, filled with evenly spread layers and channels of the source."""
    path = _layers_path(source)
    kept = _spread(source.config.num_hidden_layers, student.config.num_hidden_layers).tolist()
    weights = source.state_dict()
    state = {}
    for name, wanted in student.state_dict().items():
        origin = name
        if name.startswith(path + "."):
            index, _, rest = name[len(path) + 1 :].partition(".")
            origin = f"{path}.{kept[int(index)]}.{rest}"
        state[name] = _select(name, weights[origin], wanted.shape, source.config)
    return state


def _select(
    name: str, tensor: torch.Tensor, shape: torch.Size, config: PretrainedConfig
) -> torch.Tensor:
    """The evenly spread part of `tensor` with the given shape; whole heads where heads are."""
    for dim, size in enumerate(shape):
        if tensor.shape[dim] == size:
            continue
        unit = _unit(name, dim, config)
        if unit == 1 and tensor.shape[dim] not in (config.hidden_size, config.intermediate_size):
            raise _cannot_shrink(f"the fused weight {name!r}", config)
        units = _spread(tensor.shape[dim] // unit, size // unit)
        index = (units[:, None] * unit + torch.arange(unit)).flatten()
        tensor = tensor.index_select(dim, index)
    return tensor.clone()


def _unit(name: str, dim: int, config: PretrainedConfig) -> int:
    """Channels that stay together: a key/value head, the query heads that share one, or single."""
    here = {(part, dim) for part in name.split(".")}
    if here & QUERY_HEADS:
        return _head_dim(config) * config.num_attention_heads // _kv_heads(config)
    return _head_dim(config) if here & KEY_VALUE_HEADS else 1


def _cannot_shrink(what: str, config: PretrainedConfig) -> ConfigError:
    return ConfigError(
        f"student.width cannot shrink {what} of a {config.model_type} model;"
        " use student.layers instead"
    )


def _spread(total: int, kept: int) -> torch.Tensor:
    """`kept` indices evenly spread over 0..total-1, both ends included."""
    if kept == 1:
        return torch.zeros(1, dtype=torch.long)
    return (torch.arange(kept) * (total - 1) / (kept - 1)).round().long()


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a decoder. Raises ConfigError if they cannot be found."""
    layers = model.get_submodule(_layers_path(model))
    assert isinstance(layers, nn.ModuleList)
    return layers


def _layers_path(model: PreTrainedModel) -> str:
    """Dotted name of the list of layers."""
    total = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == total:
            return name
    raise ConfigError(f"cannot find the {total} layers of a {type(model).__name__}")


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _head_dim(config: Any) -> int:
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


def _multiple_of_8(size: float) -> int:
    return max(8, round(size / 8) * 8)
