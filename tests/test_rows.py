"""Rows on disk and the order in which a run reads them."""

import numpy as np
import pytest
import torch

from mdm.errors import DataError
from mdm.train.packing import Row
from mdm.train.rows import Rows, RowWriter, sample_indices

LENGTH = 6


def row(number):
    tokens = np.full(LENGTH, number, np.int32)
    maskable = tokens % 2 == np.arange(LENGTH) % 2
    return Row(tokens, tokens % 7 - 1, maskable, (tokens % 6).astype(np.uint8))


def written(folder, count):
    writer = RowWriter(folder, LENGTH)
    for number in range(count):
        writer.append(row(number))
    writer.close()
    return folder


@pytest.mark.parametrize("count", [0, 1, 512, 1300])  # also a whole block and several
def test_rows_come_back_as_written(tmp_path, count):
    rows = Rows(written(tmp_path / "rows", count))
    assert (len(rows), rows.length) == (count, LENGTH)
    wanted = list(range(count))[::-3]
    batch = rows.batch(wanted)
    for tensor, dtype, column in zip(
        batch, (torch.long, torch.long, torch.bool, torch.uint8), range(4), strict=True
    ):
        assert tensor.dtype == dtype
        assert tensor.shape == (len(wanted), LENGTH)
        expected = np.array([row(number)[column] for number in wanted]).reshape(-1, LENGTH)
        assert (tensor.numpy() == expected).all()


def test_arrays_are_mapped_small_and_without_pickle(tmp_path):
    folder = written(tmp_path / "rows", 3)
    arrays = {"tokens": "<i4", "document_ids": "<i4", "maskable": "|b1", "classes": "|u1"}
    for name, dtype in arrays.items():
        array = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        assert isinstance(array, np.memmap)
        assert array.dtype == np.dtype(dtype)
        assert array.shape == (3, LENGTH)
    np.save(folder / "tokens.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"tokens\.npy"):
        Rows(folder)


def test_a_batch_can_be_changed_without_changing_the_rows(tmp_path):
    rows = Rows(written(tmp_path / "rows", 3))
    rows.batch([1]).tokens_BL.fill_(9)
    rows.batch([1]).maskable_BL.fill_(True)
    assert (rows.batch([1]).tokens_BL == 1).all()
    assert rows.batch([1]).maskable_BL.sum() == LENGTH // 2


def test_a_cut_or_missing_array_is_refused(tmp_path):
    folder = written(tmp_path / "rows", 5)
    data = (folder / "maskable.npy").read_bytes()
    (folder / "maskable.npy").write_bytes(data[:-1])
    with pytest.raises(DataError, match=r"maskable\.npy"):
        Rows(folder)
    for name in ("maskable", "classes"):
        written(folder, 5)
        (folder / f"{name}.npy").unlink()
        with pytest.raises(DataError, match=rf"{name}\.npy.*prepare the data again"):
            Rows(folder)


def test_an_unclosed_writer_leaves_no_rows(tmp_path):
    writer = RowWriter(tmp_path / "rows", LENGTH)
    for number in range(600):
        writer.append(row(number))
    for array in writer._arrays:
        array._file.flush()
    assert len(Rows(tmp_path / "rows")) == 0
    writer.close()
    assert len(Rows(tmp_path / "rows")) == 600


# --- order ---------------------------------------------------------------------------------------


def test_every_epoch_has_every_row_once_in_another_order():
    order = sample_indices(10, seed=3, start=0, count=40).reshape(4, 10)
    assert (np.sort(order, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in order.tolist()}) == 4
    assert order.dtype == np.int64


def test_order_is_a_pure_function_of_the_sample():
    whole = sample_indices(7, seed=1, start=0, count=100)
    pieces = [sample_indices(7, seed=1, start=s, count=min(9, 100 - s)) for s in range(0, 100, 9)]
    assert np.concatenate(pieces[::-1][::-1]).tolist() == whole.tolist()
    assert sample_indices(7, seed=1, start=63, count=3).tolist() == whole[63:66].tolist()
    assert sample_indices(7, seed=2, start=0, count=100).tolist() != whole.tolist()
    assert sample_indices(7, seed=-1, start=0, count=1).shape == (1,)
    assert sample_indices(7, seed=1, start=5, count=0).shape == (0,)


def test_order_is_the_same_on_every_machine():
    assert sample_indices(8, seed=0, start=0, count=8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
