import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture
def compiler() -> Iterator[None]:
    """Let torch.compile start from scratch.

    Otherwise it turns to symbolic shapes at a second length, which FlexAttention's CPU template (torch 2.13) cannot
    compile.
    """
    if not torch.cuda.is_available() and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def all_double(monkeypatch):
    """Compute all in float64: transformers' norms and softmax take float32, whose rounding would hide small errors."""
    to, softmax = Tensor.to, nn.functional.softmax

    def to_double(self, *args, **kwargs):
        widened = {torch.float32: torch.float64}
        return to(
            self,
            *(widened.get(a, a) if isinstance(a, torch.dtype) else a for a in args),
            **{name: widened.get(a, a) if isinstance(a, torch.dtype) else a for name, a in kwargs.items()},
        )

    monkeypatch.setattr(Tensor, "to", to_double)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setattr(nn.functional, "softmax", lambda logits, dim, dtype=None: softmax(logits, dim))
