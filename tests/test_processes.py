"""One process: the functions do nothing. Two: `test_trainer.py` trains with them."""

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


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processes.device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert processes.device() == torch.device("cuda", 3)
