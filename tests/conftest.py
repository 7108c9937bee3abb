"""Test session settings: no network, one thread, the same seed before every test.

Factories (tokenizer, tiny models) are plain functions in `tests/tiny.py`, slow references are in
`tests/oracles.py`; tests import both by name, because pytest puts this folder on `sys.path`.
"""

import os

# Read by transformers at import, so they are set before anything imports it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random

import pytest
import torch

torch.set_num_threads(1)  # tiny matrices: a second thread costs more than it gives


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test starts from the same random state, whichever tests ran before it."""
    random.seed(0)
    torch.manual_seed(0)
