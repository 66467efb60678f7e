"""Name the device of tests marked gpu: a GPU, or in a rehearsal (`pytest --rehearsal`) the CPU."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def needs_cuda(reason: str) -> pytest.MarkDecorator:
    """Mark what a rehearsal leaves out, with the reason."""
    return pytest.mark.skipif(DEVICE != "cuda", reason=f"needs CUDA: {reason}")
