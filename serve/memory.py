"""How much memory a forward will take, and how much it took.

The prediction is made before anything is allocated, so that a request that cannot fit is refused
with the number that was exceeded. It is a bound from above for the models mdm knows, checked
against measurement in tests. Shapes: B rows, L length, N rows of the head, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import psutil
import torch

MIB = 2**20


# --- before ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Footprint:
    """The sizes of a model that decide what a forward takes, in numbers of elements.

    layers, hidden, inner, heads, kv_width, vocab   as in its config; `inner` is the widest MLP
    itemsize                                        bytes of one activation
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_width: int
    vocab: int
    itemsize: int

    def forward_bytes(self, rows: int, length: int) -> int:
        """Activations of one layer (they are freed layer by layer) and the attention mask."""
        tokens = rows * length
        # Residual, norm in float32, queries, keys and values (repeated for grouped heads), output;
        # gate, up and their product.
        per_token = (8 * self.hidden + 4 * self.kv_width + 4 * self.inner) * self.itemsize
        mask = rows * length * length * (1 + 2 * self.itemsize)
        return tokens * (per_token + 4 * self.hidden) + mask

    def logits_bytes(self, outputs: int) -> int:
        """Logits of `outputs` positions: as the head gives them, in float32, and once more masked."""
        return outputs * self.vocab * (self.itemsize + 2 * 4)

    def proposal_bytes(self, outputs: int, *, sampled: bool, nucleus: bool) -> int:
        """What choosing tokens for the open positions of one row takes beside the logits."""
        per_logit = 2 * 4 + (32 if sampled else 0) + (48 if nucleus else 0)
        return outputs * self.vocab * per_logit

    def cache_bytes(self, rows: int, length: int) -> int:
        """Keys and values of a causal model; growing copies them once."""
        return 2 * 2 * self.layers * rows * length * self.kv_width * self.itemsize


def footprint(model: Any) -> Footprint:
    """The footprint of a `transformers` causal LM."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return Footprint(
        layers=config.num_hidden_layers,
        hidden=max(config.hidden_size, heads * width),
        inner=int(inner or 4 * config.hidden_size),
        heads=heads,
        kv_width=max(kv_heads * width, heads * width),
        vocab=model.get_output_embeddings().weight.shape[0],
        itemsize=model.dtype.itemsize,
    )


def free_bytes(device: torch.device) -> int:
    """Memory that is free now: of the GPU, or of this machine (or the control group it is in)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(psutil.virtual_memory().available, _left_in_control_group())


def _left_in_control_group() -> int:
    """What the control group of a container leaves; huge if there is none."""
    place = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        limit = (place / "memory.max").read_text().strip()
        if limit != "max":
            return max(0, int(limit) - int((place / "memory.current").read_text()))
    return 2**60


# --- afterwards ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reading:
    """Bytes of this process: resident now and at most since the meter was reset; on the GPU alike."""

    rss: int
    rss_peak: int
    device: int | None = None
    device_peak: int | None = None


def highest(one: Reading | None, other: Reading) -> Reading:
    """The higher peaks of two readings, the present of the second."""
    if one is None:
        return other
    device = max(one.device_peak or 0, other.device_peak or 0) if other.device is not None else None
    return Reading(other.rss, max(one.rss_peak, other.rss_peak), other.device, device)


class PeakMeter:
    """The highest memory between `reset` and `read`.

    On Linux the kernel keeps the peak and can be asked to forget it; elsewhere only the moments of
    reading are seen.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.process = psutil.Process()

    def reset(self) -> None:
        """Forget earlier peaks."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> Reading:
        """Now and the peak since `reset`."""
        rss = self.process.memory_info().rss
        peak = max(rss, _resident_peak())
        if self.device.type != "cuda":
            return Reading(rss, peak)
        return Reading(
            rss,
            peak,
            torch.cuda.memory_allocated(self.device),
            torch.cuda.max_memory_allocated(self.device),
        )


def _resident_peak() -> int:
    """VmHWM in bytes; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
