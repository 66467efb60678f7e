"""Run every trunk and every branch as a sequence of its own: what a packed sequence has to equal."""

from collections.abc import Callable

import torch
from torch import Tensor

from disc_kernels.shared_prefix.layout import SharedPrefixLayout


def run_separately(model: Callable[[Tensor], Tensor], inputs: Tensor, layout: SharedPrefixLayout) -> Tensor:
    """Run each trunk alone, and each branch behind the first part of the trunk that it sees; differentiable.

    Args:
        model: a causal model of one sequence: [n, ...] -> [n, ...], a row a token (add the batch dimension inside).
        inputs: [L, ...], packed as in the layout; token ids, say.
        layout: L packed tokens.

    Returns:
        [L, ...]: the outputs in packed order. A trunk token's output comes from the trunk's own run.
    """
    packed = []
    for start, length, tree, attach in layout.segments.tolist():
        seen = inputs[tree : tree + attach]
        own = inputs[start : start + length]
        packed.append(model(torch.cat([seen, own]))[len(seen) :])
    return torch.cat(packed)
