"""One process or many: rank, world size and sums over processes. `torchrun` sets the environment.

The trainer calls these whether or not there are other processes; with one they do nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes of `torchrun`, if it was used, and leave them at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not dist.is_torchelastic_launched():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    # The others wait while the first tokenises, which takes long on a large corpus.
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(hours=12)
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def from_first(text: str) -> str:
    """The text that the first process gives."""
    texts = [text]
    if dist.is_initialized():
        dist.broadcast_object_list(texts)
    return texts[0]


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def device() -> torch.device:
    """The device of this process: its GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
