import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for the net

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
