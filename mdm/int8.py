"""Linear layers in 8 bits on a CPU, for a model that is loaded and only asked: `int8_dynamic`.

A few tokens a forward wait for weights to be read, and these have a quarter of the bytes of float32. A
weight matrix W has a scale s for each output; each token's input x has a range of its own, found when it
comes ("dynamic"). With whole numbers w in -127 … 127 and q in 0 … 255

    W ≈ s · w      x ≈ step · (q + n)      W x ≈ step · (s · (w q) + n · (s · Σ w))

where x is at least n steps. A token's output is then a function of that token alone, as it is in float32,
whatever shares the forward. `torch.ao.quantization.quantize_dynamic` has one range for all tokens of a
forward: neighbours decide what is written, and the huge activations that language models have at a few
tokens leave the others no levels. SmolLM2-135M, 4,111 tokens of HumanEval's solutions, against float32:

                      KL, nats a token   cross-entropy   same argmax
    quantize_dynamic  1.25               +1.14           54 %
    here              .019               +.012           95 %
    bfloat16          .001               +.001           98 %

One range a token is arXiv 2206.01861's; from its least to its largest value instead of around 0 it has half
the KL. A head in float32 would have .015 in place of .019, and take a third longer.

Embeddings stay as they are, and a head tied to one becomes a copy. What is no linear layer (fused experts)
stays, too. Gradients, saving and other devices are for the model as it was.
Not the `quantization: int8 | nf4` of a recipe's teacher: that is bitsandbytes (checkpoint.QUANTIZATIONS).
Shapes: … one or more dimensions, K inputs and N outputs of a layer.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from .buffers import Reader
from .config import require
from .errors import ConfigError, check_known

INT8_DYNAMIC = "int8_dynamic"
QUANTIZATIONS = (INT8_DYNAMIC,)
DTYPE = "float32"  # of everything that is not a weight of a linear layer
ENGINE = "fbgemm"  # faster for few tokens than onednn, and than x86, which chooses between the two
TINY = 1e-20

Model = TypeVar("Model", bound=Reader)


def check_quantization(name: str, dtype: str) -> None:
    """Raise ConfigError unless the quantisation ("" = none) is known and goes with this number type.

    To be asked before a model is loaded; `quantise` asks the model itself.
    """
    if not name:
        return
    check_known("quantization", name, QUANTIZATIONS)
    require(
        dtype == DTYPE,
        f"quantization={name} computes in {DTYPE} between its layers; got dtype={dtype}, so leave one of"
        " the two out",
    )


def quantise(model: Model, name: str = INT8_DYNAMIC) -> Model:
    """Replace the linear layers of a Denoiser's or Autoregressive's network in place; "" = leave it.

    The model is returned. Each layer's own weights are freed as soon as it is replaced. Raises
    ConfigError for an unknown name, a model that is not on the CPU or not in float32, a processor that
    torch has no such layers for, and a network without linear layers or one that reads their weights
    itself.
    """
    if not name:
        return model
    network: Any = model.model
    check_quantization(name, str(network.dtype).removeprefix("torch."))
    require(
        model.device.type == "cpu",
        f"quantization={name} is for the CPU, but the model is on {model.device}; set device to cpu,"
        " or leave quantization out",
    )
    require(
        ENGINE in torch.backends.quantized.supported_engines,
        f"quantization={name} needs torch's {ENGINE}, which this build of torch does not have (it is for"
        " x86 processors); leave quantization out, and try dtype=bfloat16",
    )
    embeddings = {id(one.weight) for one in network.modules() if isinstance(one, nn.Embedding)}
    found = 0
    for parent in list(network.modules()):
        for child, layer in list(parent.named_children()):
            if type(layer) in _kinds():  # a subclass may compute something else
                setattr(parent, child, _replacement(layer, tied=id(layer.weight) in embeddings))
                found += 1
    require(
        found > 0,
        f"{type(network).__name__} has no linear layers left to quantise; leave quantization out",
    )
    network.requires_grad_(False)
    for parameter in network.parameters():
        # All weights of a file are windows on one mapping of it, which is there until the last is gone.
        parameter.data = parameter.data.clone()
    _try_out(network, name)
    return model


def is_quantised(network: nn.Module) -> bool:
    """Has it layers of this file?"""
    return any(True for _ in _layers(network))


def num_weights(network: nn.Module) -> int:
    """Weights and biases as before it was quantised; tied ones once."""
    own = sum(parameter.numel() for parameter in network.parameters())
    return own + sum(
        layer.in_features * layer.out_features for layer in _layers(network) if not layer.tied
    )


def weight_bytes(network: nn.Module) -> int:
    """Bytes of all parameters, buffers and 8-bit weights; tied ones once, a head's copy by itself."""
    tensors = [*network.parameters(), *network.buffers()]
    return sum(tensor.nbytes for tensor in tensors) + sum(
        layer.packed_bytes for layer in _layers(network)
    )


class Int8Linear(nn.Module):
    """A linear layer with weights in 8 bits: (…, K) float32 to (…, N), with at least two dimensions.

    It has no `weight`, so that nobody can use a wrong one by mistake.
    """

    def __init__(
        self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, *, tied: bool = False
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_NK.shape
        self.tied = tied
        scale_N = (weight_NK.abs().amax(1) / 127).clamp_min(TINY)
        self.packed, sums_N = _pack(weight_NK, scale_N)
        self.levels = _levels()
        self.sums_N: torch.Tensor
        self.register_buffer("sums_N", sums_N * scale_N, persistent=False)
        self.least = torch.tensor(TINY)
        self.bias = None if bias_N is None else nn.Parameter(bias_N.clone(), requires_grad=False)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weights, with a scale and a sum for each output."""
        return self.out_features * (self.in_features + 2 * 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Small operations are most of what this costs beside the product, hence the order of the sums.
        # `aminmax` takes twice as long as both of these.
        low = x.amin(-1, keepdim=True)
        span = x.amax(-1, keepdim=True).sub_(low)
        step = torch.add(self.least, span, alpha=1 / self.levels)
        # Whole steps: most inputs are near 0, and if that were between two steps, all would err alike.
        steps = (low / step).round_()
        y = _product((x / step).sub_(steps), self.packed)
        y = y.addcmul_(steps, self.sums_N).mul_(step)
        return y if self.bias is None else y.add_(self.bias)

    def _save_to_state_dict(self, *_: Any, **__: Any) -> None:
        raise ConfigError(
            "a model with quantization=int8_dynamic cannot be saved; save the one it was made from"
        )

    def extra_repr(self) -> str:
        """What `print` shows of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


# --- torch's kernels ---------------------------------------------------------------------------------


def _pack(weight_NK: torch.Tensor, scale_N: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """The weights as whole numbers in the order the kernel reads them, and their sums (N,)."""
    zero_N = torch.zeros(len(scale_N), dtype=torch.long)
    engine = torch.backends.quantized.engine
    with warnings.catch_warnings():
        # torch means to drop quantised tensors. Nothing else makes packed weights for this kernel yet.
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor, torch.quantize_per_")
        whole_NK = torch.quantize_per_channel(
            weight_NK.detach(), scale_N.double(), zero_N, axis=0, dtype=torch.qint8
        )
    torch.backends.quantized.engine = ENGINE
    try:
        packed = torch.ops.quantized.linear_prepack(whole_NK, None)
    finally:
        torch.backends.quantized.engine = engine
    return packed, whole_NK.int_repr().sum(1).float()


def _product(q: torch.Tensor, packed: Any) -> torch.Tensor:
    """(…, N) products of the weights with inputs in 0 … 255, which are rounded to whole numbers."""
    kernel = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
    product: torch.Tensor = kernel(q, 1.0, 0, packed)
    return product


@functools.cache
def _levels() -> int:
    """Steps of an input: 255, or 127 where that overflows.

    Processors without VNNI add two products in 16 bits, which hold 2 · 127 · 127 but not 2 · 127 · 255.
    """
    ones_NK = torch.ones(8, 64)
    packed, _ = _pack(ones_NK, torch.full((8,), 1 / 127))
    product = _product(255 * ones_NK, packed)
    return 255 if bool((product - 255 * 64).abs().max() < 255) else 127


# --- networks ----------------------------------------------------------------------------------------


@functools.cache
def _kinds() -> dict[type[nn.Module], Callable[[Any], torch.Tensor]]:
    """Layers that can be replaced, with their (N, K) weights."""
    from transformers.pytorch_utils import Conv1D

    return {nn.Linear: lambda layer: layer.weight, Conv1D: lambda layer: layer.weight.T}


@torch.no_grad()
def _replacement(layer: Any, *, tied: bool) -> Int8Linear:
    new = Int8Linear(_kinds()[type(layer)](layer), layer.bias, tied=tied)
    return new.train(layer.training)


def _layers(network: nn.Module) -> Iterator[Int8Linear]:
    return (layer for layer in network.modules() if isinstance(layer, Int8Linear))


@torch.no_grad()
def _try_out(network: Any, name: str) -> None:
    """Raise ConfigError if a forward fails or gives no numbers."""
    x_BL = torch.zeros(1, 2, dtype=torch.long)
    try:
        logits_BLV = network(x_BL, use_cache=False).logits
    except AttributeError as error:  # Int8Linear has no `weight`
        raise ConfigError(
            f"{type(network).__name__} reads the weights of its layers itself ({error}), so they cannot"
            f" be replaced; leave quantization={name} out"
        ) from error
    require(
        bool(logits_BLV.isfinite().all()),
        f"{type(network).__name__} gives no finite numbers with quantization={name}; leave it out",
    )
