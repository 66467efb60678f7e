"""Say what each row counts in the loss."""

from __future__ import annotations

import torch
from torch import Tensor


def row_factors(
    row_weight: Tensor | None, rows: int, reduction: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return what a row's divergence is multiplied with before all are added up: [M], or [1] where all count the same.

    For "mean" that is its part of the total weight, or 0 where every row is masked: a loss of zero, not NaN.
    """
    if row_weight is None or reduction == "none":
        return torch.full((1,), 1 / max(rows, 1) if reduction == "mean" else 1.0, dtype=dtype, device=device)
    weight = row_weight.to(dtype)
    if reduction == "sum":
        return weight
    total = weight.sum()
    return weight / torch.where(total == 0, torch.inf, total)


def weighted_sum(divergence: Tensor, factors: Tensor) -> Tensor:
    """Add up divergences [M] times factors [M] or [1]; what counts 0 is left out, infinite or not."""
    return torch.where(factors == 0, 0.0, divergence * factors).sum()
