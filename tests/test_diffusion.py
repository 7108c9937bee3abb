"""The forward process: what is masked, how often, and that nothing but the key decides it."""

import pytest
import torch

from mdm.diffusion import (
    apply_mask,
    generator,
    mask_by_rate,
    mask_exactly,
    row_uniforms,
    spread_uniforms,
)

MASKABLE = torch.tensor([[False, True, True, True, True, False], [True] * 6])


def test_keys_make_streams_of_their_own():
    keys = [("mask", 0, 1), ("mask", 1, 0), ("noise", 0, 1), ("mask", 0, 1, 0), ("mask", 0, "1")]
    draws = {float(torch.rand((), generator=generator(*key))) for key in keys}
    assert len(draws) == len(keys)
    assert float(torch.rand((), generator=generator(*keys[0]))) in draws


def test_row_uniforms_do_not_depend_on_the_batch_or_the_global_generator():
    together = row_uniforms("mask", 7, 3, [0, 1, 2], 5)
    assert len(together.unique()) == 15
    torch.manual_seed(99)
    assert torch.equal(row_uniforms("mask", 7, 3, [2, 0], 5), together[[2, 0]])
    assert not torch.equal(row_uniforms("mask", 7, 4, [0], 5), together[:1])
    assert row_uniforms("mask", 7, 3, [], 5).shape == (0, 5)


def test_spread_uniforms_cover_the_levels_evenly():
    count = 8
    u_B = spread_uniforms("level", 0, 5, range(count), count)
    assert u_B.dtype == torch.float32
    assert sorted((u_B * count).long().tolist()) == list(range(count))  # one in each eighth
    assert torch.equal(spread_uniforms("level", 0, 5, [6, 2], count), u_B[[6, 2]])


def test_spread_uniforms_are_uniform_by_themselves_and_stay_below_one():
    draws = torch.cat([spread_uniforms("level", 0, step, [3], 4) for step in range(2000)])
    assert (draws >= 0).all()
    assert (draws < 1).all()
    counts = torch.histc(draws, bins=10, min=0, max=1)
    assert ((counts - 200) ** 2 / 200).sum() < 33  # χ², 9 degrees of freedom, p = 1e-4


def test_mask_by_rate_masks_maskable_positions_below_the_rate():
    uniforms_BL = torch.tensor([[0.0, 0.1, 0.3, 0.5, 0.7, 0.0]] * 2)
    masked_BL = mask_by_rate(torch.tensor([0.5, 0.0]), MASKABLE, uniforms_BL)
    assert masked_BL.tolist() == [[False, True, True, False, False, False], [False] * 6]
    everything_BL = mask_by_rate(torch.ones(2), MASKABLE, uniforms_BL)
    assert torch.equal(everything_BL, MASKABLE)


def test_mask_by_rate_masks_at_the_rate():
    n = 20_000
    uniforms_BL = torch.rand(1, n)
    share = mask_by_rate(torch.tensor([0.3]), torch.ones(1, n, dtype=torch.bool), uniforms_BL)
    assert abs(float(share.float().mean()) - 0.3) < 4 * (0.3 * 0.7 / n) ** 0.5


@pytest.mark.parametrize("count", [0, 1, 3, 4, 9])
def test_mask_exactly_masks_the_smallest_uniforms(count):
    uniforms_BL = torch.tensor([[0.0, 0.9, 0.2, 0.4, 0.1, 0.0], [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]])
    masked_BL = mask_exactly(torch.tensor([count, 2]), MASKABLE, uniforms_BL)
    assert masked_BL[0].nonzero().flatten().tolist() == sorted([4, 2, 3, 1][:count])
    assert masked_BL[1].nonzero().flatten().tolist() == [4, 5]


def test_mask_exactly_gives_exactly_the_count_even_with_ties():
    masked_BL = mask_exactly(
        torch.tensor([3]), torch.ones(1, 6, dtype=torch.bool), torch.ones(1, 6)
    )
    assert masked_BL.sum() == 3


def test_mask_exactly_chooses_every_subset_equally_often():
    n = 6000
    maskable_BL = torch.tensor([[True, False, True, True, True]]).expand(n, -1)
    masked_BL = mask_exactly(torch.full((n,), 2), maskable_BL, torch.rand(n, 5))
    code_B = (masked_BL * 2 ** torch.arange(5)).sum(1)
    counts = torch.unique(code_B, return_counts=True)[1].float()
    assert len(counts) == 6
    assert ((counts - n / 6) ** 2 / (n / 6)).sum() < 26  # χ², 5 degrees of freedom, p = 1e-4


def test_apply_mask_replaces_and_leaves_x0_alone():
    x0_BL = torch.tensor([[5, 6, 7]])
    xt_BL = apply_mask(x0_BL, torch.tensor([[True, False, True]]), 9)
    assert xt_BL.tolist() == [[9, 6, 9]]
    assert x0_BL.tolist() == [[5, 6, 7]]
