"""Training checkpoints: exact to the bit, whole or not at all, refused if they do not fit."""

import contextlib
import errno
import json
import resource

import pytest
import torch
from torch import nn

from mdm.errors import CheckpointError, DataError
from mdm.train import state
from mdm.train.optimizer import WeightAverage, adamw
from mdm.train.state import load_state, save_state, saved_steps


class Parts:
    """A model, its optimizer and average, and steps that depend on their number alone."""

    def __init__(self, width=8, frozen=False):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.model[0].requires_grad_(not frozen)
        self.unused = None
        self.optimizer = adamw(self.model, weight_decay=0.1, betas=(0.9, 0.95))
        self.average = WeightAverage(self.model, 0.9)

    def step(self, number):
        generator = torch.Generator().manual_seed(number)
        for parameter in self.model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            if parameter.requires_grad and parameter is not self.unused:
                parameter.grad = gradient
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01
        self.optimizer.step()
        self.average.update(self.model, number)

    def save(self, folder, step, *, keep=9, data="corpus"):
        return save_state(
            folder, step, self.model, self.optimizer, self.average, data=data, keep=keep
        )

    def load(self, path, *, data="corpus"):
        return load_state(path, self.model, self.optimizer, self.average, data=data)

    def equals(self, other):
        mine, theirs = self.model.state_dict(), other.model.state_dict()
        means, others = self.average.values, other.average.values
        return all(torch.equal(mine[k], theirs[k]) for k in mine) and all(
            torch.equal(means[k], others[k]) for k in means
        )


@contextlib.contextmanager
def file_size_limit(limit):
    """No file may grow beyond `limit` bytes: what a full disk does, in the kernel's words."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("at", [0, 1, 3])
def test_continues_as_if_never_interrupted(tmp_path, at):
    whole, first, second = Parts(), Parts(), Parts()
    for number in range(5):
        whole.step(number)
    for number in range(at):
        first.step(number)
    path = first.save(tmp_path, at)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.fill_(7.0)  # nothing of it may survive
    assert second.load(path) == at
    assert second.equals(first)
    for number in range(at, 5):
        second.step(number)
    assert second.equals(whole)


def test_without_an_average(tmp_path):
    parts, other = Parts(), Parts()
    parts.step(0)
    options = {"data": "corpus"}
    path = save_state(tmp_path, 1, parts.model, parts.optimizer, None, keep=1, **options)
    assert load_state(path, other.model, other.optimizer, None, **options) == 1
    with pytest.raises(CheckpointError, match="ema"):
        other.load(path)


def test_keeps_the_newest_by_number(tmp_path):
    parts = Parts()
    for step in (5, 999_999, 1_000_000, 10):
        parts.save(tmp_path, step)
    (tmp_path / ".step-000011.1.draft").mkdir()  # what a kill leaves behind
    assert [path.name for path in saved_steps(tmp_path)] == [
        "step-000005", "step-000010", "step-999999", "step-1000000"
    ]  # fmt: skip
    parts.save(tmp_path, 1_000_001, keep=2)
    assert [path.name for path in saved_steps(tmp_path)] == ["step-1000000", "step-1000001"]
    assert saved_steps(tmp_path / "nothing") == []


def test_other_data_is_refused(tmp_path):
    parts = Parts()
    path = parts.save(tmp_path, 0)
    with pytest.raises(DataError, match="are not those it was interrupted with"):
        parts.load(path, data="another corpus")


def remove(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def empty(path):
    path.write_bytes(b"")


FILES = [f"shard-00001-model-0000{part}-of-00004.safetensors" for part in (1, 2, 3, 4)]


@pytest.mark.parametrize("damage", [remove, cut, empty])
@pytest.mark.parametrize("name", [*FILES, "state.json"])
def test_damage_is_named(tmp_path, name, damage):
    parts = Parts()
    parts.step(0)
    path = parts.save(tmp_path, 1)
    assert sorted(file.name for file in path.iterdir()) == [*FILES, "state.json"]
    damage(path / name)
    with pytest.raises(CheckpointError, match=r"step-000001 is damaged.*delete it"):
        parts.load(path)


def test_damage_of_the_same_size_is_named(tmp_path):
    parts = Parts()
    path = parts.save(tmp_path, 0)
    file = next(path.glob("*.safetensors"))
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(CheckpointError, match="step-000000 is damaged"):
        parts.load(path)


def test_a_file_too_many_is_damage(tmp_path):
    """It could hold other parts of the same weights."""
    path = Parts().save(tmp_path, 0)
    (path / "shard-00002.safetensors").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match=r"damaged \(shard-00002.*4 bytes instead of 0"):
        Parts().load(path)


def test_another_model_is_refused(tmp_path):
    path = Parts().save(tmp_path, 0)
    weights = r"4 weights differ, as model/0\.weight \(\[8, 8\] there, \[4, 4\] here\)"
    other = Parts(width=4)
    other.average = None
    with pytest.raises(CheckpointError, match=weights):
        other.load(path)
    more = Parts()
    more.model.append(nn.Linear(8, 1, bias=False))
    with pytest.raises(CheckpointError, match=r"model/2\.weight \(none there, \[1, 8\] here"):
        more.load(path)
    fewer = Parts()
    fewer.model[1].requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"2 weights .* model/1\.weight \(\[8\] there, none"):
        fewer.load(path)


def test_only_what_is_trained_is_stored(tmp_path):
    parts = Parts(frozen=True)
    parts.step(0)
    path = parts.save(tmp_path, 1)
    stored = json.loads((path / "state.json").read_text())["tensors"]
    kinds = ("model", "exp_avg", "exp_avg_sq", "ema")
    assert stored.keys() == {f"{kind}/1.{name}" for kind in kinds for name in ("weight", "bias")}
    other = Parts(frozen=True)
    with torch.no_grad():
        other.model[0].weight.fill_(7.0)
    assert other.load(path) == 1
    assert bool((other.model[0].weight == 7.0).all())
    assert torch.equal(other.model[1].bias, parts.model[1].bias)
    other.step(1)
    parts.step(1)
    assert torch.equal(other.model[1].bias, parts.model[1].bias)


def test_a_weight_without_gradient_has_no_moments(tmp_path):
    parts, other = Parts(), Parts()
    for each in (parts, other):
        each.unused = each.model[1].bias
    parts.step(0)
    other.load(parts.save(tmp_path, 1))
    assert other.model[1].bias not in other.optimizer.state
    parts.step(1)
    other.step(1)
    assert other.equals(parts)


def test_state_without_its_data(tmp_path):
    path = Parts().save(tmp_path, 0)
    (path / "state.json").write_text(json.dumps({"format": state.FORMAT, "step": 0}))
    with pytest.raises(CheckpointError, match="damaged"):
        Parts().load(path)
    (path / "state.json").write_text("[]")
    with pytest.raises(CheckpointError, match="damaged"):
        Parts().load(path)


def test_the_first_format_is_named(tmp_path):
    """One file of weights, one of moments; there was no number of the format."""
    path = Parts().save(tmp_path, 0)
    (path / "state.json").write_text(json.dumps({"step": 0, "data": "corpus"}))
    with pytest.raises(CheckpointError, match="has format 1; this version of mdm reads format 2"):
        Parts().load(path)


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path):
    parts = Parts(width=64)
    older = parts.save(tmp_path, 1)
    content = {file.name: file.read_bytes() for file in older.iterdir()}
    parts.step(1)
    # The first file has 17 KiB.
    for step in (1, 2):  # replacing the newest, and beside it
        with file_size_limit(12 * 1024), pytest.raises(CheckpointError, match="cannot write"):
            parts.save(tmp_path, step, keep=1)
        assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
        assert {file.name: file.read_bytes() for file in older.iterdir()} == content
    assert parts.save(tmp_path, 2, keep=1).is_dir()


def test_an_error_while_writing(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state.dcp, "save", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        Parts().save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_not_called_a_full_disk(tmp_path):
    parts = Parts()
    parts.average.values["0.weight"] = "no tensor"
    with pytest.raises(AttributeError):
        parts.save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []
