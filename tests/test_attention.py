"""Who sees whom, and where positions restart."""

import pytest
import torch

from mdm.attention import float_mask, is_one_full_document, positions, visible

IDS = torch.tensor([[0, 0, 1, 1, 1, -1], [-1, -1, 0, 0, 0, 0]])


@pytest.mark.parametrize("causal", [False, True])
def test_visible_by_its_definition(causal):
    visible_BLL = visible(IDS, causal=causal)
    for b in range(2):
        for q in range(6):
            for k in range(6):
                expected = IDS[b, q] == IDS[b, k] and (not causal or k <= q)
                assert visible_BLL[b, q, k] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_mask_is_finite_and_added(dtype):
    visible_BLL = visible(IDS, causal=False)
    mask = float_mask(visible_BLL, dtype)
    assert mask.shape == (2, 1, 6, 6)
    assert mask.dtype == dtype
    assert (mask[:, 0][visible_BLL] == 0).all()
    assert (mask[:, 0][~visible_BLL] == torch.finfo(dtype).min).all()
    # A row that sees nothing must not become NaN.
    blind = float_mask(torch.zeros(1, 1, 4, dtype=torch.bool), dtype)
    assert blind.softmax(-1).isfinite().all()


def test_positions_restart_with_every_document():
    assert positions(IDS).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3]]


def test_positions_restart_where_an_id_comes_back():
    assert positions(torch.tensor([[0, 1, 0, 0]])).tolist() == [[0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[0, 0, 0]], True),
        ([[0, 0], [3, 3]], True),
        ([[0, 0], [0, -1]], False),
        ([[0, 1]], False),
        ([[-1, -1]], False),
    ],
)
def test_one_full_document(rows, expected):
    assert is_one_full_document(torch.tensor(rows)) is expected
