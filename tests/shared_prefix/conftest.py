import shutil
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def compiler() -> Iterator[None]:
    """torch.compile from scratch: for a second length it would turn to symbolic shapes, which FlexAttention's CPU
    template (torch 2.13) cannot compile."""
    if not torch.cuda.is_available() and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    torch.compiler.reset()
    yield
    torch.compiler.reset()
