"""Blocks read with a cache are what one pass over [x_t ; x_0] gives, alone and in any batch.

Token ids: words 0 … 11, start 12, end 13, pad 14, mask 15.
"""

import pytest
import torch
from students import random_student

from mdm.attention import BLOCK_ATTENTIONS
from mdm.buffers import Prefix
from mdm.cache import Row, read_blocks
from mdm.grid import BlockGrid

START, MASK = 12, 15
HEADS = ["llama", "granite"]  # a plain head, and one that is more than a matrix


def block_student(family="llama", *, block_size=3, attention="block", **settings):
    layers = {} if family in ("granite", "gemma2") else {"layers": 2}
    denoiser = random_student(family, block_size=block_size, **layers, **settings)
    denoiser.attention = attention
    return denoiser


def text(length, seed=0):
    tokens_L = torch.randint(0, 12, (length,), generator=torch.Generator().manual_seed(seed))
    tokens_L[0] = START
    return tokens_L


def row_of(ids_L, block, size, prefix=None, open_places=(0, 2), shift=False):
    """A row whose block has masks at these places, and the wanted positions."""
    block = BlockGrid(0, len(ids_L), size).block(block)
    wanted_n = torch.tensor([block.start + place for place in open_places])
    wanted_n = wanted_n[(wanted_n < block.stop) & (wanted_n >= int(shift))]
    noised_L = ids_L.clone()
    noised_L[wanted_n] = MASK
    return Row(noised_L, block, wanted_n, prefix or Prefix())


@torch.no_grad()
def two_streams(denoiser, row):
    """Logits of the wanted positions by one pass over noisy and clean tokens."""
    wanted_L = torch.zeros_like(row.ids_L, dtype=torch.bool)
    wanted_L[row.wanted_n] = True
    return denoiser(row.ids_L[None], wanted_L[None], x0_bL=row.ids_L[None])


def logits(denoiser, rows):
    rows_ND, prefixes = read_blocks(denoiser, rows)
    return denoiser.head(rows_ND), prefixes


def compared(found, expected):
    assert found.shape == expected.shape
    assert torch.allclose(found[..., :15], expected[..., :15], atol=1e-4, rtol=1e-4)
    assert (found[..., 15:] == -torch.inf).all()


def same(one, other):
    """Equal prefixes, up to rounding."""
    assert one.length == other.length
    assert (one.last_D is None) is (other.last_D is None)
    if one.last_D is not None:
        assert torch.allclose(one.last_D, other.last_D, atol=1e-4)
    for own, theirs in zip(one.layers, other.layers, strict=True):
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(own, theirs, strict=True))


# --- against one pass over [x_t ; x_0] -------------------------------------------------------------


@pytest.mark.parametrize("attention", BLOCK_ATTENTIONS)
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("family", [*HEADS, "gpt2", "gemma3"])
def test_equals_two_streams_block_after_block(family, shift, attention):
    denoiser = block_student(family, attention=attention, shift=shift)
    ids_L = text(11)  # the last block is shorter
    prefix = Prefix()
    for block in range(4):
        for places in ([0, 1, 2], [1], [0, 2]):  # later steps of a block read no clean tokens
            row = row_of(ids_L, block, 3, prefix, places, shift)
            found, (prefix,) = logits(denoiser, [row])
            compared(found, two_streams(denoiser, row))
            assert prefix.length == 3 * block
            # As if all had been read at once.
            at_once, (whole,) = logits(denoiser, [row_of(ids_L, block, 3, None, places, shift)])
            compared(at_once, found)
            same(whole, prefix)


@pytest.mark.parametrize("attention", BLOCK_ATTENTIONS)
@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("shift", [False, True])
def test_rows_of_any_length_share_a_forward(family, shift, attention):
    denoiser = block_student(family, attention=attention, shift=shift)
    # (tokens, block, blocks already read): nothing kept, something, everything; long and short
    shapes = [(11, 3, 0), (5, 1, 1), (8, 2, 1), (3, 0, 0), (11, 3, 3), (4, 1, 0)]
    rows = []
    for seed, (length, block, read) in enumerate(shapes):
        ids_L = text(length, seed)
        _, (prefix,) = read_blocks(denoiser, [row_of(ids_L, read, 3, shift=shift)])
        assert prefix.length == 3 * read
        rows.append(row_of(ids_L, block, 3, prefix, shift=shift))
    alone = [logits(denoiser, [row]) for row in rows]
    for row, (found, _) in zip(rows, alone, strict=True):
        compared(found, two_streams(denoiser, row))
    for order in (range(6), [4, 2, 0, 5, 1, 3], [3, 5], [1, 1]):
        found, prefixes = logits(denoiser, [rows[i] for i in order])
        compared(found, torch.cat([alone[i][0] for i in order]))
        for i, prefix in zip(order, prefixes, strict=True):
            same(prefix, alone[i][1][0])


# --- who sees whom ---------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", BLOCK_ATTENTIONS)
@pytest.mark.parametrize("shift", [False, True])
def test_a_block_sees_what_is_before_and_nothing_after_it(shift, attention):
    denoiser = block_student(attention=attention, shift=shift)
    ids_L = text(11)
    before, (prefix,) = logits(denoiser, [row_of(ids_L, 2, 3, shift=shift)])
    later_L = ids_L.clone()
    later_L[9:] = 7
    after, _ = logits(denoiser, [row_of(later_L, 2, 3, shift=shift)])
    assert torch.equal(after, before)
    for place in (0, 4, 7):  # an early block, the one before, the block itself
        earlier_L = ids_L.clone()
        earlier_L[place] = (ids_L[place] + 1) % 12
        after, _ = logits(denoiser, [row_of(earlier_L, 2, 3, shift=shift)])
        assert not torch.allclose(after, before, atol=1e-3)
    # What is kept is not read again, whatever stands there.
    after, _ = logits(denoiser, [row_of(earlier_L, 2, 3, prefix, shift=shift)])
    other_L = earlier_L.clone()
    other_L[:6] = 0
    again, _ = logits(denoiser, [row_of(other_L, 2, 3, prefix, shift=shift)])
    assert torch.equal(after, again)


@pytest.mark.parametrize("attention", ["context_causal", "reordered"])
def test_clean_tokens_of_causal_contexts_do_not_see_on(attention):
    denoiser = block_student(attention=attention, shift=True)
    ids_L, other_L = text(9), text(9)
    other_L[5] = (ids_L[5] + 1) % 12
    (one,), (other,) = (read_blocks(denoiser, [row_of(ids, 2, 3)])[1] for ids in (ids_L, other_L))
    for own, theirs in zip(one.layers, other.layers, strict=True):
        for a, b in zip(own, theirs, strict=True):
            assert torch.allclose(a[:, :, :5], b[:, :, :5], atol=1e-6)
            assert not torch.allclose(a[:, :, 5], b[:, :, 5], atol=1e-3)


# --- what is kept ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
def test_nothing_is_changed_in_place(rows):
    denoiser = block_student(shift=True)
    ids_L = text(9)
    _, (prefix,) = read_blocks(denoiser, [row_of(ids_L, 1, 3)])
    before = [part.clone() for layer in prefix.layers for part in layer]
    batch = [row_of(ids_L, 2, 3, prefix)] * rows
    first, grown = logits(denoiser, batch)
    again, _ = logits(denoiser, batch)
    assert torch.equal(first, again)
    assert prefix.length == 3
    assert [one.length for one in grown] == [6] * rows
    after = [part for layer in prefix.layers for part in layer]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_rows_of_a_batch_share_a_buffer_and_are_not_copied_again():
    denoiser = block_student(shift=True)
    texts = [text(n, n) for n in (5, 11, 8)]
    blocks = [1, 3, 2]
    _, prefixes = read_blocks(
        denoiser, [row_of(ids, n, 3) for ids, n in zip(texts, blocks, strict=True)]
    )
    assert [prefix.length for prefix in prefixes] == [3, 9, 6]
    (buffer,) = {prefix.buffer for prefix in prefixes}
    assert [prefix.slot for prefix in prefixes] == [0, 1, 2]
    for order in ([0, 1, 2], [2, 0, 1]):  # in any order
        rows = [row_of(texts[i], blocks[i], 3, prefixes[i]) for i in order]
        _, again = read_blocks(denoiser, rows)
        assert [prefix.buffer for prefix in again] == [buffer] * 3
        assert [prefix.slot for prefix in again] == order
    # Without one of them the others move together, and it stays.
    _, fewer = read_blocks(denoiser, [row_of(texts[i], blocks[i], 3, prefixes[i]) for i in (1, 2)])
    assert [prefix.slot for prefix in fewer] == [0, 1]
    assert fewer[0].buffer is fewer[1].buffer is not buffer
    for one, before in zip(fewer, prefixes[1:], strict=True):
        same(one, before)


def test_a_row_without_new_tokens_keeps_the_prefix_it_has():
    denoiser = block_student(shift=True)
    ids_L = text(9)
    _, (prefix,) = read_blocks(denoiser, [row_of(ids_L, 2, 3)])
    _, (alone,) = read_blocks(denoiser, [row_of(ids_L, 2, 3, prefix)])
    assert (alone.buffer, alone.length) == (prefix.buffer, 6)
    assert alone.last_D is prefix.last_D
    _, (first, _) = read_blocks(denoiser, [row_of(ids_L, 2, 3, prefix), row_of(ids_L, 2, 3)])
    same(first, prefix)
    assert first.buffer is not prefix.buffer


def test_two_ways_to_go_on_from_one_prefix_do_not_meet():
    denoiser = block_student()
    one_L, other_L = text(9, 1), text(9, 2)
    other_L[:3] = one_L[:3]
    _, (prefix,) = read_blocks(denoiser, [row_of(one_L, 1, 3)])
    _, (one,) = read_blocks(denoiser, [row_of(one_L, 2, 3, prefix)])
    before = [part.clone() for layer in one.layers for part in layer]
    _, (other,) = read_blocks(denoiser, [row_of(other_L, 2, 3, prefix)])
    after = [part for layer in one.layers for part in layer]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    _, (expected,) = read_blocks(denoiser, [row_of(other_L, 2, 3)])
    same(other, expected)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("family", ["granite", "gemma2"])
def test_a_head_that_is_not_plain_runs_on_needed_outputs_alone(family, shift, monkeypatch):
    denoiser = block_student(family, shift=shift)
    head = denoiser.model.get_output_embeddings()
    seen = []
    inner = head.forward
    monkeypatch.setattr(head, "forward", lambda x: seen.append(x.shape) or inner(x))
    found, _ = read_blocks(denoiser, [row_of(text(40), 12, 3, None, (0, 1, 2), shift)])
    assert found.shape == (3, 16)
    # Shifted: two of the block, and the last clean one, from which its first position is read.
    assert [shape.numel() // shape[-1] for shape in seen] == [3]


def test_position_0_of_a_shifted_model_cannot_be_asked_for():
    row = Row(torch.tensor([MASK, 3, 4]), slice(0, 3), torch.tensor([0]))
    with pytest.raises(AssertionError, match="position 0 of a shifted model has no predecessor"):
        read_blocks(block_student(shift=True), [row])
    found, (prefix,) = logits(block_student(), [row])
    assert found.shape == (1, 16)
    assert (prefix.length, prefix.last_D) == (0, None)


def test_a_full_canvas_has_no_blocks():
    with pytest.raises(AssertionError, match="not a block diffusion model"):
        read_blocks(random_student(), [row_of(text(5), 1, 3)])


def test_padding_does_not_fall_on_the_last_token_of_a_buffer():
    """A text of exactly as many tokens as buffers are made in, beside one that reads more."""
    denoiser = block_student(block_size=4)
    long_L, other_L = text(64, 1), text(40, 2)
    _, (prefix,) = read_blocks(denoiser, [row_of(long_L, 15, 4)])
    rows = [row_of(long_L, 15, 4, prefix), row_of(other_L, 9, 4)]
    found, _ = logits(denoiser, rows)
    compared(found, torch.cat([two_streams(denoiser, row) for row in rows]))


def test_an_explicit_mask_lifts_a_window_at_every_step():
    denoiser = block_student("mistral", sliding_window=3)
    ids_L = text(11)
    _, (prefix,) = read_blocks(denoiser, [row_of(ids_L, 3, 3)])
    row = row_of(ids_L, 3, 3, prefix)  # nothing but the block is read
    found, _ = logits(denoiser, [row])
    compared(found, two_streams(denoiser, row))
