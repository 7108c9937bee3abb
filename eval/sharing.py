"""Evaluation by many processes: `torchrun` starts them, the first one leads, all of them compute.

The leader runs the evaluation as if it were alone and hands each list of requests round; every
process answers its share, and the leader gets all answers in order. The requests carry their own
random numbers, so who computes what changes nothing. Messages are JSON.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from mdm.errors import MdmError, RequestError

Compute = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the other processes of `torchrun`, if there are any, and leave them at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("gloo", timeout=datetime.timedelta(hours=12))
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0; 0 leads."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_device() -> str | None:
    """The GPU of this process under `torchrun`; None = no preference."""
    if torch.cuda.is_available() and world_size() > 1:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return None


def lead(name: str, items: Sequence[dict[str, Any]], compute: Compute) -> list[dict[str, Any]]:
    """The leader's side: `compute` of all items, shared among all processes, in order."""
    if world_size() == 1:
        return compute(list(items))
    _broadcast({"name": name, "items": list(items)})
    try:
        own = compute(_share(items))
    except BaseException:
        _gather(None)  # the others wait for it, and would for hours
        raise
    shares = _gather(own)
    for share in shares:
        if isinstance(share, str):  # what went wrong there
            raise RequestError(share)
    results: list[dict[str, Any]] = [{}] * len(items)
    for number, share in enumerate(shares):
        results[number :: world_size()] = share
    return results


def follow(computes: Mapping[str, Compute]) -> None:
    """The other processes' side: answer shares until the leader dismisses them."""
    while (message := _broadcast(None)) is not None:
        try:
            answer: Any = computes[message["name"]](_share(message["items"]))
        except MdmError as error:  # the leader says it, once
            answer = str(error)
        _gather(answer)


def dismiss() -> None:
    """The leader has no more requests."""
    if world_size() > 1:
        _broadcast(None)


def _share(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    # Neighbours in a list are of like length, so every process gets some of each.
    return list(items[rank() :: world_size()])


def _broadcast(message: Any) -> Any:
    """The leader's message, on every process."""
    data = _bytes(message) if rank() == 0 else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor([len(data)])
    dist.broadcast(size, 0)
    if rank() != 0:
        data = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, 0)
    return _value(data)


def _gather(message: Any) -> list[Any]:
    """Every process' message."""
    data = _bytes(message)
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(data)]))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(data)] = data
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [_value(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]


def _bytes(message: Any) -> torch.Tensor:
    # NaN is allowed here: a standard error may be unknown
    return torch.tensor(list(json.dumps(message).encode()), dtype=torch.uint8)


def _value(data: torch.Tensor) -> Any:
    return json.loads(bytes(data.tolist()))
