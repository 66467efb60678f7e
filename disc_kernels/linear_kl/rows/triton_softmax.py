"""Load logits, and normalise the rows of one chunk of them, in Triton; `torch_backend.py` has the formulas."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from disc_kernels.linear_kl.inputs import Projection
from disc_kernels.linear_kl.rows.triton_math import LOWEST, exp, merge_lanes, online_exp, tanh, zero_where

# One program holds one tile of both rows in registers. On an H200, 2048 rows of 152064 entries took 1.49 ms so, 1.42 ms
# over 4 warps, which makes variants with statistics and biases spill, and 1.43 to 2.4 ms with other tiles from 1024 to
# 8192 entries (docs/performance.md).
MAX_BLOCK_V = 2048
NUM_WARPS = 8

# Left to itself, ptxas spills a few registers to keep a kernel at 32, 48, 64 or 128. With a bound that most stay below,
# none is spilled.
MAX_REGISTERS = 128

# As in triton_backend.py: no reason to compile anew.
ROW_POINTERS = ("maximum_ptr", "log_sum_ptr", "entropy_ptr", "total_ptr", "expected_bias_ptr")

LARGEST_WEIGHT: tl.constexpr = tl.constexpr(2.0**15)  # see torch_backend.py


@triton.jit
def load_logits(model, offsets, mask, inverse_temperature):
    """Load logits / T, -inf outside the vocabulary; return them and the gradient of the softcap, 1 without one."""
    row_ptr, bias_ptr, stride_b, scale, softcap = model
    z = tl.load(row_ptr + offsets, mask=mask, other=0.0)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offsets.to(tl.int64) * stride_b, mask=mask, other=0.0).to(z.dtype)
    softcap_gradient = tl.full(z.shape, 1.0, z.dtype)
    if softcap is None:
        u = z * (scale * inverse_temperature)
    else:
        t = tanh(z * (scale / softcap))
        softcap_gradient = 1.0 - t * t
        u = t * (softcap * inverse_temperature)
    return tl.where(mask, u, float("-inf")), softcap_gradient


@triton.jit(do_not_specialize_on_alignment=ROW_POINTERS)
def _normalise_rows_kernel(
    logits_ptr,  # [R, V] head outputs without bias
    weights_ptr,  # [R, V] or None; may be the memory of `logits_ptr` in a narrower dtype: NARROW
    remainder_ptr,  # [R, V] or None
    bias_ptr,  # [V] or None
    other_bias_ptr,  # [V] or None
    maximum_ptr,  # [R]
    log_sum_ptr,  # [R]
    entropy_ptr,  # [R] or None
    total_ptr,  # [R]; written with weights only
    expected_bias_ptr,  # [R], or None without `other_bias_ptr`
    stride_zr,
    stride_wr,
    stride_rr,
    stride_b,
    stride_ob,
    V,
    inverse_temperature,
    scale,
    softcap,  # or None
    NARROW: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    model = (logits_ptr + row * stride_zr, bias_ptr, stride_b, scale, softcap)
    maxima = tl.full((BLOCK_V,), LOWEST, tl.float32)  # of each lane, as in triton_backend.py
    sums = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        offsets = start + tl.arange(0, BLOCK_V)
        u, _ = load_logits(model, offsets, offsets < V, inverse_temperature)
        maxima, before, entry = online_exp(u, maxima)
        sums = sums * before + entry
    maximum, factor = merge_lanes(maxima)
    normaliser = tl.sum(sums * factor, axis=0)
    log_sum = tl.log(normaliser)
    base = tl.where(maximum == float("-inf"), 0.0, maximum)  # -inf - -inf would be NaN
    tl.store(maximum_ptr + row, maximum)
    tl.store(log_sum_ptr + row, log_sum)

    if weights_ptr is not None or entropy_ptr is not None or expected_bias_ptr is not None:
        spread = tl.zeros((BLOCK_V,), tl.float32)
        total = tl.zeros((BLOCK_V,), tl.float32)
        expected_bias = tl.zeros((BLOCK_V,), tl.float32)
        for start in range(0, V, BLOCK_V):
            offsets = start + tl.arange(0, BLOCK_V)
            mask = offsets < V
            u, _ = load_logits(model, offsets, mask, inverse_temperature)
            e = exp(u - base)
            if entropy_ptr is not None:
                spread += zero_where(e, e * (u - base))
            if expected_bias_ptr is not None:
                bias = tl.load(other_bias_ptr + offsets.to(tl.int64) * stride_ob, mask=mask, other=0.0).to(e.dtype)
                expected_bias += zero_where(e, e * bias)
            if weights_ptr is not None:
                weight = (e * LARGEST_WEIGHT).to(weights_ptr.dtype.element_ty)
                stored = weight.to(e.dtype)
                if remainder_ptr is not None:
                    rest = (e * LARGEST_WEIGHT - stored).to(remainder_ptr.dtype.element_ty)
                    tl.store(remainder_ptr + row * stride_rr + offsets, rest, mask=mask)
                    stored += rest.to(e.dtype)
                total += tl.where(mask, stored, 0.0)
                if NARROW:
                    # 16-bit numbers land on float32 logits of this and earlier tiles: all threads must have read them.
                    tl.debug_barrier()
                tl.store(weights_ptr + row * stride_wr + offsets, weight, mask=mask)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + row, log_sum - tl.sum(spread, axis=0) / normaliser)
        if expected_bias_ptr is not None:
            tl.store(expected_bias_ptr + row, tl.sum(expected_bias, axis=0) / normaliser)
        if weights_ptr is not None:
            tl.store(total_ptr + row, tl.sum(total, axis=0))


def normalise_rows(
    logits: Tensor,  # [R, V] float32 head outputs without bias; overwritten where `weights` is asked
    projection: Projection,
    temperature: float,
    block_rows: int,  # of no use here: a program is a row
    numbers: Tensor,  # [5, R] to fill, as all that follow see torch_backend.py
    weights: Tensor | None = None,  # [R, V]; may share memory with `logits` row by row
    remainder: Tensor | None = None,  # [R, V]
    *,
    entropy: bool = True,
    other_bias: Tensor | None = None,  # [>= V], read
) -> None:
    """Do what the function of this name in torch_backend.py does, a program a row."""
    rows, vocab_size = logits.shape
    maximum, log_sum, entropies, expected_bias, total = numbers
    _normalise_rows_kernel[(rows,)](
        logits,
        weights,
        remainder,
        projection.bias,
        other_bias,
        maximum,
        log_sum,
        entropies if entropy else None,
        total,
        None if other_bias is None else expected_bias,
        logits.stride(0),
        0 if weights is None else weights.stride(0),
        0 if remainder is None else remainder.stride(0),
        bias_stride(projection.bias),
        bias_stride(other_bias),
        vocab_size,
        1.0 / temperature,
        projection.transform.scale,
        projection.transform.softcap,
        NARROW=weights is not None and weights.dtype != torch.float32,
        BLOCK_V=min(MAX_BLOCK_V, triton.next_power_of_2(vocab_size)),
        num_warps=NUM_WARPS,
        maxnreg=MAX_REGISTERS,
    )


def bias_stride(bias: Tensor | None) -> int:
    """Return how far apart the entries of a bias are; 0 without one."""
    return 0 if bias is None else bias.stride(0)
