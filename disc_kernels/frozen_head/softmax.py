"""Normalise rows of logits in place, over one rank's vocabulary or a shard of many: what both frozen-head calls do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from disc_kernels.linear_kl.inputs import Projection
from disc_kernels.linear_kl.products import multiply_into, weight_tiles
from disc_kernels.linear_kl.ranks.group import VocabGroup
from disc_kernels.linear_kl.workspace import Plan

# Numbers a row of a chunk: maximum, log-sum, entropy, bias, total, and intermediates of the row function and of the
# divergence.
_CHUNK_NUMBERS = 14


def numbers_per_row(group: VocabGroup | None) -> int:
    """Return how many numbers `normalise` needs for a row: with ranks also what is gathered, and what merges it."""
    return _CHUNK_NUMBERS + (0 if group is None else 18 * group.ranks + 10)


def normalise(
    logits: Tensor,  # [R, V] head outputs, see rows/torch_backend.py for this and for weights and remainder
    model: Projection,
    temperature: float,
    plan: Plan,
    weights: Tensor | None,  # [R, V]
    remainder: Tensor | None = None,  # [R, V]
    *,
    entropy: bool = True,
    other_bias: Tensor | None = None,  # [>= V]
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Compute a softmax in place.

    Returns:
        What waits for the other ranks, so that there can be a product before, and gives: a row's maximum, log-sum,
        entropy and expected bias, `[4, R]`, the first NaN where no entry is possible; and `[R]`, what `weights`
        must be divided by to be probabilities of the whole vocabulary.
    """
    numbers = torch.zeros(4, len(logits), dtype=logits.dtype, device=logits.device)
    maximum, log_sum, entropies, bias = numbers
    total = torch.zeros_like(maximum)
    if model.vocab_size > 0:
        plan.backend.normalise_rows(
            logits,
            model,
            temperature,
            plan.block_rows,
            maximum=maximum,
            log_sum=log_sum,
            entropy=entropies if entropy else None,
            weights=weights,
            remainder=remainder,
            total=total,
            other_bias=other_bias,
            expected_bias=None if other_bias is None else bias,
        )
    else:
        numbers[:2] = -torch.inf
    if plan.group is None:
        maximum.masked_fill_(maximum == -torch.inf, torch.nan)
        return lambda: (numbers, total)
    merge = plan.group.start_merging(numbers)

    def merged() -> tuple[Tensor, Tensor]:
        whole, share = merge()
        return whole, torch.where(share == 0, torch.inf, total / share)

    return merged


def multiply_weights(head: Projection, weights: Tensor, remainder: Tensor | None, tile_rows: int, out: Tensor) -> None:
    """Write sum_v weights_v W[v] into `out` [R, D], from multiples [R, V] of probabilities."""
    if head.vocab_size == 0:
        out.zero_()
    parts = [weights] if remainder is None else [weights, remainder]
    accumulate = False
    for tile, weight in weight_tiles(head, tile_rows):
        for part in parts:
            multiply_into(out, part[:, tile], weight, accumulate=accumulate)
            accumulate = True
