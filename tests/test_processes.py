"""One process: the functions do nothing. Two: `test_trainer.py` and `test_sharding.py` train with them."""

import torch
import torch.distributed as dist

from mdm.train import processes


def test_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes.process_group():
        assert not dist.is_initialized()
        assert (processes.rank(), processes.world_size()) == (0, 1)
        tensor = torch.tensor([1.0, 2.0])
        assert processes.total(tensor) is tensor
        assert tensor.tolist() == [1.0, 2.0]
        processes.barrier()
        assert processes.from_first("own") == "own"


def test_torchrun_with_one_process_makes_a_group(monkeypatch):
    for name, value in {
        "TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "1", "RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with processes.process_group():
        assert dist.is_initialized()
        assert (processes.rank(), processes.world_size()) == (0, 1)
        assert processes.from_first("own") == "own"
    assert not dist.is_initialized()
    # Some clusters set it for every job, without the address that a group needs.
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with processes.process_group():
        assert not dist.is_initialized()


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processes.device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert processes.device() == torch.device("cuda", 3)
