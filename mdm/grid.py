"""BlockGrid: which position belongs to which block.

Whoever cuts a canvas into blocks asks this one grid, so that their blocks cannot differ. Positions
before `start` (a prompt) belong to no block.
"""

from __future__ import annotations

import dataclasses

import torch

from .errors import ConfigError


@dataclasses.dataclass(frozen=True)
class BlockGrid:
    """Blocks of `block_length` positions from `start` to `end`; the last one may be shorter."""

    start: int
    end: int
    block_length: int

    def __post_init__(self) -> None:
        if self.block_length < 1:
            raise ConfigError(f"block_length must be at least 1; got {self.block_length}")

    @property
    def num_blocks(self) -> int:
        """Number of blocks; 0 if there is nothing after `start`."""
        return -(-max(0, self.end - self.start) // self.block_length)

    def block(self, index: int) -> slice:
        """Positions of block `index`."""
        first = self.start + index * self.block_length
        return slice(first, min(first + self.block_length, self.end))

    def block_of(self, positions_N: torch.Tensor) -> torch.Tensor:
        """Block index of each position; -1 for positions outside the grid."""
        index_N = torch.div(positions_N - self.start, self.block_length, rounding_mode="floor")
        inside_N = (positions_N >= self.start) & (positions_N < self.end)
        return torch.where(inside_N, index_N, torch.full_like(index_N, -1))
