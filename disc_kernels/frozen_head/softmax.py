"""Project rows and normalise their logits in place, over a whole vocabulary or a shard, for both frozen-head calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from disc_kernels.linear_kl.inputs import Projection
from disc_kernels.linear_kl.products import project, take_rows, to_product_dtype
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
    filled = torch.zeros(5, len(logits), dtype=logits.dtype, device=logits.device)
    if model.vocab_size > 0:
        rows = logits, model, temperature, plan.block_rows
        plan.backend.normalise_rows(*rows, filled, weights, remainder, entropy=entropy, other_bias=other_bias)
    else:
        filled[:2] = -torch.inf
    numbers, total, maximum = filled[:4], filled[4], filled[0]
    if plan.group is None:
        maximum.masked_fill_(maximum == -torch.inf, torch.nan)
        return lambda: (numbers, total)
    merge = plan.group.start_merging(numbers)

    def merged() -> tuple[Tensor, Tensor]:
        whole, share = merge()
        return whole, torch.where(share == 0, torch.inf, total / share)

    return merged


def projected_chunks(
    model: Projection, plan: Plan, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield (rows, hidden states [R, D], logits without bias [R, V], the memory of these as [R, V] of `dtype`).

    The memory is the same in every chunk; hidden states are of the dtype that products take.
    """
    size = min(plan.chunk_rows, model.rows)
    buffer = torch.empty(size, plan.row_stride, dtype=model.accumulate_dtype, device=model.weight.device)
    for start in range(0, model.rows, plan.chunk_rows):
        stop = min(start + plan.chunk_rows, model.rows)
        part = slice(stop - start), slice(model.vocab_size)
        hidden = to_product_dtype(take_rows(model, start, stop), model)
        project(model, hidden, plan.tile_rows, buffer[part])
        yield slice(start, stop), hidden, buffer[part], buffer.view(dtype)[part]
