"""Matrix products that keep float32 results from 16-bit operands, without a full-size copy of either operand.

On CUDA, 16-bit operands go to the tensor cores as they are and only the result is float32. CPUs have no such product,
so there 16-bit operands are widened first (exact), one tile of vocabulary rows at a time; the same tiles serve weights
that autocast rounds and weights whose strides no BLAS takes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from disc_kernels.linear_kl.problem import Side


def to_product_dtype(x: Tensor, side: Side) -> Tensor:
    return x.to(side.operand_dtype).to(side.product_dtype)


def needs_tiles(side: Side) -> bool:
    """Whether the weight must be copied, tile by tile, before it can be multiplied."""
    blas_layout = 1 in side.weight.stride() and 0 not in side.weight.stride()
    return not (side.weight.dtype == side.operand_dtype == side.product_dtype and blas_layout)


def weight_tiles(side: Side, tile_rows: int) -> Iterator[tuple[int, int, Tensor]]:
    """(first, last, weight[first:last]) over the vocabulary, ready to multiply; one tile where no copy is needed."""
    if not needs_tiles(side):
        yield 0, side.vocab_size, side.weight[: side.vocab_size]
        return
    for first in range(0, side.vocab_size, tile_rows):
        last = min(first + tile_rows, side.vocab_size)
        yield first, last, to_product_dtype(side.weight[first:last], side).contiguous()


def multiply_into(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """`out = a @ b`, or `out += a @ b`; `out` may be wider than the operands (CUDA)."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
