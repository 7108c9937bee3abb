"""Numbers of parameters, counted in a model without memory, or reckoned from the fields of a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mdm.convert import decoder_layers

from .lora import adapter_parameters, linear_shapes


@dataclasses.dataclass(frozen=True)
class Size:
    """Numbers of parameters of a model, tied ones once.

    parameters  all of them
    layers      in decoder layers
    layer       in the largest decoder layer
    linear      in linear layers but the head
    used        of these, what a token passes through: not all experts
    adapters    that LoRA would add
    matrix      in the largest matrix
    """

    parameters: int
    layers: int
    layer: int
    linear: int
    used: int
    adapters: int
    matrix: int

    @property
    def ends(self) -> int:
        """Parameters before and after the decoder layers: embeddings, head, last norm."""
        return self.parameters - self.layers


def size_of(config: Any, lora_rank: int = 0) -> Size:
    """The size of a model with this config; no memory is taken."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = [numel(layer) for layer in decoder_layers(model)]
    linear = sum(shape.numel() for shape in linear_shapes(model).values())
    return Size(
        parameters=numel(model),
        layers=sum(layers),
        layer=max(layers),
        linear=linear,
        used=linear,
        adapters=adapter_parameters(model, lora_rank),
        matrix=max(parameter.numel() for parameter in model.parameters()),
    )


def mixture_size(config: Mapping[str, Any]) -> Size | None:
    """The matrices of a mixture of experts with the fields of LLaDA2; None if one is missing.

    Gated feed-forward layers and attention with grouped keys; norms and biases are left out.
    """
    names = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
        *("intermediate_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok"),
    )
    found = [config.get(name) for name in names]
    numbers = [number for number in found if isinstance(number, int) and number > 0]
    if len(numbers) < len(names):
        return None
    width, layers, heads, rows, inner, expert_inner, experts, chosen = numbers
    keys: int = config.get("num_key_value_heads") or heads
    head: int = config.get("head_dim") or width // heads
    shared: int = config.get("num_shared_experts") or 0
    dense_layers: int = config.get("first_k_dense_replace") or 0
    attention = width * head * 2 * (heads + keys)
    expert = 3 * width * expert_inner
    dense = attention + 3 * width * inner
    mixture = attention + width * experts + expert * (experts + shared)
    passed = attention + width * experts + expert * (chosen + shared)
    mixtures = layers - dense_layers
    linear = dense_layers * dense + mixtures * mixture
    ends = rows * width * (1 if config.get("tie_word_embeddings") else 2)
    return Size(
        parameters=linear + ends,
        layers=linear,
        layer=max(mixture, dense if dense_layers else 0),
        linear=linear,
        used=dense_layers * dense + mixtures * passed,
        adapters=0,
        matrix=rows * width,
    )


def numel(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
