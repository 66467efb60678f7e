"""Compute the rows of a chunk of logits: which implementation runs a call, and its row functions."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch

from disc_kernels.linear_kl.validation import check_choice

IMPLEMENTATIONS = ("triton", "torch", "reference")


def choose_implementation(
    impl: str | None, device: torch.device, accumulate_dtype: torch.dtype, sharded: bool = False
) -> str:
    """Return `impl` if it can run there, which is never replaced by another; the device's default for None.

    Raises:
        ValueError: no such implementation, or not for these tensors.
    """
    on_cuda = device.type == "cuda"
    if impl is None:
        return "triton" if on_cuda and accumulate_dtype == torch.float32 else "torch"
    check_choice("impl", impl, IMPLEMENTATIONS)
    if impl == "reference" and sharded:
        raise ValueError('impl: expected "triton" or "torch" with a vocab_group, got "reference"')
    if impl == "triton":
        if not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f'impl: expected CUDA tensors (or TRITON_INTERPRET=1) for "triton", got {device.type} tensors'
            )
        if accumulate_dtype != torch.float32:
            raise ValueError('impl: expected float32 or 16-bit inputs for "triton", got float64; use "torch"')
    return impl


def load_backend(impl: str) -> ModuleType:
    """Return the row functions of "triton" or "torch"; Triton is imported when first asked for."""
    return importlib.import_module(f"disc_kernels.linear_kl.rows.{impl}_backend")
