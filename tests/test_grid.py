"""The blocks of a grid cover it, in order, without overlap."""

import pytest
import torch

from mdm.errors import ConfigError
from mdm.grid import BlockGrid


@pytest.mark.parametrize(
    ("start", "end", "block_length", "blocks"),
    [
        (0, 8, 4, [(0, 4), (4, 8)]),
        (3, 10, 3, [(3, 6), (6, 9), (9, 10)]),  # the last one is shorter
        (2, 5, 100, [(2, 5)]),
        (2, 5, 1, [(2, 3), (3, 4), (4, 5)]),
        (5, 5, 4, []),
        (6, 5, 4, []),
    ],
)
def test_blocks(start, end, block_length, blocks):
    grid = BlockGrid(start, end, block_length)
    assert [grid.block(i) for i in range(grid.num_blocks)] == [slice(*block) for block in blocks]
    # block_of is the inverse; -1 outside
    expected_N = torch.full((12,), -1)
    for index, block in enumerate(blocks):
        expected_N[slice(*block)] = index
    assert torch.equal(grid.block_of(torch.arange(12)), expected_N)


def test_empty_blocks_are_refused():
    with pytest.raises(ConfigError, match="block_length must be at least 1; got 0"):
        BlockGrid(0, 8, 0)
