"""The row functions of a rank that holds a shard of the vocabulary, in Triton: the twin of `shard_rows_torch.py`.

The passes of `rows_triton.py`, each a kernel of its own, because what the ranks know together stands between them.
One program a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from disc_kernels.linear_kl.inputs import Problem, Side, SuffixKLStats
from disc_kernels.linear_kl.rows.triton_backend import (
    BLOCK_ENTRIES,
    BLOCK_TEMPORARIES,
    MAX_BLOCK_V,
    NUM_WARPS,
    ROW_NUMBERS,
    log_probabilities,
    row_sums,
    store_in_place,
)
from disc_kernels.linear_kl.rows.triton_math import KINDS, divergence_terms, zero_where

__all__ = ["BLOCK_ENTRIES", "BLOCK_TEMPORARIES", "centred_gradient", "compare_shard", "normalise_shard"]


class Logits(NamedTuple):
    """One model's, as the kernels take them."""

    rows_ptr: Tensor  # [R, V] head outputs without bias
    stride: int
    bias_ptr: Tensor | None  # [V]
    stride_b: int
    scale: float
    softcap: float | None


@triton.jit
def _row_of(logits, row):
    return logits.rows_ptr + row * logits.stride, logits.bias_ptr, logits.stride_b, logits.scale, logits.softcap


@triton.jit
def _pair(student, teacher, teacher_slot_ptr, row):
    teacher_row = row
    if teacher_slot_ptr is not None:
        teacher_row = tl.load(teacher_slot_ptr + row)
    return _row_of(student, row), _row_of(teacher, teacher_row)


@triton.jit
def _whole(whole_ptr, row, R):
    """What `log_probabilities` takes, from `whole` [4, R]."""
    max_s = tl.load(whole_ptr + row)
    logsum_s = tl.load(whole_ptr + R + row)
    max_t = tl.load(whole_ptr + 2 * R + row)
    logsum_t = tl.load(whole_ptr + 3 * R + row)
    return max_s, logsum_s, max_t, logsum_t, 0.0, False


@triton.jit(do_not_specialize_on_alignment=ROW_NUMBERS)
def _normalise_shard_kernel(
    student,  # Logits, as in the other two kernels
    teacher,
    teacher_slot_ptr,  # [R] int64, the teacher row a row is compared with, or None: in order
    part_ptr,  # [4, R]
    R,
    V,
    inverse_temperature,
    STATISTICS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_s, z_t = _pair(student, teacher, teacher_slot_ptr, row)
    max_s, sum_s, max_t, sum_t, _, agree = row_sums(z_s, z_t, V, inverse_temperature, STATISTICS, False, BLOCK_V)
    if STATISTICS:
        sum_s = tl.where(agree, sum_s, -sum_s)
    tl.store(part_ptr + row, max_s)
    tl.store(part_ptr + R + row, sum_s)
    tl.store(part_ptr + 2 * R + row, max_t)
    tl.store(part_ptr + 3 * R + row, sum_t)


@triton.jit(do_not_specialize_on_alignment=ROW_NUMBERS)
def _compare_shard_kernel(
    student,
    teacher,
    teacher_slot_ptr,
    whole_ptr,  # [4, R]
    gradient_ptr,  # [R, V] or None; forward KL only; may be the memory of the student's logits
    row_scale_ptr,  # [R] or None
    mean_slope_ptr,  # [R] or None
    divergence_ptr,  # [R]
    student_entropy_ptr,  # [R]
    teacher_entropy_ptr,  # [R]
    stride_gr,
    R,
    V,
    inverse_temperature,
    beta,
    KIND: tl.constexpr,
    STATISTICS: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_s, z_t = _pair(student, teacher, teacher_slot_ptr, row)
    whole = _whole(whole_ptr, row, R)
    row_scale = 1.0
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + row)
    divergence = 0.0
    mean_slope = 0.0
    entropy_s = 0.0
    entropy_t = 0.0
    for start in range(0, V, BLOCK_V):
        offsets = start + tl.arange(0, BLOCK_V)
        mask = offsets < V
        lq, lp, gap, slope = log_probabilities(z_s, z_t, whole, offsets, mask, inverse_temperature, False)
        q = tl.exp(lq)
        terms, h = divergence_terms(lq, lp, gap, beta, KIND)
        divergence += tl.sum(tl.where(mask, terms, 0.0), axis=0)
        if mean_slope_ptr is not None:
            mean_slope += tl.sum(zero_where(q, q * h), axis=0)
        if STATISTICS:
            entropy_s -= tl.sum(zero_where(q, q * lq), axis=0)
            p = tl.exp(lp)
            entropy_t -= tl.sum(zero_where(p, p * lp), axis=0)
        if gradient_ptr is not None:
            store_in_place(gradient_ptr + row * stride_gr, offsets, mask, h * slope * row_scale, NARROW)
    tl.store(divergence_ptr + row, tl.where(divergence < 0, 0.0, divergence))
    if mean_slope_ptr is not None:
        tl.store(mean_slope_ptr + row, mean_slope)
    if STATISTICS:
        tl.store(student_entropy_ptr + row, entropy_s)
        tl.store(teacher_entropy_ptr + row, entropy_t)


@triton.jit(do_not_specialize_on_alignment=ROW_NUMBERS)
def _shard_gradient_kernel(
    student,
    teacher,
    teacher_slot_ptr,
    whole_ptr,  # [4, R]
    mean_slope_ptr,  # [R], of the whole vocabulary
    gradient_ptr,  # [R, V]; may be the memory of the student's logits
    row_scale_ptr,  # [R] or None
    stride_gr,
    R,
    V,
    inverse_temperature,
    beta,
    KIND: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_s, z_t = _pair(student, teacher, teacher_slot_ptr, row)
    whole = _whole(whole_ptr, row, R)
    mean_slope = tl.load(mean_slope_ptr + row)
    row_scale = 1.0
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + row)
    for start in range(0, V, BLOCK_V):
        offsets = start + tl.arange(0, BLOCK_V)
        mask = offsets < V
        lq, lp, gap, slope = log_probabilities(z_s, z_t, whole, offsets, mask, inverse_temperature, False)
        q = tl.exp(lq)
        _, h = divergence_terms(lq, lp, gap, beta, KIND)
        g = zero_where(q, q * (h - mean_slope)) * slope * row_scale
        store_in_place(gradient_ptr + row * stride_gr, offsets, mask, g, NARROW)


def normalise_shard(
    student: Tensor,  # [R, V] float32, see shard_rows_torch.py
    teacher: Tensor,  # [U, V]
    teacher_slot: Tensor | None,  # [R] int64
    problem: Problem,
    block_rows: int,  # of no use here: a program is a row
    part: Tensor,  # [4, R] to fill
    *,
    statistics: bool,
) -> None:
    rows, vocab_size = student.shape
    _normalise_shard_kernel[(rows,)](
        _logits(student, problem.student),
        _logits(teacher, problem.teacher),
        teacher_slot,
        part,
        rows,
        vocab_size,
        1.0 / problem.temperature,
        STATISTICS=statistics,
        BLOCK_V=_block(vocab_size),
        num_warps=NUM_WARPS,
    )


def compare_shard(
    student: Tensor,  # [R, V]; the gradient overwrites it where asked
    teacher: Tensor,  # [U, V]
    teacher_slot: Tensor | None,  # [R] int64
    problem: Problem,
    block_rows: int,
    whole: Tensor,  # [4, R]
    out: SuffixKLStats,  # four [R] tensors
    *,
    row_scale: Tensor | None,  # [R]
    gradient: Tensor | None,  # [R, V] to fill, for forward KL
    mean_slope: Tensor | None,  # [R] to fill, for the others
    statistics: bool,
) -> None:
    rows, vocab_size = student.shape
    _compare_shard_kernel[(rows,)](
        _logits(student, problem.student),
        _logits(teacher, problem.teacher),
        teacher_slot,
        whole,
        gradient,
        row_scale,
        mean_slope,
        out.divergence,
        out.student_entropy,
        out.teacher_entropy,
        0 if gradient is None else gradient.stride(0),
        rows,
        vocab_size,
        1.0 / problem.temperature,
        problem.beta,
        KIND=KINDS[problem.divergence],
        STATISTICS=statistics,
        NARROW=gradient is not None and gradient.dtype != torch.float32,
        BLOCK_V=_block(vocab_size),
        num_warps=NUM_WARPS,
    )


def centred_gradient(
    student: Tensor,  # [R, V]; the gradient overwrites it
    teacher: Tensor,  # [U, V]
    teacher_slot: Tensor | None,  # [R] int64
    problem: Problem,
    block_rows: int,
    whole: Tensor,  # [4, R]
    mean_slope: Tensor,  # [R]
    *,
    row_scale: Tensor | None,  # [R]
    gradient: Tensor,  # [R, V] to fill
) -> None:
    rows, vocab_size = student.shape
    _shard_gradient_kernel[(rows,)](
        _logits(student, problem.student),
        _logits(teacher, problem.teacher),
        teacher_slot,
        whole,
        mean_slope,
        gradient,
        row_scale,
        gradient.stride(0),
        rows,
        vocab_size,
        1.0 / problem.temperature,
        problem.beta,
        KIND=KINDS[problem.divergence],
        NARROW=gradient.dtype != torch.float32,
        BLOCK_V=_block(vocab_size),
        num_warps=NUM_WARPS,
    )


def _logits(rows: Tensor, side: Side) -> Logits:
    bias, transform = side.bias, side.transform
    stride_b = 0 if bias is None else bias.stride(0)
    return Logits(rows, rows.stride(0), bias, stride_b, transform.scale, transform.softcap)


def _block(vocab_size: int) -> int:
    return min(MAX_BLOCK_V, triton.next_power_of_2(vocab_size))
