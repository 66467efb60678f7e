"""Where the tests marked gpu run: on a GPU, and in a rehearsal (`pytest --rehearsal`) on the CPU."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def needs_cuda(reason: str) -> pytest.MarkDecorator:
    """Mark what a rehearsal leaves out, with the reason."""
    return pytest.mark.skipif(DEVICE != "cuda", reason=f"needs CUDA: {reason}")
