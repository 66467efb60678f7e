import pytest
import torch


@pytest.fixture(autouse=True)
def _nothing_compiled_before(monkeypatch, tmp_path):
    """Leave alone what is cached on disk too: another version of the operator may have had another backward."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()


@pytest.fixture(params=["mean", "sum", "none"])
def reduction(request):
    return request.param
