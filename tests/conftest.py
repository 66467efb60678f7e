"""Set what every test shares: Triton's interpreter where there is no GPU, two threads, a fixed seed."""

import importlib.util
import os
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from tests import interpreter

if not torch.cuda.is_available():
    # Read once, when Triton is first imported, so it has to be set before any test imports a kernel.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED and importlib.util.find_spec("triton"):
    interpreter.patch_language_once_a_launch()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _environment():
    """Take back what a test adds to the environment: accelerate, told of one rank, sets RANK for all tests after it."""
    with patch.dict(os.environ):
        yield


@pytest.fixture
def lonely_group(tmp_path):
    """Make a process group of this process alone, for which code goes the way of many."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def pytest_collection_modifyitems(config, items):
    if INTERPRETED:
        deselected = set(interpreter.left_out(items))
        config.hook.pytest_deselected(items=list(deselected))
        items[:] = [item for item in items if item not in deselected]
    if torch.cuda.is_available() or config.getoption("rehearsal"):
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
