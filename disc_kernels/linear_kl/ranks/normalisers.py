"""Normalisers and averages of the whole vocabulary, from those of the parts that ranks hold."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_normalisers(maximum: Tensor, total: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(the parts' common maximum, their sum above it, float64, the logarithm of each part's share, float64)

    `maximum` and `total` are a model's, of each part along `dim`: the shards of ranks.
    """
    top = maximum.amax(dim, keepdim=True)
    base = top.masked_fill(top == -torch.inf, 0.0)  # -inf - -inf would be NaN
    log_part = (maximum.double() - base) + total.double().log()
    whole = log_part.exp().sum(dim, keepdim=True)
    log_share = (log_part - whole.log()).masked_fill_(total == 0, -torch.inf)
    return top.squeeze(dim), whole.squeeze(dim), log_share


def expectation(log_share: Tensor, value: Tensor, dim: int) -> Tensor:
    """Sum of share times value, where a share of 0 counts nothing."""
    share = log_share.exp()
    return (share * value).masked_fill_(share == 0, 0.0).sum(dim)
