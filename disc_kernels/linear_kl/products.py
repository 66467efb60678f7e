"""Multiply matrices with float32 results from 16-bit operands, without a full-size copy of either operand.

On CUDA, 16-bit operands go to the tensor cores as they are and only the result is float32. CPUs have no such product,
so there 16-bit operands are widened first (exact). Weights are widened once a call where the workspace has room for
that, else one tile of vocabulary rows at a time; the same serves weights that autocast rounds and weights whose strides
no BLAS takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from disc_kernels.linear_kl.inputs import Projection


def to_product_dtype(x: Tensor, model: Projection) -> Tensor:
    """Round to the operands' dtype, then widen to what the product takes."""
    return x.to(model.operand_dtype).to(model.product_dtype)


def _fits_blas(weight: Tensor) -> bool:
    return 1 in weight.stride() and 0 not in weight.stride()


def needs_copy(model: Projection) -> bool:
    """Return whether the weight must be copied, whole or tile by tile, before it can be multiplied."""
    ready = model.weight.dtype == model.operand_dtype == model.product_dtype and _fits_blas(model.weight)
    return not (ready or model.copied)


def copy_bytes(model: Projection) -> int:
    """Return how many bytes `with_copied_weight` needs at once."""
    rounded = (model.weight.dtype != model.operand_dtype) * model.operand_dtype.itemsize
    widened = (model.operand_dtype != model.product_dtype) * model.product_dtype.itemsize
    in_order = (not _fits_blas(model.weight)) * model.product_dtype.itemsize
    return model.vocab_size * model.hidden_size * (rounded + widened + in_order)


def with_copied_weight(model: Projection) -> Projection:
    """Return the same model with a weight that is ready to be multiplied."""
    if not needs_copy(model):
        return model
    weight = to_product_dtype(model.weight[: model.vocab_size], model)
    return replace(model, weight=weight if _fits_blas(weight) else weight.contiguous(), copied=True)


def weight_tiles(model: Projection, tile_rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, weight[rows]) over the vocabulary, ready to multiply: one tile where no copy is needed."""
    if model.vocab_size > 0 and not needs_copy(model):
        yield slice(model.vocab_size), model.weight[: model.vocab_size]
    else:
        for first in range(0, model.vocab_size, tile_rows):
            tile = slice(first, min(first + tile_rows, model.vocab_size))
            yield tile, to_product_dtype(model.weight[tile], model).contiguous()


def multiply_into(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """Compute `out = a @ b`, or `out += a @ b`; `out` may be wider than the operands (CUDA)."""
    if out.numel() == 0:  # a rank's shard of the vocabulary may have no entry that is compared
        return
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def take_rows(model: Projection, start: int, stop: int) -> Tensor:
    """Return rows start..stop of what is compared; never a copy of more than those."""
    shape = model.hidden.shape
    try:
        flat = model.hidden.view(-1, shape[-1])
    except RuntimeError:  # strides that no view can flatten, such as hidden[:, :-1]
        flat = None
    if model.index is None and flat is not None:
        return flat[start:stop]
    if model.index is None:
        rows = torch.arange(start, stop, device=model.hidden.device)
    else:
        rows = model.index[start:stop]
    if flat is not None:
        return flat.index_select(0, rows)
    coordinates = []
    for size in reversed(shape[:-1]):
        coordinates.append(rows % size)
        rows = rows // size
    return model.hidden[tuple(reversed(coordinates))]


def multiply_weights(model: Projection, weights: Sequence[Tensor], tile_rows: int, out: Tensor) -> None:
    """Write sum_v w_v W[v] into `out` [R, D], where w is the sum of `weights`, each [R, V]; zeros for an empty head."""
    if model.vocab_size == 0:
        out.zero_()
    accumulate = False
    for tile, weight in weight_tiles(model, tile_rows):
        for part in weights:
            multiply_into(out, part[:, tile], weight, accumulate=accumulate)
            accumulate = True


def project(model: Projection, hidden: Tensor, tile_rows: int, logits: Tensor) -> None:
    """Write the head's outputs for hidden rows [R, D], without bias, into `logits` [R, V]."""
    if model.is_given:
        logits.copy_(hidden)
        return
    for tile, weight in weight_tiles(model, tile_rows):
        multiply_into(logits[:, tile], hidden, weight.T)
