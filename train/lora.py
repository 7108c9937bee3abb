"""LoRA students: low-rank adapters on the linear layers are trained, and nothing else.

A linear layer W x becomes W x + (alpha / rank) B A x with B = 0 at first (LoRA, arXiv 2106.09685, eq. 3).
The head, the embeddings (the mask token's row, too) and the norms stay as they were. peft puts the
adapters into the model in place, so that the student remains the `transformers` model it was; before
it is saved they are merged into the weights, and what is saved is an ordinary student.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from mdm.denoiser import Denoiser
from mdm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .recipe import TrainSettings


def with_adapters(denoiser: Denoiser, settings: TrainSettings) -> Denoiser:
    """The student with new adapters and all else frozen, if train.lora_rank asks for them.

    The model is changed in place. Raises ConfigError if peft is missing.
    """
    rank = settings.lora_rank
    if rank == 0:
        return denoiser
    require_peft()
    names = list(linear_shapes(denoiser.model))
    # The same adapters in every process, and in a run that is resumed.
    with torch.random.fork_rng(devices=[]), _without_notices():
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(settings.seed)
        config = LoraConfig(r=rank, lora_alpha=alpha(settings), target_modules=names)
        inject_adapter_in_model(config, denoiser.model)
    return denoiser


def merged(denoiser: Denoiser) -> Denoiser:
    """The student with its adapters, if there are any, added to the weights, which is done in place."""
    if not has_adapters(denoiser):
        return denoiser
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [
        (name, layer)
        for name, layer in denoiser.model.named_modules()
        if isinstance(layer, BaseTunerLayer)
    ]
    for name, layer in adapted:
        layer.merge()
        denoiser.model.set_submodule(name, layer.get_base_layer())
    return denoiser


def has_adapters(denoiser: Denoiser) -> bool:
    """Are there adapters that have not been merged?"""
    return any(".lora_A." in name for name, _ in denoiser.model.named_parameters())


def alpha(settings: TrainSettings) -> int:
    """train.lora_alpha, or what stands for it."""
    return settings.lora_alpha or 2 * settings.lora_rank


def linear_shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Shapes of the matrices that get adapters, by the name of the layer: all but the head."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return {
        name: layer.weight.shape
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head
    }


def adapter_parameters(model: PreTrainedModel, rank: int) -> int:
    """How many parameters adapters of this rank would have; peft is not needed to know."""
    return sum(rank * sum(shape) for shape in linear_shapes(model).values())


def require_peft() -> None:
    """Raise ConfigError unless peft is installed."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("train.lora_rank needs peft: `pip install mdm-code[lora]`")


@contextlib.contextmanager
def _without_notices() -> Iterator[None]:
    """Silence what peft says of transposed layers (it mends them) and of kernels that are not there."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
