"""Settings every test shares: Triton's interpreter where there is no GPU, two threads, a fixed seed."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read once, when Triton is first imported, so it has to be set before any test imports a kernel.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
