"""Both models of `mdm bench latency`, the prompts they share, and the bytes a forward has to read."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from mdm.autoregressive import Autoregressive
from mdm.checkpoint import (
    load_ar,
    load_config,
    load_denoiser,
    load_tokenizer,
    opens_as_denoiser,
    source_path,
    weights_hash,
)
from mdm.commands import to_device
from mdm.config import require
from mdm.denoiser import Denoiser
from mdm.diffusion import generator
from mdm.errors import ConfigError, VocabError
from mdm.eval.human_eval_data import human_eval_problems
from mdm.int8 import num_weights, quantise, weight_bytes
from mdm.loading import dtype_of, quiet
from mdm.serve.memory import Footprint, footprint
from mdm.vocab import Vocab, read_vocab, require_same_tokens

from .latency_settings import LatencyBench

Model = TypeVar("Model", Denoiser, Autoregressive)

READ_ROWS, READ_COLUMNS = 2**13, 2**13  # float32: 256 MiB, more than any cache holds
READ_PASSES = 5


@dataclasses.dataclass(frozen=True)
class Models:
    """The two models on their device.

    shared  the teacher's tokens are the student's, so both are given the same ids
    sizes   of the networks by who, as they were before any quantisation
    """

    student: Denoiser
    teacher: Autoregressive
    shared: bool
    sizes: dict[str, Footprint]

    @classmethod
    def of(cls, student: Denoiser, teacher: Autoregressive, quantization: str = "") -> Models:
        """Both, quantised if asked for. Raises ConfigError if they cannot be."""
        sizes = {"student": footprint(student.model), "teacher": footprint(teacher.model)}
        try:
            require_same_tokens(teacher.vocab.tokenizer, student.vocab.tokenizer)
            shared = True
        except VocabError:
            shared = False
        return cls(quantise(student, quantization), quantise(teacher, quantization), shared, sizes)

    def describe(self, settings: LatencyBench) -> dict[str, Any]:
        """What the record says of them, by who."""
        found = {}
        for who, model, source in (
            ("student", self.student, settings.model),
            ("teacher", self.teacher, settings.teacher),
        ):
            path = source_path(source)
            random = who == "teacher" and settings.random_teacher
            found[who] = {
                "source": source,
                "weights": "random" if random else weights_hash(path) if path else None,
                "parameters": num_weights(model.model),
                "weight_bytes": weight_bytes(model.model),
                "read_bytes": read_bytes(model.model),
                "max_length": model.max_length,
                "block_size": self.student.block_size if who == "student" else None,
            }
        return found


# --- loading ---------------------------------------------------------------------------------------


def open_models(settings: LatencyBench) -> Models:
    """Load both models alike. Raises ConfigError or CheckpointError."""
    if opens_as_denoiser(settings.teacher):
        raise ConfigError(
            f"--teacher {settings.teacher} is a diffusion model; name an autoregressive one"
        )
    dtype = dtype_of(settings.dtype)
    student = load_denoiser(settings.model, dtype=dtype)
    if settings.random_teacher:
        network, tokenizer = random_ar(settings.teacher, dtype, settings.seed)
    else:
        network, tokenizer = load_ar(settings.teacher, dtype=dtype)
    teacher = Autoregressive(network, read_vocab(tokenizer))
    for model in (student, network):
        to_device(model, settings.device)
    models = Models.of(student, teacher, settings.quantization)
    require_room(settings, models)
    return models


def random_ar(source: str, dtype: torch.dtype, seed: int) -> tuple[Any, Any]:
    """A model of this shape with random weights, and its tokenizer; time does not ask what it says."""
    from transformers import AutoModelForCausalLM

    config = load_config(source)
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval(), load_tokenizer(source)


def require_room(settings: LatencyBench, models: Models) -> None:
    """Raise ConfigError if a text of this length does not fit into one of the models."""
    for who, model in (("student", models.student), ("teacher", models.teacher)):
        longest = settings.prompt_length + max(
            settings.gen_length, settings.batch_length if settings.batches else 0
        )
        require(
            longest <= model.max_length,
            f"prompt and text are up to {longest} tokens, but the {who} was built for"
            f" {model.max_length}; lower --gen-length, --batch-length or --prompt-length",
        )


def in_mode(model: Model, mode: str, *, cache: str = "none") -> Model:
    """The model with forwards that are recorded; of its own, on the same weights.

    `cache` is the student's setting. Raises ConfigError if the device or the model cannot be run so.
    """
    if mode == "eager":
        return model
    if isinstance(model, Denoiser) and model.block_size is None and cache == "none":
        raise ConfigError(
            f"mode={mode} records forwards against keys that are kept, and a student without blocks keeps"
            " none; give it a --cache"
        )
    require(
        model.plain_head,
        f"mode={mode} does not record a model whose head is more than a projection of its states",
    )
    from mdm.acceleration import accelerate

    fast = copy.copy(model)  # the eager side stays as it is
    accelerate(fast, mode)
    return fast


def fallbacks(model: Denoiser | Autoregressive) -> dict[str, int]:
    """Why forwards of a model in another mode were run eagerly after all, and how often."""
    owner = getattr(model.runner.body, "__self__", None)
    return dict(getattr(owner, "reasons", {}))


# --- prompts -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The same texts as ids for each side; the very same ids if the vocabulary is shared."""

    student: list[list[int]]
    teacher: list[list[int]]

    def of(self, who: str) -> list[list[int]]:
        """For a side: the plain loop is the student's, `generate` the teacher's."""
        return self.student if who in ("student", "plain") else self.teacher


def human_eval_prompts(models: Models, count: int, length: int, seed: int) -> Prompts:
    """Ends of HumanEval's prompts, at most `length` tokens with the start token, in random order."""
    problems = list(human_eval_problems().values())
    order = torch.randperm(len(problems), generator=generator("latency prompts", seed)).tolist()
    texts = [problems[order[i % len(order)]]["prompt"] for i in range(count)]
    student = models.student.vocab
    own = cut(student, (student.start_id,), texts, length)
    if models.shared:
        return Prompts(own, own)
    teacher = models.teacher
    # Without an opening of its own it begins as its documents do.
    opening = teacher.opening or (teacher.vocab.start_id,)
    return Prompts(own, cut(teacher.vocab, opening, texts, length))


def cut(vocab: Vocab, opening: Sequence[int], texts: Sequence[str], length: int) -> list[list[int]]:
    """The opening and the last tokens of each text, `length` in all at most."""
    kept = max(1, length - len(opening))
    return [[*opening, *ids[-kept:]] for ids in vocab.encode_batch(texts)]


def long_prompt(vocab: Vocab, length: int) -> list[int]:
    """`length` tokens: the start token and programs of HumanEval, one after the other."""
    ids = [vocab.start_id]
    while len(ids) < length:
        for problem in human_eval_problems().values():
            ids += vocab.encode(problem["prompt"] + problem["canonical_solution"])
            if len(ids) >= length:
                break
    return ids[:length]


# --- what memory allows -------------------------------------------------------------------------------


def read_bytes(network: Any) -> int:
    """Bytes of weights that one forward has to read: all but an embedding that is no head as well."""
    table = network.get_input_embeddings().weight
    # A quantised head has no weight; tied, it is a copy.
    head = getattr(network.get_output_embeddings(), "weight", None)
    tied = head is not None and head.data_ptr() == table.data_ptr()
    return weight_bytes(network) - (0 if tied else table.nbytes)


@torch.no_grad()
def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that this device reads: the best of several matrix-vector products in float32."""
    matrix = torch.ones(READ_ROWS, READ_COLUMNS, device=device)
    vector = torch.ones(READ_COLUMNS, device=device)
    best = float("inf")
    for _ in range(1 + READ_PASSES):  # the first one warms up and cannot be the best
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        product = matrix @ vector
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    assert float(product[0]) == READ_COLUMNS
    return matrix.nbytes / best
