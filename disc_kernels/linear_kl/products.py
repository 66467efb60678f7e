"""Matrix products that keep float32 results from 16-bit operands, without a full-size copy of either operand.

On CUDA, 16-bit operands go to the tensor cores as they are and only the result is float32. CPUs have no such product,
so there 16-bit operands are widened first (exact), one tile of vocabulary rows at a time; the same tiles serve weights
that autocast rounds and weights whose strides no BLAS takes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from disc_kernels.linear_kl.problem import Problem, Side

SIXTEEN_BIT = (torch.float16, torch.bfloat16)


def product_dtype(side: Side, problem: Problem) -> torch.dtype:
    """The dtype handed to the matrix product, after rounding to `side.operand_dtype`."""
    if (
        problem.device.type == "cuda"
        and side.operand_dtype in SIXTEEN_BIT
        and problem.accumulate_dtype == torch.float32
    ):
        return side.operand_dtype
    return problem.accumulate_dtype


def to_product_dtype(x: Tensor, side: Side, problem: Problem) -> Tensor:
    return x.to(side.operand_dtype).to(product_dtype(side, problem))


def needs_tiles(side: Side, problem: Problem) -> bool:
    """Whether the weight must be copied, tile by tile, before it can be multiplied."""
    blas_layout = 1 in side.weight.stride() and 0 not in side.weight.stride()
    return side.weight.dtype != product_dtype(side, problem) or not blas_layout


def weight_tiles(side: Side, problem: Problem, tile_rows: int) -> Iterator[tuple[int, int, Tensor]]:
    """(first, last, weight[first:last]) over the vocabulary, ready to multiply; one tile where no copy is needed."""
    weight = side.weight[: problem.vocab_size]
    if not needs_tiles(side, problem):
        yield 0, problem.vocab_size, weight
        return
    for start in range(0, problem.vocab_size, tile_rows):
        stop = min(start + tile_rows, problem.vocab_size)
        yield start, stop, to_product_dtype(weight[start:stop], side, problem).contiguous()


def multiply_into(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """`out = a @ b`, or `out += a @ b`; `out` may be wider than the operands (CUDA)."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
