"""Matrix products that keep float32 results from 16-bit operands, without a full-size copy of either operand.

On CUDA, 16-bit operands go to the tensor cores as they are and only the result is float32. CPUs have no such product,
so there 16-bit operands are widened first (exact), one tile of vocabulary rows at a time; the same tiles serve weights
that autocast rounds and weights whose strides no BLAS takes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from disc_kernels.linear_kl.inputs import Side


def to_product_dtype(x: Tensor, side: Side) -> Tensor:
    return x.to(side.operand_dtype).to(side.product_dtype)


def needs_tiles(side: Side) -> bool:
    """Whether the weight must be copied, tile by tile, before it can be multiplied."""
    blas_layout = 1 in side.weight.stride() and 0 not in side.weight.stride()
    return not (side.weight.dtype == side.operand_dtype == side.product_dtype and blas_layout)


def weight_tiles(side: Side, tile_rows: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows, weight[rows]) over the vocabulary, ready to multiply.

    One tile where no copy is needed.
    """
    if side.vocab_size > 0 and not needs_tiles(side):
        yield slice(side.vocab_size), side.weight[: side.vocab_size]
    else:
        for first in range(0, side.vocab_size, tile_rows):
            tile = slice(first, min(first + tile_rows, side.vocab_size))
            yield tile, to_product_dtype(side.weight[tile], side).contiguous()


def multiply_into(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """`out = a @ b`, or `out += a @ b`; `out` may be wider than the operands (CUDA)."""
    if out.numel() == 0:  # a rank's shard of the vocabulary may have no entry that is compared
        return
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def take_rows(side: Side, start: int, stop: int) -> Tensor:
    """Rows start..stop of what the side compares; never a copy of more than those."""
    shape = side.hidden.shape
    try:
        flat = side.hidden.view(-1, shape[-1])
    except RuntimeError:  # strides that no view can flatten, such as hidden[:, :-1]
        flat = None
    if side.index is None and flat is not None:
        return flat[start:stop]
    if side.index is None:
        rows = torch.arange(start, stop, device=side.hidden.device)
    else:
        rows = side.index[start:stop]
    if flat is not None:
        return flat.index_select(0, rows)
    coordinates = []
    for size in reversed(shape[:-1]):
        coordinates.append(rows % size)
        rows = rows // size
    return side.hidden[tuple(reversed(coordinates))]


def project(side: Side, hidden: Tensor, tile_rows: int, logits: Tensor) -> None:
    """Head outputs of hidden rows [R, D], without bias, into `logits` [R, V]."""
    for tile, weight in weight_tiles(side, tile_rows):
        multiply_into(logits[:, tile], hidden, weight.T)
