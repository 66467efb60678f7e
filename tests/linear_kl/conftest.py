"""Run tests with every implementation and divergence, one after another."""

import os

import pytest

from tests.allocations import measure  # noqa: F401


def available(impl: str) -> str:
    if impl == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton takes CPU tensors under its interpreter only")
    return impl


@pytest.fixture(params=["reference", "torch", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    return available(request.param)


@pytest.fixture(params=["torch", "triton"])
def fused_impl(request: pytest.FixtureRequest) -> str:
    """Return an implementation that works in chunks."""
    return available(request.param)


@pytest.fixture(params=["reference", "torch"])
def double_impl(request: pytest.FixtureRequest) -> str:
    """Return an implementation that takes float64."""
    return request.param


@pytest.fixture(params=["forward_kl", "reverse_kl", "jsd"])
def divergence(request: pytest.FixtureRequest) -> str:
    return request.param
