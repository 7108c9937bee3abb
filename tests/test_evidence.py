"""What is evidence for a masked position, and which masks are filled together: against the definition."""

import pytest
import torch
from tiny_targets import V, places, question, random_question, settings

from mdm.train.teachers.evidence import describe, evidence_end, last_scored, regions

LIMITS = [
    {},
    {"window": 1},
    {"window": 3},
    {"block": 1},
    {"block": 3},
    {"block": 4, "window": 2},
]


def end_of(asked, **limits):
    return evidence_end(asked, settings("suffix", **limits))


def test_last_scored_is_the_document_the_window_or_the_block():
    ids = torch.tensor([[0, 0, 0, 1, 1, -1]])
    assert last_scored(ids, 0).tolist() == [[2, 2, 2, 4, 4, 5]]
    assert last_scored(ids, 1).tolist() == [[1, 2, 2, 4, 4, 5]]
    # Blocks are counted from the start of a document.
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1]])
    assert last_scored(ids, 0, 2).tolist() == [[1, 1, 2, 4, 4, 6, 6, 7]]
    assert last_scored(ids, 0, 0).tolist() == [[2, 2, 2, 6, 6, 6, 6, 7]]
    assert last_scored(ids, 1, 0).tolist() == [[1, 2, 2, 4, 5, 6, 6, 7]]
    assert last_scored(ids, 1, 3).tolist() == [[1, 2, 2, 4, 5, 5, 6, 7]]


def test_evidence_ends_with_the_last_visible_token():
    asked = question([[0] * 6], [2, 4, 5])
    assert end_of(asked)[0, [2, 4, 5]].tolist() == [3, 4, 5]
    # A window or a block may end at a mask: then the token before it is the last.
    asked = question([[0] * 8], [1, 3, 5])
    assert end_of(asked, window=2)[0, [1, 3, 5]].tolist() == [2, 4, 7]
    assert end_of(asked, window=4)[0, [1, 3, 5]].tolist() == [4, 7, 7]
    assert end_of(asked, block=4)[0, [1, 3, 5]].tolist() == [2, 3, 7]
    assert end_of(asked, block=2)[0, [1, 3, 5]].tolist() == [1, 3, 5]


def test_what_stands_before_a_position_or_in_another_document_or_in_padding_is_no_evidence():
    ids = [[0, 0, 0, 1, 1, 1, -1, -1]]
    asked = question([[0] * 8], [2, 4, 5], ids=ids)
    assert end_of(asked)[0, [2, 4, 5]].tolist() == [2, 4, 5]
    asked = question([[0] * 8], [1, 4], ids=ids)
    assert end_of(asked)[0, [1, 4]].tolist() == [2, 5]


@pytest.mark.parametrize("fill", ["region", "span"])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_regions_are_the_definition(limits, fill):
    """Every wanted position is in one region, whose holes up to the end of its evidence are right."""
    for seed in range(12):
        asked = random_question(seed, rows=4, length=11, rate=0.3 + 0.1 * (seed % 5))
        chosen = settings("smc", fill=fill, **limits)
        found = regions(asked, chosen)
        by_index = {index: (region, position) for region in found
                    for position, (index, _) in region.wanted.items()}  # fmt: skip
        slow = places(asked, chosen)
        assert sorted(by_index) == list(range(len(slow)))
        for index, (row, start, _text, position, holes, end) in enumerate(slow):
            region, at = by_index[index]
            assert (region.row, at) == (row, position + start)
            assert region.wanted[at][1] == start + end - 1
            inside = [hole - start for hole in region.holes if hole - start < end]
            assert inside == holes
            # All up to the end of the region, and nothing behind it.
            assert at in region.holes
            assert region.end == max(last for _, last in region.wanted.values())
            assert list(region.holes) == sorted(region.holes)
            assert region.holes[-1] <= region.end


def test_regions_of_spans_and_blocks():
    asked = question([[0] * 10], [1, 2, 4, 5, 6, 8])
    holes = [region.holes for region in regions(asked, settings("smc", fill="span"))]
    assert holes == [(1, 2), (4, 5, 6), (8,)]
    holes = [region.holes for region in regions(asked, settings("smc", block=5))]
    assert holes == [(1, 2, 4), (5, 6, 8)]
    asked = question([[0] * 10], [1, 2, 4, 5, 6, 8], [1, 6])
    holes = [region.holes for region in regions(asked, settings("smc", block=5))]
    assert holes == [(1, 2), (5, 6, 8)]  # nobody asks about 4, and it says nothing about 1
    asked = question([[0] * 10], [1, 2, 4, 5, 6, 8], [4, 6])
    holes = [region.holes for region in regions(asked, settings("smc", fill="span", block=5))]
    assert holes == [(4,), (5, 6)]
    assert [region.holes for region in regions(asked, settings("smc"))] == [(1, 2, 4, 5, 6, 8)]
    assert regions(question([[0] * V], []), settings("smc")) == []


def test_says_what_the_limits_are():
    assert describe(settings("smc"), others=False) == "left+right(document)"
    assert describe(settings("smc", window=3), others=False) == "left+right(window 3)"
    both = describe(settings("suffix", window=3, block=8), others=True)
    assert both == "left+right(window 3, block 8; other masks as in the text)"
