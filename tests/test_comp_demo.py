"""CompDemo: how the masks are split, and that every position gets its answer from the right pass.

Shapes: B batch, L length, N rows of answers, D what a row holds.
"""

import pytest
import torch

from mdm.train.comp_demo import halves, merge


def slow_halves(masked, uniforms, share, exact, chunks):
    """One row as lists: the set of positions in the first part. Chunks are judged by their first mask."""
    groups = {}
    for i, is_masked in enumerate(masked):
        if is_masked:
            groups.setdefault(("alone", i) if chunks[i] < 0 else chunks[i], []).append(i)
    by_uniform = sorted(groups.values(), key=lambda group: uniforms[group[0]])
    if exact:
        chosen = by_uniform[: round(share * len(groups))]
    else:
        chosen = [group for group in by_uniform if uniforms[group[0]] < share]
    return {i for group in chosen for i in group}


def random_rows(rows=40, length=12):
    """Masks at all rates, and chunks of 1 to 4 tokens with gaps between them; none crosses a row."""
    masked_BL = torch.rand(rows, length) < torch.linspace(0, 1, rows)[:, None]
    sizes_BL = torch.randint(1, 5, (rows, length))
    chunk_BL = torch.stack([torch.arange(length).repeat_interleave(s)[:length] for s in sizes_BL])
    chunk_BL += 100 * torch.arange(rows)[:, None]
    return masked_BL, torch.rand(rows, length), chunk_BL.masked_fill(chunk_BL % 3 == 1, -1)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("with_chunks", [True, False])
def test_halves_are_those_of_the_definition(with_chunks, exact, share):
    masked_BL, uniforms_BL, chunk_BL = random_rows()
    given = chunk_BL if with_chunks else None
    one_BL, other_BL = halves(masked_BL, uniforms_BL, share, exact, given)
    assert one_BL.dtype == other_BL.dtype == torch.bool
    assert ((one_BL | other_BL) == masked_BL).all()
    assert not (one_BL & other_BL).any()
    if not with_chunks:
        chunk_BL = torch.full_like(chunk_BL, -1)
    for masked, uniforms, chunks, one in zip(
        *(x.tolist() for x in (masked_BL, uniforms_BL, chunk_BL, one_BL)), strict=True
    ):
        expected = slow_halves(masked, uniforms, share, exact, chunks)
        assert {i for i, chosen in enumerate(one) if chosen} == expected


def test_exact_halves_have_the_size_asked_for():
    for masks in range(9):
        masked_BL = (torch.arange(8) < masks).expand(3, -1)
        one_BL, _ = halves(masked_BL, torch.rand(3, 8), 0.5, True)
        assert one_BL.sum(1).tolist() == [round(masks / 2)] * 3


def test_coins_are_independent_and_fair():
    masked_BL = torch.ones(4000, 2, dtype=torch.bool)
    one_BL, _ = halves(masked_BL, torch.rand(4000, 2), 0.3, False)
    both = (one_BL[:, 0] & one_BL[:, 1]).float().mean()
    assert one_BL.float().mean(0).tolist() == pytest.approx([0.3, 0.3], abs=0.03)
    assert both.item() == pytest.approx(0.09, abs=0.02)


def test_chunks_stay_together_and_rows_apart():
    chunk_BL = torch.tensor([[0, 0, 0, 1, 1, -1], [2, 2, 3, 3, 3, -1]])
    masked_BL = torch.ones_like(chunk_BL).bool()
    seen = set()
    for _ in range(300):
        one_BL, _ = halves(masked_BL, torch.rand(2, 6), 0.5, False, chunk_BL)
        for chunk in range(4):
            assert one_BL[chunk_BL == chunk].unique().numel() == 1
        seen.add(tuple(one_BL[[0, 0, 1, 1], [0, 3, 0, 2]].tolist()))
    assert len(seen) == 16  # every combination: no two chunks are tied


def test_of_a_chunk_that_is_masked_in_part_only_the_masks_count():
    chunk_BL, masked_BL = torch.tensor([[0, 0, 0]]), torch.tensor([[False, True, True]])
    one_BL, other_BL = halves(masked_BL, torch.tensor([[0.9, 0.1, 0.9]]), 0.5, False, chunk_BL)
    assert (one_BL.tolist(), other_BL.any().item()) == ([[False, True, True]], False)
    one_BL, _ = halves(masked_BL, torch.tensor([[0.1, 0.9, 0.1]]), 0.5, True, chunk_BL)
    assert not one_BL.any()  # round(.5 · 1 chunk) = 0


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", [(2, 3), (2, 0), (0, 3)])
def test_nothing_is_masked(shape, exact):
    masked_BL = torch.zeros(shape, dtype=torch.bool)
    for chunk_BL in (None, torch.zeros(shape).long()):
        one_BL, other_BL = halves(masked_BL, torch.rand(shape), 0.5, exact, chunk_BL)
        assert one_BL.shape == other_BL.shape == shape
        assert not (one_BL | other_BL).any()
    assert merge(masked_BL, one_BL, torch.empty(0, 4), torch.empty(0, 4)).shape == (0, 4)


# --- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_every_position_is_filled_by_the_pass_in_which_it_is_masked(dtype, trailing, share):
    masked_BL, uniforms_BL, chunk_BL = random_rows()
    one_BL, other_BL = halves(masked_BL, uniforms_BL, share, False, chunk_BL)
    by_pass = [torch.randint(2, (*masked_BL.shape, *trailing)).to(dtype) for _ in range(2)]
    found = merge(masked_BL, one_BL, by_pass[0][one_BL], by_pass[1][other_BL])
    expected = []
    for b, i in masked_BL.nonzero().tolist():
        assert one_BL[b, i] != other_BL[b, i]
        expected.append(by_pass[0 if one_BL[b, i] else 1][b, i])
    assert found.dtype == dtype
    assert torch.equal(found, torch.stack(expected))


def test_order_by_hand():
    masked_BL = torch.tensor([[True, False, True], [True, True, False]])
    one_BL = torch.tensor([[False, False, True], [True, False, False]])
    found = merge(masked_BL, one_BL, torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]]))
    assert found.tolist() == [[3.0], [1.0], [2.0], [4.0]]


def test_answers_that_do_not_fit_are_refused():
    masked_BL = torch.tensor([[True, True, True, False]])
    one_BL = torch.tensor([[True, True, False, False]])
    rows = torch.rand(4, 2)
    with pytest.raises(AssertionError, match="answers for 1 and 1"):
        merge(masked_BL, one_BL, rows[:1], rows[:1])  # one row must not be spread over two
    with pytest.raises(AssertionError, match="different types"):
        merge(masked_BL, one_BL, rows[:2], rows[:1].double())
    with pytest.raises(AssertionError, match="not masked"):
        merge(masked_BL, ~masked_BL, rows[:1], rows[:3])


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_outside_is_refused(share):
    with pytest.raises(AssertionError, match="share must be in"):
        halves(torch.ones(1, 2).bool(), torch.rand(1, 2), share, False)
