"""The model under evaluation: a diffusion student or its AR teacher, behind the same two calls.

`complete` fills holes, `score` tells how likely answers are. What determines their results is in
`identity`, so that a stored result is never taken for that of another model or other settings.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mdm import autoregressive, fim, likelihood
from mdm.autoregressive import Autoregressive, DecodingSettings
from mdm.canvas import SamplerSettings
from mdm.checkpoint import (
    config_hash,
    load_ar,
    load_denoiser,
    opens_as_denoiser,
    source_identity,
)
from mdm.commands import to_device
from mdm.config import build, require
from mdm.denoiser import Denoiser
from mdm.errors import ConfigError, check_known, unknown
from mdm.generate import Generation, Hole, fill
from mdm.int8 import check_quantization, quantise
from mdm.likelihood import Likelihood, LikelihoodSettings, Pair
from mdm.loading import DTYPES, dtype_of
from mdm.published import code_hash, has_own_code
from mdm.sampler import check_blocks
from mdm.vocab import Vocab, read_vocab

from .responses import key_of

STUDENT, TEACHER = "student", "teacher"


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """How a model is run in an evaluation.

    sampler     a student's sampler; temperature and top_p hold for a teacher as well
    likelihood  a student's likelihood
    gen_length  new tokens, instead of what a task asks for; null = the task's own number
    strip       prompts to continue lose the white space at their end, see Evaluated.joins_end
    window      tokens of a window of a rolling likelihood; null = the model's length
    batch_size  texts written at a time
    dtype       float32, bfloat16 or float16
    quantization  "int8_dynamic": linear layers in 8 bits, on a CPU (mdm/int8.py); "" = none
    seed        of sampling and masks
    """

    sampler: SamplerSettings = SamplerSettings()
    likelihood: LikelihoodSettings = LikelihoodSettings()
    gen_length: int | None = None
    strip: bool = False
    window: int | None = None
    batch_size: int = 8
    dtype: str = "float32"
    quantization: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        check_known("dtype", self.dtype, DTYPES)
        check_quantization(self.quantization, self.dtype)
        require(self.batch_size >= 1, f"batch_size must be at least 1; got {self.batch_size}")
        for name, least in (("gen_length", 1), ("window", 2)):
            value = getattr(self, name)
            require(value is None or value >= least, f"{name} must be >= {least}; got {value}")


def model_settings(**values: Any) -> ModelSettings:
    """Settings from one flat list of names; a name of two parts (cfg_scale) holds for both.

    Raises ConfigError for an unknown name. The sampler's temperature is not among them: each
    request has its own.
    """
    tree: dict[str, Any] = {}
    parts = {"sampler": SamplerSettings, "likelihood": LikelihoodSettings}
    own = {field.name for field in dataclasses.fields(ModelSettings)} - set(parts)
    names = {
        part: {field.name for field in dataclasses.fields(kind)} for part, kind in parts.items()
    }
    names["sampler"] -= {"temperature", "top_p"}
    known = own.union(*names.values())
    for name, value in values.items():
        if name not in known:
            raise ConfigError(unknown("setting", name, known))
        if name in own:
            tree[name] = value
        for part in parts:
            if name in names[part]:
                tree.setdefault(part, {})[name] = value
    return build(ModelSettings, tree)


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A loaded model and the settings it is evaluated with.

    source    where it came from
    identity  what tells it from other models: kind, weights hash, vocabulary, dtype, quantization
    """

    model: Denoiser | Autoregressive
    settings: ModelSettings
    source: str
    identity: dict[str, Any]

    @property
    def kind(self) -> str:
        return STUDENT if isinstance(self.model, Denoiser) else TEACHER

    @property
    def vocab(self) -> Vocab:
        return self.model.vocab

    @property
    def max_length(self) -> int:
        return self.model.max_length

    @property
    def opening(self) -> tuple[int, ...]:
        """Tokens before every text: a student's start token, what its tokenizer adds for a teacher."""
        if isinstance(self.model, Denoiser):
            return (self.vocab.start_id,)
        return self.model.opening

    @functools.cached_property
    def template(self) -> fim.Template | None:
        """How a teacher is told of both sides of a hole; None if it was not trained for it."""
        return fim.find_template(self.vocab)

    def joins_end(self, text: str) -> bool:
        """Would this tokenizer join the white space at the end of a prompt with an indentation?

        SmolLM2 and others have a token of a newline and the spaces after it. A prompt that ends with
        the newline alone is then cut inside a token, and the model, which has never seen the two
        halves side by side, does not indent: its score on HumanEval falls to 0.
        """
        if text == text.rstrip():
            return False
        ids = self.vocab.encode(text)
        return self.vocab.encode(f"{text}    return")[: len(ids)] != ids

    def complete(
        self,
        holes: Sequence[Hole],
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        done: Callable[[int, Generation], None] | None = None,
    ) -> list[Generation]:
        """Fill the holes. A teacher sees what stands after one only if it was trained to (fim.py)."""
        if isinstance(self.model, Denoiser):
            sampler = dataclasses.replace(
                self.settings.sampler, temperature=temperature, top_p=top_p
            )
            order = sorted(range(len(holes)), key=lambda i: holes[i].total)
            found = fill(
                self.model,
                [holes[i] for i in order],
                sampler,
                batch_size=self.settings.batch_size,
                done=None if done is None else lambda place, result: done(order[place], result),
            )
            results = dict(zip(order, found, strict=True))
            return [results[i] for i in range(len(holes))]
        return autoregressive.write(
            self.model,
            [self.seen_by_teacher(hole) for hole in holes],
            DecodingSettings(temperature, top_p),
            batch_size=self.settings.batch_size,
            done=done,
        )

    def seen_by_teacher(self, hole: Hole) -> Hole:
        """The hole as a text to continue, if there is something after it."""
        if not hole.after:
            return hole
        if self.template is None:
            raise ConfigError(
                "this autoregressive model has no fill-in-the-middle tokens, so it cannot be told"
                " what stands after a hole; evaluate it left-only"
            )
        return fim.as_continuation(hole, self.template)

    def score(
        self, pairs: Sequence[Pair], *, done: Callable[[int, Likelihood], None] | None = None
    ) -> list[Likelihood]:
        """log p(answer | prompt) of each pair; a bound for a student, exact for a teacher."""
        settings = self.settings.likelihood
        if isinstance(self.model, Denoiser):
            return likelihood.log_likelihood(self.model, pairs, settings, done=done)
        return autoregressive.log_likelihood(
            self.model, pairs, batch_tokens=settings.batch_tokens, done=done
        )


def open_evaluated(source: str, settings: ModelSettings, device: str | None = None) -> Evaluated:
    """The model behind a source: an mdm folder or a published diffusion model is a student, else AR.

    Raises ConfigError if the settings do not go with its blocks, before anything is asked.
    """
    dtype = dtype_of(settings.dtype)
    model: Denoiser | Autoregressive
    if opens_as_denoiser(source):
        model = load_denoiser(source, dtype=dtype)
        check_blocks(model, settings.sampler)
        moved: torch.nn.Module = model
    else:
        network, tokenizer = load_ar(source, dtype=dtype)
        vocab = read_vocab(tokenizer)
        model, moved = Autoregressive(network, vocab, fim.end_ids(vocab)), network
    to_device(moved, device)
    identity = identity_of(model, source, settings.dtype, settings.quantization)
    return Evaluated(quantise(model, settings.quantization), settings, source, identity)


def identity_of(
    model: Denoiser | Autoregressive, source: str, dtype: str, quantization: str = ""
) -> dict[str, Any]:
    """Everything about a model that decides its answers."""
    student = isinstance(model, Denoiser)
    ours = (
        {"shift": model.shift, "block_size": model.block_size, "attention": model.attention}
        if isinstance(model, Denoiser)
        else {}
    )
    return {
        "kind": STUDENT if student else TEACHER,
        "weights": source_identity(source),
        "config": key_of(config_hash(model.model.config), ours)[:16],
        # Of a model that computes with code of its own, which may change while the weights do not.
        **({"code": code_hash(source)} if has_own_code(source) else {}),
        "vocab": model.vocab.fingerprint[:16],
        "dtype": dtype,
        # Left out if there is none: results from before there was any stay valid.
        **({"quantization": quantization} if quantization else {}),
    }
