import pytest
import torch

from tests.allocations import measure  # noqa: F401
from tests.linear_kl.conftest import divergence, double_impl, fused_impl, impl  # noqa: F401
from tests.linear_kl.ranks.conftest import worlds  # noqa: F401


@pytest.fixture(autouse=True)
def new_memory_is_nan():
    """Fill new memory with NaN, so that an entry that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
