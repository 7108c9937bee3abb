"""Test session settings: no network, one thread, the same seed before every test.

Factories (tokenizer, tiny models) are plain functions in `tests/tiny.py`, slow references are in
`tests/oracles.py`; tests import both by name, because pytest puts this folder on `sys.path`.
"""

import os

# Read by transformers at import, so they are set before anything imports it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import contextlib
import random
import signal

import pytest
import torch

torch.set_num_threads(1)  # tiny matrices: a second thread costs more than it gives


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test starts from the same random state, whichever tests ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def interruptible():
    """Programs that tests start can be interrupted, though a shell's background ignores SIGINT."""
    with contextlib.suppress(ValueError):  # not in the main thread
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
