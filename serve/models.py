"""The models a server holds: the student, and the AR teacher beside it if asked for.

Tokenizers keep state while they encode, so each thread has a copy of its own: the engine's is the
model's, `encoder` belongs to the thread that encodes prompts and `decoder` to the event loop.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Collection
from pathlib import Path

from mdm import autoregressive, fim
from mdm.autoregressive import Autoregressive
from mdm.canvas import SamplerSettings
from mdm.checkpoint import (
    EMBEDDED,
    load_ar,
    load_denoiser,
    opens_as_denoiser,
    source_path,
    weights_hash,
)
from mdm.commands import to_device
from mdm.denoiser import Denoiser
from mdm.errors import ConfigError
from mdm.generate import Hole, fill
from mdm.int8 import check_quantization, num_weights, quantise
from mdm.loading import dtype_of
from mdm.vocab import Vocab, read_vocab

from .memory import Footprint, footprint


@dataclasses.dataclass(frozen=True)
class Served:
    """One model under a name.

    name          what a request says as `model`
    source        where it came from
    weights       hash of its weight files; None for a hub name
    quantization  "" or "int8_dynamic" (mdm/int8.py)
    """

    name: str
    source: str
    model: Denoiser | Autoregressive
    dtype: str
    weights: str | None
    footprint: Footprint
    encoder: Vocab
    decoder: Vocab
    quantization: str = ""
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def is_student(self) -> bool:
        return isinstance(self.model, Denoiser)

    @property
    def kind(self) -> str:
        return "student" if self.is_student else "teacher"

    @property
    def parameters(self) -> int:
        """Weights, tied ones once."""
        return num_weights(self.model.model)

    @property
    def max_length(self) -> int:
        return self.model.max_length

    @property
    def block_size(self) -> int | None:
        """Tokens a block of a block diffusion model; None = full canvas, or a teacher."""
        return self.model.block_size if isinstance(self.model, Denoiser) else None

    @property
    def opening(self) -> tuple[int, ...]:
        """Tokens before every text: a student's start token, what its tokenizer adds for a teacher."""
        if isinstance(self.model, Denoiser):
            return (self.encoder.start_id,)
        return self.model.opening

    @property
    def end_ids(self) -> Collection[int]:
        """Tokens that end a text."""
        if isinstance(self.model, Denoiser):
            return (self.model.vocab.eos_id,)
        return self.model.end_ids

    @functools.cached_property
    def template(self) -> fim.Template | None:
        """How a teacher is told of both sides of a hole; None if it was not trained for it."""
        return fim.find_template(self.decoder)

    @property
    def fills_holes(self) -> bool:
        """Can it see what stands after a hole?"""
        return self.is_student or self.template is not None


def open_student(
    source: str, *, name: str | None, dtype: str, device: str | None, quantization: str = ""
) -> Served:
    """The student behind a source. Raises CheckpointError, or ConfigError for settings that cannot be."""
    numbers = dtype_of(dtype)
    check_quantization(quantization, dtype)
    denoiser = load_denoiser(source, dtype=numbers)
    to_device(denoiser, device)
    return _loaded(denoiser, source, name, dtype, quantization)


def open_teacher(
    source: str, *, name: str | None, dtype: str, device: str | None, quantization: str = ""
) -> Served:
    """An AR model: a folder, a .gguf file, a hub name or "embedded"."""
    numbers = dtype_of(dtype)
    check_quantization(quantization, dtype)
    if opens_as_denoiser(source):
        raise ConfigError(f"--teacher {source} is a student; name an autoregressive model")
    network, tokenizer = load_ar(source, dtype=numbers)
    to_device(network, device)
    vocab = read_vocab(tokenizer)
    ar = Autoregressive(network, vocab, fim.end_ids(vocab))
    return _loaded(ar, source, name, dtype, quantization)


def _loaded(
    model: Denoiser | Autoregressive, source: str, name: str | None, dtype: str, quantization: str
) -> Served:
    path = source_path(source)
    return hold(
        model,
        name=name or name_of(source),
        source=source,
        dtype=dtype,
        weights=None if path is None else weights_hash(path),
        quantization=quantization,
    )


def hold(
    model: Denoiser | Autoregressive,
    *,
    name: str,
    source: str,
    dtype: str = "float32",
    weights: str | None = None,
    quantization: str = "",
) -> Served:
    """A loaded model under a name; with a `quantization` it is quantised in place."""
    sizes = footprint(model.model)  # before: a quantised head has no weight to look at
    return Served(
        name=name,
        source=source,
        model=quantise(model, quantization),
        dtype=dtype,
        weights=weights,
        footprint=sizes,
        encoder=_own_copy(model.vocab),
        decoder=_own_copy(model.vocab),
        quantization=quantization,
    )


def warm_up(served: Served) -> None:
    """One short text: what is allocated once is there, and memory at rest can be measured."""
    hole = Hole((served.encoder.start_id,), 2)
    if isinstance(served.model, Denoiser):
        fill(served.model, [hole], SamplerSettings())
    else:
        autoregressive.write(served.model, [hole], autoregressive.DecodingSettings())


def _own_copy(vocab: Vocab) -> Vocab:
    return dataclasses.replace(vocab, tokenizer=copy.deepcopy(vocab.tokenizer))


def name_of(source: str) -> str:
    """A short name: the run of `runs/NAME/final`, otherwise the last part of the path."""
    if source == EMBEDDED:
        return EMBEDDED
    path = Path(source)
    return path.parent.name if path.name == "final" and path.parent.name else path.stem or source
