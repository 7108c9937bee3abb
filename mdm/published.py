"""Checkpoints that others have published, in their own layout, as denoisers.

What a checkpoint is, its config.json says (families.py). Weights come from safetensors only; a tokenizer
is read from its data files. Code that comes with a checkpoint is run for a family that has nothing else,
and only if the user asks for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .attention import FULL
from .denoiser import Denoiser
from .errors import CheckpointError, ConfigError, VocabError
from .families import Config, Family, read_family
from .loading import may_be_hub_name, quiet, readable, require_complete
from .vocab import NEW_MASK_TOKEN, Vocab, read_vocab

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TRUST_VARIABLE = "MDM_TRUST_REMOTE_CODE"
# What is fetched of a hub name. Fetching code is not running it.
FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.py"]


@dataclasses.dataclass(frozen=True)
class Published:
    """A published checkpoint that was recognised: a folder or a hub name, its config.json, its family."""

    source: str
    config: Config
    family: Family

    @property
    def folder(self) -> Path:
        """Where its files lie; those of a hub name are fetched first."""
        place = Path(self.source).expanduser()
        if place.is_dir():
            return place
        from huggingface_hub import snapshot_download

        with readable(self.source), quiet():
            return Path(snapshot_download(self.source, allow_patterns=FILES))


def recognise(source: str) -> Published | None:
    """The published diffusion model behind a folder or hub name; None if it is anything else."""
    config = read_json(source, "config.json")
    if config is None:
        return None
    mask_token = None
    if config.get("model_type") == "qwen2":
        named = (read_json(source, "tokenizer_config.json") or {}).get("mask_token")
        mask_token = named.get("content") if isinstance(named, dict) else named
    family = read_family(config, mask_token)
    return None if family is None else Published(source, config, family)


def read_json(source: str, name: str) -> dict[str, Any] | None:
    """A JSON object among the files of a folder or hub name; None if it is missing or damaged."""
    file = Path(source).expanduser() / name
    if may_be_hub_name(source):
        fetched = hub_file(source, name)
        if fetched is None:
            return None
        file = fetched
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(file.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else None
    return None


@functools.cache
def hub_file(source: str, name: str) -> Path | None:
    """A file of a hub name; None if there is none. The hub is asked once, whatever it answers."""
    from transformers.utils.hub import cached_file

    with contextlib.suppress(OSError, ValueError), quiet():
        return Path(cached_file(source, name))
    return None


def load_published(
    found: Published,
    *,
    dtype: torch.dtype = torch.float32,
    kind: str | None = None,
    block_size: int | None = None,
    attention: str | None = None,
    shift: bool | None = None,
    mask_token: str | None = None,
    start_token: str | None = None,
    end_token: str | None = None,
    trust_remote_code: bool = False,
) -> Denoiser:
    """A published model as a denoiser in eval mode on the CPU; None = as published.

    Raises CheckpointError if weights are missing or of no use, or if the model has code of its own that
    may not be run; VocabError if the mask cannot be found; ConfigError if its blocks are not known.
    """
    size, seen = layout_of(found, kind=kind, block_size=block_size, attention=attention)
    native = config_of(found)
    if native is None:
        model = load_own_code(found.source, dtype=dtype, trust_remote_code=trust_remote_code)
    else:
        model = load_native(found, native, dtype)
    vocab = published_vocab(found, mask_token, start_token, end_token)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(vocab) > rows:
        raise VocabError(
            f"the tokenizer of {found.source} has {len(vocab)} tokens but the model only {rows} rows"
        )
    with readable(found.source):  # a model with its own code may have other arguments than ours
        return Denoiser(
            model,
            vocab,
            shift=found.family.shift if shift is None else shift,
            block_size=size,
            attention=seen,
        ).eval()


def layout_of(
    found: Published,
    *,
    kind: str | None = None,
    block_size: int | None = None,
    attention: str | None = None,
) -> tuple[int | None, str]:
    """(tokens of a block or None, attention) as published, unless the user says otherwise.

    `kind` is "mdlm" (no blocks), "bd3lm" or None = as published. Raises ConfigError if nobody says whether
    a model has blocks, or how many tokens they have; CheckpointError if config.json says nonsense.
    """
    family = found.family
    if kind is None and not family.told:
        command = f"mdm convert {found.source} --output DIR"
        raise ConfigError(
            f"the files of {found.source} do not say whether it reads a full canvas or blocks (family"
            f" {family.name}); convert it with `{command} --kind mdlm`, or `{command} --kind bd3lm"
            " --block-size N`, or set student.kind to train it"
        )
    if kind == "mdlm" or (kind is None and family.attention == FULL):
        return None, FULL
    size = block_size or block_size_in(found) or family.block_size
    if size is None:
        raise ConfigError(
            f"{found.source} is of the family {family.name}, and its config.json does not say how many"
            f" tokens its blocks have; convert it with `mdm convert {found.source} --kind bd3lm"
            " --block-size N --output DIR`"
        )
    return size, attention or ("block" if family.attention == FULL else family.attention)


def block_size_in(found: Published) -> int | None:
    """Tokens of a block by config.json; None if it is silent. Raises CheckpointError for nonsense."""
    for name in ("block_size", "block_length"):
        value = found.config.get(name)
        if value is None:
            continue
        if type(value) is int and value >= 1:
            return value
        raise CheckpointError(
            f"config.json of {found.source} has {name}={value!r}, which is no number of tokens; give"
            " another with `mdm convert --kind bd3lm --block-size N`"
        )
    return None


# --- weights -------------------------------------------------------------------------------------


def config_of(found: Published) -> PretrainedConfig | None:
    """The config of the `transformers` model that a checkpoint is loaded into; None if there is none.

    Raises CheckpointError if no such model computes what config.json asks for.
    """
    if found.family.native is None:
        return None
    try:
        with readable(found.source), quiet():
            return found.family.native(found.config)
    except CheckpointError as error:
        raise CheckpointError(f"{found.source} ({found.family.name}): {error}") from error


def load_native(found: Published, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The `transformers` model of this config, with the published weights under its own names."""
    import transformers

    rename = found.family.rename
    weights = {rename(name): tensor for name, tensor in read_weights(found.folder).items()}
    with readable(found.source), quiet():
        kind = getattr(transformers, config.architectures[0])
        model, loading = kind.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    require_complete(found.source, loading, known_only=True)
    return model.eval()


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the safetensors files of a folder, in one file or several; read when used.

    Raises what `weight_files` raises, and CheckpointError for a file that is damaged.
    """
    from safetensors import safe_open

    weights = {}
    with readable(str(folder)):
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                    weights[name] = tensors.get_tensor(name)
    return weights


def stored_dtype(folder: Path) -> torch.dtype:
    """The number type of the weights in a folder; float32, which holds them all, if they have several.

    Raises what `read_weights` raises. No weight is read.
    """
    from safetensors import safe_open

    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    found = set()
    with readable(str(folder)):
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as tensors:
                found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return names.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder.

    Raises CheckpointError if there are none, or fewer files than their index names.
    """
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        with readable(str(folder)):
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / name for name in sorted(named)]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise CheckpointError(
            f"{folder} has no {missing[0] if missing else 'safetensors file'}; mdm reads weights from"
            " safetensors only"
        )
    return files


def has_own_code(folder: str | Path) -> bool:
    """Does the model in this folder compute with code that lies beside it?"""
    from transformers import CONFIG_MAPPING

    config = read_json(str(folder), "config.json") or {}
    return "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING


def code_hash(folder: str | Path) -> str:
    """First 16 hex digits of the SHA-256 of the code that lies in a folder, names and contents."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).expanduser().glob("*.py")):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.name} {content}\n".encode())
    return digest.hexdigest()[:16]


def require_consent(source: str, trust_remote_code: bool) -> bool:
    """True; raises CheckpointError unless the code that comes with a model may be run. Nothing is read.

    The user must agree, and must have been able to read it: it lies in a local folder, all of it.
    """
    if not Path(source).expanduser().is_dir():
        raise CheckpointError(
            f"{source} comes with its own code, which mdm runs from a local folder only, as a hub can"
            f" change it any day: `hf download {source} --local-dir DIR`, read the .py files, give DIR"
        )
    config = read_json(source, "config.json") or {}
    # "owner/name--file.Class": transformers would fetch the file from that repository.
    if "--" in json.dumps(config.get("auto_map")):
        raise CheckpointError(
            f"config.json of {source} names code of another repository in its auto_map, which mdm does"
            " not run; put the .py files into the folder and name them without `owner/name--`"
        )
    if not trust_remote_code and os.environ.get(TRUST_VARIABLE) != "1":
        raise CheckpointError(
            f"{source} comes with its own code, which mdm runs only if asked: read the .py files, then"
            " use `mdm convert --trust-remote-code`, student.trust_remote_code or"
            f" teacher.trust_remote_code of `mdm train`, or set {TRUST_VARIABLE}=1, which holds for every"
            " command"
        )
    return True


def load_own_code(source: str, *, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """A model that comes with its own code, which is run if `require_consent` finds nothing against it.

    Raises CheckpointError otherwise, before anything of it is imported.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    asked = require_consent(source, trust_remote_code)
    folder = Path(source).expanduser()
    with readable(source), quiet():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=asked)
        config.is_causal = False
        config.use_cache = False
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=asked,
            use_safetensors=True,
            output_loading_info=True,
        )
    require_complete(source, loading)
    return model.eval()


# --- tokens --------------------------------------------------------------------------------------


def published_tokenizer(found: Published) -> PreTrainedTokenizerBase:
    """The tokenizer, from its data files: `tokenizer.json`, or Qwen's two files (Dream has only those).

    Raises CheckpointError if there is neither.
    """
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    folder = found.folder
    if (folder / "tokenizer.json").is_file():
        kind = PreTrainedTokenizerFast
    elif all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        kind = Qwen2Tokenizer
    else:
        raise CheckpointError(
            f"{found.source} has no tokenizer.json, and no vocab.json with merges.txt, so mdm cannot"
            " read its tokenizer without running its code"
        )
    with readable(found.source), quiet():
        return kind.from_pretrained(folder, trust_remote_code=False)


def published_vocab(
    found: Published,
    mask_token: str | None = None,
    start_token: str | None = None,
    end_token: str | None = None,
) -> Vocab:
    """The vocabulary with its mask. What the tokenizer calls bos and eos counts before config.json.

    Raises VocabError if nothing says what the mask is, or the tokenizer does not know it.
    """
    tokenizer, config = published_tokenizer(found), found.config
    if start_token is None and tokenizer.bos_token_id is None:
        start_token = _token(tokenizer, config.get("bos_token_id"))
    if end_token is None and tokenizer.eos_token_id is None:
        end_token = _token(tokenizer, config.get("eos_token_id"))
    vocab = read_vocab(tokenizer, start_token=start_token, end_token=end_token)
    mask_id = config.get("mask_token_id")
    if mask_token is not None:
        return vocab.with_mask(mask_token)
    if mask_id is not None:
        return _with_mask_id(vocab, mask_id, found.source)
    names = [str(tokenizer.mask_token or ""), found.family.mask_token or ""]
    known = [name for name in names if name in tokenizer.get_vocab()]
    if not known:
        raise VocabError(
            f"neither the config.json nor the tokenizer of {found.source} says which token is the mask;"
            " name it with `mdm convert --mask-token`"
        )
    return _with_mask_id(vocab, tokenizer.convert_tokens_to_ids(known[0]), found.source)


def _with_mask_id(vocab: Vocab, mask_id: int, source: str) -> Vocab:
    """The vocabulary with the mask of this id, which becomes a special token if it was none."""
    name = _token(vocab.tokenizer, mask_id)
    if name is not None:
        vocab.tokenizer.add_special_tokens({"mask_token": name})
        return vocab.with_mask(name)
    free = mask_id == len(vocab) and NEW_MASK_TOKEN not in vocab.tokenizer.get_vocab()
    if free:  # the first free id: the trainer added a token that it did not save
        return vocab.with_mask(None)
    raise VocabError(
        f"config.json of {source} says that token {mask_id} is the mask, which its tokenizer of"
        f" {len(vocab)} tokens does not know; name another with `mdm convert --mask-token`"
    )


def _token(tokenizer: PreTrainedTokenizerBase, token_id: Any) -> str | None:
    """The name of a token; None if there is no such id. Some configs give a list of ids: the first."""
    first = token_id[0] if isinstance(token_id, list) and token_id else token_id
    return tokenizer.convert_ids_to_tokens(first) if isinstance(first, int) else None
