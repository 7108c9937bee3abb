"""How much memory a forward will take, and how much it took.

The prediction is made before anything is allocated, so that a request that cannot fit is refused
with the number that was exceeded. It is a bound from above for the models mdm knows, checked
against measurement in tests. A model with blocks reads a few tokens a forward and keeps keys and
values of those before them (mdm/buffers.py), so there `length` is what is read and `kept` what is kept.
Shapes: B rows, L length, N rows of the head, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import psutil
import torch

from mdm.buffers import GRAIN
from mdm.canvas import SamplerSettings
from mdm.denoiser import CHUNK_BYTES
from mdm.proposals import CHUNK_TOKENS

MIB = 2**20
# Bytes that say where a key stands (attention.Tokens), copies included.
PLACE = 4 * 32


# --- before ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Footprint:
    """The sizes of a model that decide what a forward takes, in numbers of elements.

    layers, hidden, inner, heads, vocab  as in its config; `inner` is the widest MLP
    kv_width                             of keys in the attention of a layer: of all heads
    kept_width                           of keys in a cache; less if heads share them
    itemsize                             bytes of one activation
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_width: int
    kept_width: int
    vocab: int
    itemsize: int

    def forward_bytes(
        self, rows: int, length: int, *, padded: bool = False, kept: int | None = None
    ) -> int:
        """Activations of one layer (they are freed layer by layer), and a mask if rows are padded.

        With blocks (`kept` is a number) there always is a mask, and a layer's keys are all there is.
        """
        # Residual and attention 5 widths, the MLP 4.5 of its own: the families in the tests need less.
        activations = rows * length * (5 * self.hidden + 9 * self.inner // 2) * self.itemsize
        if kept is None:
            return activations + (rows * length * length * (2 + self.itemsize) if padded else 0)
        keys = kept + length
        # A layer's keys and values, repeated for heads that share them; six masks of bytes, or one of
        # numbers and two of bytes.
        a_key = 2 * self.kv_width * self.itemsize + PLACE + length * max(6, 2 + self.itemsize)
        return activations + rows * keys * a_key

    def logits_bytes(self, outputs: int) -> int:
        """Logits of `outputs` positions: as the head gives them, in float32, and once more masked."""
        own = self.itemsize if self.itemsize < 4 else 0
        return outputs * (self.vocab * (own + 2 * 4) + 64)

    def step_bytes(
        self,
        rows: int,
        length: int,
        outputs: int,
        settings: SamplerSettings,
        *,
        padded: bool = False,
        kept: int | None = None,
        last: int = 0,
    ) -> int:
        """One denoising step: forward, logits and choice of tokens come one after the other.

        Tokens are chosen for `outputs` positions of all rows, a chunk at a time, with these settings; of
        guided ones there are logits with the prompt, without it, and the two together. What rows with
        blocks keep from earlier steps is not counted, but a new buffer for it is, of `last` tokens if that
        is more than are there now.
        """
        chunk = min(outputs, max(1, CHUNK_BYTES // (4 * self.vocab)))
        times = 3 if settings.cfg_scale > 0 else 1
        words = -(-self.vocab // CHUNK_TOKENS) * CHUNK_TOKENS  # as a draw pads them
        choosing = chunk * (words * (times * 4 + bytes_per_choice(settings)) + 64)
        states = rows * length * self.hidden * self.itemsize
        forward = self.forward_bytes(rows, length, padded=padded, kept=kept)
        most = max(forward, self.logits_bytes(times * chunk) + states, choosing)
        if kept is None:
            return most
        # Rows that share a forward for the first time, or outgrow their buffer, are moved to a new one.
        return self.buffer_bytes(rows, max(kept + length, last)) + most

    def kept_bytes(self, rows: int, length: int) -> int:
        """Keys and values of all layers."""
        return 2 * self.layers * rows * length * self.kept_width * self.itemsize

    def buffer_bytes(self, rows: int, length: int) -> int:
        """A buffer for so many tokens of each row, as it is rounded up."""
        return self.kept_bytes(rows, -(-(length + 1) // GRAIN) * GRAIN)


def bytes_per_choice(settings: SamplerSettings) -> int:
    """Bytes a logit that choosing tokens takes: log-probabilities, probabilities, copies."""
    drawing = 44 if settings.top_p < 1 else 20
    bytes_ = drawing if settings.temperature > 0 else 16 if settings.remasking == "entropy" else 4
    return bytes_ + (4 if settings.suppress_eos else 0)


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
        kept_width=kv_heads * width,
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
