"""Who sees whom, and where positions restart."""

import oracles
import pytest
import torch

from mdm.attention import (
    BLOCK_ATTENTIONS,
    block_visible,
    float_mask,
    is_one_full_document,
    positions,
    two_stream,
    visible,
)

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


# --- blocks: clean tokens and noisy copies ----------------------------------------------------------

PACKED = torch.tensor(
    [
        [0] * 11,
        [0] * 5 + [1] * 6,  # the grid begins anew inside a block of the row
        [0] * 3 + [1] * 2 + [2] * 4 + [-1] * 2,
        [-1] * 11,
    ]
)


def masks(copies, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(copies * len(PACKED), PACKED.shape[1], generator=generator) < 0.5


def listed(masked_BL, copies):
    """The tokens of each row, in the order in which `two_stream` says they stand."""
    rows, length = PACKED.shape
    starts_BL = positions(PACKED)
    for row in range(rows):
        places = []
        for copy in [*range(1, copies + 1), 0]:
            for i in range(length):
                hidden = copy > 0 and bool(masked_BL[(copy - 1) * rows + row, i])
                document, position = int(PACKED[row, i]), int(starts_BL[row, i])
                places.append(oracles.Place(document, position, copy, hidden))
        yield places


@pytest.mark.parametrize("copies", [1, 2])
def test_tokens_of_two_streams(copies):
    masked_BL = masks(copies)
    tokens = two_stream(PACKED, masked_BL)
    for row, places in enumerate(listed(masked_BL, copies)):
        assert tokens.document[row].tolist() == [place.document for place in places]
        assert tokens.position[row].tolist() == [place.position for place in places]
        assert tokens.stream[row].tolist() == [place.copy for place in places]
        assert tokens.masked[row].tolist() == [place.masked for place in places]


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 32])
@pytest.mark.parametrize("attention", BLOCK_ATTENTIONS)
def test_truth_table_of_two_streams(attention, block_size, copies):
    masked_BL = masks(copies, seed=block_size)
    tokens = two_stream(PACKED, masked_BL)
    seen_BSS = block_visible(tokens, tokens, block_size, attention)
    for row, places in enumerate(listed(masked_BL, copies)):
        expected = [
            [oracles.sees_in_streams(query, key, block_size, attention) for key in places]
            for query in places
        ]
        assert seen_BSS[row].tolist() == expected
    assert bool(seen_BSS.diagonal(dim1=1, dim2=2).all())  # no row of the softmax is empty


def test_a_table_by_hand():
    """Blocks of two, three tokens, first and last masked: [x_t ; x_0] of BD3LM and of WeDLM."""
    tokens = two_stream(torch.zeros(1, 3).long(), torch.tensor([[True, False, True]]))
    table = {
        "block": ["110000", "110000", "001110", "000110", "000110", "000111"],
        "context_causal": ["110000", "110000", "001110", "000100", "000110", "000111"],
        "reordered": ["110000", "010000", "001110", "000100", "000110", "000111"],
    }
    for attention, lines in table.items():
        seen_SS = block_visible(tokens, tokens, 2, attention)[0]
        assert ["".join("01"[int(x)] for x in line) for line in seen_SS] == lines, attention


def test_queries_and_keys_may_be_different_tokens():
    tokens = two_stream(PACKED, masks(1))
    whole_BSS = block_visible(tokens, tokens, 3, "block")
    clean = type(tokens)(
        *(getattr(tokens, n)[:, 11:] for n in ("document", "position", "stream", "masked"))
    )
    noisy = type(tokens)(
        *(getattr(tokens, n)[:, :11] for n in ("document", "position", "stream", "masked"))
    )
    assert block_visible(noisy, clean, 3, "block").equal(whole_BSS[:, :11, 11:])
    assert block_visible(clean, noisy, 3, "block").equal(whole_BSS[:, 11:, :11])
    both = noisy.cat(clean)
    assert block_visible(both, both, 3, "block").equal(whole_BSS)
