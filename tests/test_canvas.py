"""Sampler settings and the bookkeeping of one row."""

import pytest
import torch

from mdm.buffers import Prefix
from mdm.canvas import NOTHING_READ, Canvas, SamplerSettings
from mdm.errors import ConfigError

MASK, END = 9, 8


def canvas(holes, *, blocks, steps_per_block, compat="default"):
    """A canvas of 8 positions with these open ones."""
    open_L = torch.zeros(8, dtype=torch.bool)
    open_L[holes] = True
    return Canvas(
        ids_L=torch.arange(8).masked_fill(open_L, MASK),
        valid_L=torch.ones_like(open_L),
        given_L=~open_L,
        open_L=open_L,
        mask_id=MASK,
        settings=SamplerSettings(compat=compat),
        random=torch.Generator(),
        blocks=[slice(*block) for block in blocks],
        block_steps=[steps_per_block] * len(blocks),
    )


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"block_length": -4}, "block_length must be at least 1; got -4"),
        ({"temperature": -0.1}, r"temperature must be >= 0 \(0 = off\); got -0.1"),
        ({"cfg_scale": float("nan")}, "cfg_scale must be >= 0"),
        ({"cfg_scale": float("inf")}, "cfg_scale must be >= 0"),
        ({"remasking": "low_conf"}, "unknown remasking strategy 'low_conf'; did you mean 'low_c"),
        ({"threshold": 0.0}, r"threshold must be in \(0, 1\]; got 0.0"),
        ({"threshold": 1.5}, r"threshold must be in \(0, 1\]; got 1.5"),
        ({"threshold": 0.9, "steps": 8}, r"leave steps out \(got 8\)"),
        ({"threshold": 0.9, "remasking": "entropy"}, "low_confidence or margin; got 'entropy'"),
        ({"threshold": 0.9, "compat": "llada"}, "the published sampler has no threshold"),
        ({"factor": 0.0}, "factor must be > 0; got 0.0"),
        ({"factor": 1.0, "steps": 4}, r"factor decides how many steps there are.*\(got 4\)"),
        ({"factor": 1.0, "remasking": "random"}, "low_confidence or margin; got 'random'"),
        ({"factor": 1.0, "threshold": 0.9}, "threshold and factor are rules that exclude each"),
        ({"factor": 1.0, "compat": "llada"}, "the published sampler has no factor"),
        ({"entropy_bound": -0.1, "remasking": "entropy"}, "entropy_bound must be >= 0; got -0.1"),
        ({"entropy_bound": 0.1}, "remasking entropy; got 'low_confidence'"),
        ({"cache": "dul"}, "unknown cache 'dul'; did you mean 'dual'"),
        ({"cache": "dual", "compat": "llada"}, "the published sampler has no cache; got dual"),
        ({"refresh": 4}, "refresh=4 is for an approximate cache"),
        ({"cache": "dual", "refresh": 0}, "refresh must be at least 1; got 0"),
        ({"compat": "lada"}, "unknown compat mode 'lada'; did you mean 'llada'"),
    ],
)
def test_settings_are_checked(settings, text):
    with pytest.raises(ConfigError, match=text):
        SamplerSettings(**settings)


def test_steps_that_commit_nothing_are_dropped_but_for_the_published_sampler():
    shape = {"blocks": [(2, 4), (4, 6)], "steps_per_block": 3}
    assert canvas([2, 3, 4], **shape).due == [1, 1]
    assert canvas([2, 3, 4], **shape, compat="llada").due == [1, 1, 0]


def test_blocks_without_open_positions_are_passed_over():
    row = canvas([5, 6], blocks=[(1, 3), (3, 5), (5, 7)], steps_per_block=1)
    assert row.blocks == [slice(5, 7)]
    assert row.due == [2]
    assert canvas([], blocks=[(1, 3)], steps_per_block=1).finished


def test_commits_to_the_end():
    row = canvas([2, 3, 5], blocks=[(2, 4), (4, 6)], steps_per_block=2)
    row.commit(torch.tensor([3]), torch.tensor([7]))
    assert row.ids_L.tolist() == [0, 1, MASK, 7, 4, MASK, 6, 7]
    assert row.open_L.nonzero().flatten().tolist() == [2, 5]
    assert not row.finished
    row.commit(torch.tensor([2]), torch.tensor([0]))
    assert row.blocks == [slice(4, 6)]  # the next block, planned anew
    assert row.due == [1]
    row.commit(torch.tensor([5]), torch.tensor([1]))
    assert row.finished
    assert row.decided_L.tolist() == [-1, -1, 1, 0, -1, 2, -1, -1]


def test_a_decision_for_the_mask_decides_nothing():
    row = canvas([2, 3], blocks=[(2, 4)], steps_per_block=2)
    row.commit(torch.tensor([3]), torch.tensor([MASK]))
    assert row.open_L.nonzero().flatten().tolist() == [2, 3]
    assert (row.decided_L == -1).all()


def test_end_fills_what_is_open():
    row = canvas([2, 5], blocks=[(2, 4), (4, 6)], steps_per_block=1)
    row.end(END)
    assert row.ids_L.tolist() == [0, 1, END, 3, 4, END, 6, 7]
    assert row.finished
    assert row.ended
    assert not row.open_L.any()
    assert (row.decided_L == -1).all()  # filled, not decided


@pytest.mark.parametrize("way", ["commit", "end"])
def test_what_was_read_is_freed_with_the_last_block(way):
    row = canvas([2, 5], blocks=[(2, 4), (4, 6)], steps_per_block=1)
    assert row.prefixes is NOTHING_READ
    read = (Prefix(last_D=torch.zeros(3)), Prefix())
    row.prefixes = read
    row.commit(torch.tensor([2]), torch.tensor([0]))
    assert row.prefixes is read
    if way == "commit":
        row.commit(torch.tensor([5]), torch.tensor([1]))
    else:
        row.end(END)
    assert row.prefixes is NOTHING_READ
    assert all(prefix.length == 0 for prefix in row.prefixes)
