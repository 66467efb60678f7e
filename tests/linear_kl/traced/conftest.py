import pytest
import torch


@pytest.fixture(autouse=True)
def _nothing_compiled_before(monkeypatch):
    """Leave alone what is cached on disk too: another version of the operator may have had another backward."""
    monkeypatch.setattr(torch.compiler.config, "force_disable_caches", True)
    torch.compiler.reset()


@pytest.fixture(params=["mean", "sum", "none"])
def reduction(request):
    return request.param
