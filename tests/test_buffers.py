"""Buffers: what is where, what is copied, what a forward may leave behind."""

from types import SimpleNamespace

import pytest
import torch
from students import random_student

from mdm.attention import Tokens
from mdm.buffers import EAGER, GRAIN, Batch, Buffer, Layer, Prefix, places, read, settle
from mdm.errors import CheckpointError

HEADS, WIDTH = 2, 4
READER = SimpleNamespace(runner=EAGER)  # all that settling needs


def filled(rows, length, capacity=GRAIN):
    """A buffer of two layers whose rows keep `length` tokens, every number another."""
    buffer = Buffer(rows, capacity)
    for index in range(2):
        part = torch.zeros(rows, HEADS, 1, WIDTH)
        for tensor in buffer.layer(index, part, part):
            tensor[:, :, :length] = torch.randn(rows, HEADS, length, WIDTH)
    buffer.filled = [length] * rows
    return buffer


def prefixes_of(buffer):
    return [Prefix(n, None, buffer, slot) for slot, n in enumerate(buffer.filled)]


def test_a_prefix_is_a_view_of_its_row():
    buffer = filled(3, 5)
    prefix = prefixes_of(buffer)[1]
    assert len(prefix.layers) == 2
    for (keys, values), (all_keys, all_values) in zip(
        prefix.layers, buffer.layers.values(), strict=True
    ):
        assert keys.shape == values.shape == (1, HEADS, 5, WIDTH)
        assert keys.data_ptr() == all_keys[1].data_ptr()
        assert values.data_ptr() == all_values[1].data_ptr()
    assert Prefix().layers == ()


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_rows_that_are_in_place_stay(order):
    buffer = filled(3, 5)
    prefixes = prefixes_of(buffer)
    assert settle(READER, [prefixes[i] for i in order], GRAIN, 0) == (buffer, order)


@pytest.mark.parametrize(
    "name",
    ["fewer", "with a gap", "one twice", "too short", "something new", "gone on", "two buffers"],
)
def test_others_are_moved_together(name):
    buffer = filled(3, 5)
    own = prefixes_of(buffer)
    chosen, capacity = {
        "fewer": ([own[1], own[0]], 9),  # the third does not stay for the others' sake
        "with a gap": ([own[0], own[2]], 9),
        "one twice": ([own[0], own[0]], 9),
        "too short": (own, GRAIN + 1),
        "something new": ([*own, Prefix()], 9),
        "gone on": (own, 9),
        "two buffers": ([own[0], prefixes_of(filled(2, 3))[1]], 9),
    }[name]
    if name == "gone on":
        buffer.filled[1] = 7
    before = [[part.clone() for layer in one.layers for part in layer] for one in chosen]
    found, slots = settle(READER, chosen, capacity, 0)
    assert found is not buffer
    assert slots == list(range(len(chosen)))
    assert found.capacity == (2 * GRAIN if name == "too short" else GRAIN)
    assert found.filled == [one.length for one in chosen]
    for slot, (one, parts) in enumerate(zip(chosen, before, strict=True)):
        moved = Prefix(one.length, None, found, slot)
        if one.length:
            after = [part for layer in moved.layers for part in layer]
            assert all(torch.equal(a, b) for a, b in zip(after, parts, strict=True))
        assert all(
            not part[slot, :, one.length :].any()
            for layer in found.layers.values()
            for part in layer
        )
    # Nothing happens to what was there.
    for one, parts in zip(chosen, before, strict=True):
        after = [part for layer in one.layers for part in layer]
        assert all(torch.equal(a, b) for a, b in zip(after, parts, strict=True))


def test_a_new_buffer_has_room_for_what_will_come():
    buffer, _ = settle(READER, [Prefix(), Prefix()], 9, 3 * GRAIN)
    assert (buffer.rows, buffer.capacity) == (2, 3 * GRAIN)
    assert settle(READER, [Prefix()], 2 * GRAIN, GRAIN)[0].capacity == 2 * GRAIN


@pytest.mark.parametrize(
    ("reads", "expected", "start"),
    [
        ([(3, 5), (3, 5)], [[3, 4], [3, 4]], 3),
        ([(3, 5), (5, 7)], [[3, 4], [5, 6]], None),
        ([(60, 63)], [[60, 61, 62]], 60),
        # Padding is written to the last place: behind a row's part there may be something it keeps.
        ([(3, 5), (3, 6)], [[3, 4, 63], [3, 4, 5]], None),
        ([(61, 62), (1, 4)], [[61, 63, 63], [1, 2, 3]], None),
    ],
)
def test_places_and_where_padding_goes(reads, expected, start):
    place_BQ, found = places([slice(*own) for own in reads], Buffer(len(reads), GRAIN))
    assert (place_BQ.tolist(), found) == (expected, start)


@pytest.mark.parametrize("start", [None, 2])
def test_a_layer_writes_in_place_and_shows_the_keys(start):
    buffer = filled(3, 5)
    before = [part.clone() for part in buffer.layers[1]]
    place_BQ = torch.tensor([[2, 3], [2, 3]] if start else [[2, 3], [9, 63]])
    tokens = Tokens(*(torch.zeros(2, 2, dtype=torch.long) for _ in range(4)))
    batch = Batch(place_BQ, tokens, tokens, None, True, place_BQ, start, 10, buffer)
    where = None if start else (torch.arange(2)[:, None], place_BQ)
    layer = Layer(batch, 1, where)
    new = torch.randn(2, HEADS, 2, WIDTH)
    keys, values = layer.update(new, 2 * new)
    assert keys.shape == values.shape == (2, HEADS, 10, WIDTH)
    assert keys.data_ptr() == buffer.layers[1][0].data_ptr()
    for part, old, factor in zip(buffer.layers[1], before, (1, 2), strict=True):
        for row, own in enumerate(place_BQ.tolist()):
            for column, place in enumerate(own):
                assert torch.equal(part[row, :, place], factor * new[row, :, column])
                old[row, :, place] = part[row, :, place]
        assert torch.equal(part, old)  # and nothing else
    assert (layer.get_seq_length(), layer.get_mask_sizes(2)) == (8, (10, 0))
    assert layer.get_max_length() == GRAIN


def test_numbers_of_another_type_are_stored_in_that_of_the_buffer():
    buffer = filled(1, 2)
    place_BQ = torch.tensor([[5, 9]])
    tokens = Tokens(*(torch.zeros(1, 2, dtype=torch.long) for _ in range(4)))
    batch = Batch(place_BQ, tokens, tokens, None, True, place_BQ, None, 10, buffer)
    keys, _ = Layer(batch, 0, (torch.zeros(1, 1, dtype=torch.long), place_BQ)).update(
        *[torch.ones(1, HEADS, 2, WIDTH).bfloat16()] * 2
    )
    assert keys.dtype == torch.float32
    assert (keys[0, :, [5, 9]] == 1).all()


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_outputs_come_in_the_order_asked_for_kept_ones_first(family):
    denoiser = random_student(family)
    x_BQ = torch.tensor([[12, 3, 4], [12, 5, 6]])
    position_BQ = torch.arange(3).expand(2, -1)
    tokens = Tokens(torch.zeros_like(x_BQ), position_BQ, torch.zeros_like(x_BQ), x_BQ == 15)
    batch = Batch(x_BQ, tokens, tokens, None, True, position_BQ, 0, 3, Buffer(2, GRAIN))
    with torch.no_grad():
        everything = read(denoiser, batch, torch.arange(6))
        wanted = torch.tensor([5, 0, 3, 3, 1])
        assert torch.allclose(read(denoiser, batch, wanted), everything[wanted], atol=1e-6)
        kept = torch.randn(2, everything.shape[1])
        table = torch.cat([kept, everything])
        wanted = torch.tensor([1, 7, 0, 2, 4])
        assert torch.allclose(read(denoiser, batch, wanted, kept), table[wanted], atol=1e-6)


def test_a_model_that_keeps_nothing_is_told(monkeypatch):
    denoiser = random_student()
    body = denoiser.model.base_model
    real = body.forward
    monkeypatch.setattr(
        body, "forward", lambda x, past_key_values=None, **options: real(x, use_cache=False)
    )
    x_BQ = torch.tensor([[12, 3]])
    tokens = Tokens(
        torch.zeros_like(x_BQ), torch.arange(2)[None], torch.zeros_like(x_BQ), x_BQ == 15
    )
    batch = Batch(x_BQ, tokens, tokens, None, True, x_BQ, 0, 2, Buffer(1, GRAIN))
    with pytest.raises(CheckpointError, match="cannot be read block by block: its code keeps no"):
        read(denoiser, batch, torch.arange(2))
