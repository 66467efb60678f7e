import pytest
import torch


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()


@pytest.fixture(params=["mean", "sum", "none"])
def reduction(request):
    return request.param
