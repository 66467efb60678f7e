"""Compare the rows of one chunk of logits, in Triton: with `triton_softmax.py` the twin of `torch_backend.py`.

The formulas stand there. One program a row. Pass 1 over the vocabulary finds both normalisers online (Milakov and
Gimelshein 2018, arXiv 1805.02867); pass 2 sums the divergence and, for forward KL, writes the gradient; reverse KL and
JSD need their mean score first, so their gradient takes a third pass. A rank with a shard of the vocabulary launches
the same kernel for one pass at a time. Nothing but the block size depends on a shape.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from disc_kernels.linear_kl.inputs import Problem, SuffixKLStats
from disc_kernels.linear_kl.rows.triton_math import (
    DIVERGENCE_CODES,
    FORWARD_KL,
    LOWEST,
    divergence_terms,
    exp,
    expm1,
    first_maximum,
    log1p,
    merge_lanes,
    online_exp,
    zero_where,
)
from disc_kernels.linear_kl.rows.triton_softmax import (
    MAX_BLOCK_V,
    MAX_REGISTERS,
    NUM_WARPS,
    bias_stride,
    load_logits,
    normalise_rows,
)

__all__ = ["BLOCK_ENTRIES", "BLOCK_TEMPORARIES", "compare_rows", "multiplied", "normalise_rows"]

# Nothing but registers: the plan need not reserve memory.
BLOCK_ENTRIES = {"cpu": 0, "cuda": 0}
BLOCK_TEMPORARIES = 0

# Pointers to a few numbers a row: a chunk's rows of them start at an aligned address or not, by M, which is no reason
# to compile anew.
ROW_POINTERS = (
    *("inverse_index_ptr", "row_scale_ptr", "divergence_ptr", "student_entropy_ptr", "teacher_entropy_ptr"),
    *("agreement_ptr", "shard_normalisers_ptr", "normalisers_ptr", "mean_score_ptr"),
)


@triton.jit
def _load_pair(student, teacher, offsets, mask, inverse_temperature, ONE_HEAD: tl.constexpr):
    """Return student's logits / T, gradient of their softcap, teacher's logits / T, with one head the difference."""
    u_t, _ = load_logits(teacher, offsets, mask, inverse_temperature)
    if ONE_HEAD:
        row_ptr, _, _, scale, _ = student
        difference = tl.load(row_ptr + offsets, mask=mask, other=0.0) * scale * inverse_temperature
        return u_t + difference, 1.0, u_t, difference
    else:
        u_s, softcap_gradient = load_logits(student, offsets, mask, inverse_temperature)
        return u_s, softcap_gradient, u_t, 0.0


@triton.jit
def _row_sums(
    student, teacher, V, inverse_temperature, STATISTICS: tl.constexpr, ONE_HEAD: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Return student's maximum, its sum above that, teacher's two, excess of the sums, whether the maxima agree."""
    # Every lane of a tile keeps a maximum and sums of its own: reducing them once a row, not once a tile, saves a fifth
    # of the pass's instructions and all of its barriers.
    max_s = tl.full((BLOCK_V,), LOWEST, tl.float32)
    max_t = tl.full((BLOCK_V,), LOWEST, tl.float32)
    sum_s = tl.zeros((BLOCK_V,), tl.float32)
    sum_t = tl.zeros((BLOCK_V,), tl.float32)
    excess = tl.zeros((BLOCK_V,), tl.float32)  # of the student's sum over the teacher's
    best_s = tl.full((BLOCK_V,), -1, tl.int32)
    best_t = tl.full((BLOCK_V,), -1, tl.int32)
    for start in range(0, V, BLOCK_V):
        offsets = start + tl.arange(0, BLOCK_V)
        u_s, _, u_t, difference = _load_pair(student, teacher, offsets, offsets < V, inverse_temperature, ONE_HEAD)
        if STATISTICS:
            best_s = tl.where(u_s > max_s, offsets, best_s)
            best_t = tl.where(u_t > max_t, offsets, best_t)
        max_s, before, entry = online_exp(u_s, max_s)
        sum_s = sum_s * before + entry
        max_t, before, entry = online_exp(u_t, max_t)
        sum_t = sum_t * before + entry
        if ONE_HEAD:
            excess = excess * before + entry * expm1(difference)
    agree = first_maximum(max_s, best_s) == first_maximum(max_t, best_t)
    max_s, factor = merge_lanes(max_s)
    sum_s = tl.sum(sum_s * factor, axis=0)
    max_t, factor = merge_lanes(max_t)
    return max_s, sum_s, max_t, tl.sum(sum_t * factor, axis=0), tl.sum(excess * factor, axis=0), agree


@triton.jit
def _log_probabilities(student, teacher, normalisers, offsets, mask, inverse_temperature, ONE_HEAD: tl.constexpr):
    """Return lq, lp, lq - lp, and the gradient of the student's softcap.

    In the normalisers maximum and log-sum stay apart: added up, they would lose the log-sum's digits where logits lie
    far from zero.
    """
    max_s, log_sum_s, max_t, log_sum_t, log_sum_ratio = normalisers
    u_s, softcap_gradient, u_t, difference = _load_pair(student, teacher, offsets, mask, inverse_temperature, ONE_HEAD)
    lq = u_s - max_s - log_sum_s
    lp = u_t - max_t - log_sum_t
    log_ratio = tl.where(lq == lp, 0.0, lq - lp)  # both may be -inf
    if ONE_HEAD:
        log_ratio = tl.where(log_sum_ratio == log_sum_ratio, difference - log_sum_ratio, log_ratio)
    return lq, lp, log_ratio, softcap_gradient


@triton.jit(do_not_specialize_on_alignment=ROW_POINTERS)
def _compare_rows_kernel(
    student_ptr,  # [R, V] head outputs without bias, ONE_HEAD: less the teacher's
    teacher_ptr,  # [U, V]
    inverse_index_ptr,  # [R] int64, the teacher row a row is compared with, or None: U = R, in order
    gradient_ptr,  # [R, V] or None; may be the memory of `student_ptr` in the same dtype
    student_bias_ptr,  # [V] or None
    teacher_bias_ptr,  # [V] or None
    row_scale_ptr,  # [R] or None
    divergence_ptr,  # [R]; None: its sum, and those that follow, are not taken
    student_entropy_ptr,  # [R]
    teacher_entropy_ptr,  # [R]
    agreement_ptr,  # [R]; None with `normalisers_ptr`
    shard_normalisers_ptr,  # [R, 4] or None; to write, and nothing else then
    normalisers_ptr,  # [R, 4] of the whole vocabulary, or None: V is the whole
    mean_score_ptr,  # [R] or None: only this kernel needs it; read where there is no `divergence_ptr`, else written
    stride_sr,
    stride_tr,
    stride_gr,
    stride_sb,
    stride_tb,
    V,
    inverse_temperature,
    beta,
    student_scale,
    student_softcap,  # or None
    teacher_scale,
    teacher_softcap,  # or None
    DIVERGENCE: tl.constexpr,
    STATISTICS: tl.constexpr,
    ONE_HEAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    teacher_row = row
    if inverse_index_ptr is not None:
        teacher_row = tl.load(inverse_index_ptr + row)
    student = (student_ptr + row * stride_sr, student_bias_ptr, stride_sb, student_scale, student_softcap)
    teacher = (teacher_ptr + teacher_row * stride_tr, teacher_bias_ptr, stride_tb, teacher_scale, teacher_softcap)

    if normalisers_ptr is not None:
        max_s = tl.load(normalisers_ptr + 4 * row)
        log_sum_s = tl.load(normalisers_ptr + 4 * row + 1)
        max_t = tl.load(normalisers_ptr + 4 * row + 2)
        log_sum_t = tl.load(normalisers_ptr + 4 * row + 3)
        normalisers = (max_s, log_sum_s, max_t, log_sum_t, 0.0)
    else:
        max_s, sum_s, max_t, sum_t, excess, agree = _row_sums(
            student, teacher, V, inverse_temperature, STATISTICS, ONE_HEAD, BLOCK_V
        )
        if shard_normalisers_ptr is not None:
            tl.store(shard_normalisers_ptr + 4 * row, max_s)
            tl.store(shard_normalisers_ptr + 4 * row + 1, tl.where(agree, sum_s, -sum_s) if STATISTICS else sum_s)
            tl.store(shard_normalisers_ptr + 4 * row + 2, max_t)
            tl.store(shard_normalisers_ptr + 4 * row + 3, sum_t)
        log_sum_ratio = 0.0
        if ONE_HEAD:
            small = excess / sum_t
            # Far from 0 it may have overflowed, and log1p gains nothing: NaN says to subtract log-probabilities.
            log_sum_ratio = tl.where(tl.abs(small) < 0.5, log1p(small), float("nan"))
        normalisers = (max_s, tl.log(sum_s), max_t, tl.log(sum_t), log_sum_ratio)

    row_scale = 1.0
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + row)
    mean_score = 0.0
    if divergence_ptr is not None:
        divergence = tl.zeros((BLOCK_V,), tl.float32)
        entropy_s = tl.zeros((BLOCK_V,), tl.float32)
        entropy_t = tl.zeros((BLOCK_V,), tl.float32)
        scores = tl.zeros((BLOCK_V,), tl.float32)
        for start in range(0, V, BLOCK_V):
            offsets = start + tl.arange(0, BLOCK_V)
            mask = offsets < V
            lq, lp, log_ratio, softcap_gradient = _log_probabilities(
                student, teacher, normalisers, offsets, mask, inverse_temperature, ONE_HEAD
            )
            q = exp(lq)
            terms, score = divergence_terms(lq, lp, log_ratio, beta, DIVERGENCE)
            if DIVERGENCE != FORWARD_KL:
                scores += zero_where(q, q * score)
            divergence += tl.where(mask, terms, 0.0)
            if STATISTICS:
                entropy_s -= zero_where(q, q * lq)
                p = exp(lp)
                entropy_t -= zero_where(p, p * lp)
            if gradient_ptr is not None and DIVERGENCE == FORWARD_KL:
                g = score * softcap_gradient * row_scale
                tl.store(gradient_ptr + row * stride_gr + offsets, g.to(gradient_ptr.dtype.element_ty), mask=mask)

        mean_score = tl.sum(scores, axis=0)
        # Rounding may leave a sum of nothing just below zero; written so that NaN stays NaN.
        total = tl.sum(divergence, axis=0)
        tl.store(divergence_ptr + row, tl.where(total < 0, 0.0, total))
        if mean_score_ptr is not None:
            tl.store(mean_score_ptr + row, mean_score)
        if STATISTICS:
            tl.store(student_entropy_ptr + row, tl.sum(entropy_s, axis=0))
            tl.store(teacher_entropy_ptr + row, tl.sum(entropy_t, axis=0))
            if agreement_ptr is not None:
                tl.store(agreement_ptr + row, tl.where(agree, 1.0, 0.0))
    elif mean_score_ptr is not None:
        mean_score = tl.load(mean_score_ptr + row)

    if gradient_ptr is not None and DIVERGENCE != FORWARD_KL:
        for start in range(0, V, BLOCK_V):
            offsets = start + tl.arange(0, BLOCK_V)
            mask = offsets < V
            lq, lp, log_ratio, softcap_gradient = _log_probabilities(
                student, teacher, normalisers, offsets, mask, inverse_temperature, ONE_HEAD
            )
            q = exp(lq)
            _, score = divergence_terms(lq, lp, log_ratio, beta, DIVERGENCE)
            g = zero_where(q, q * (score - mean_score)) * softcap_gradient * row_scale
            tl.store(gradient_ptr + row * stride_gr + offsets, g.to(gradient_ptr.dtype.element_ty), mask=mask)


def compare_rows(
    student: Tensor,  # [R, V] float32, as all that follow see torch_backend.py
    teacher: Tensor,  # [U, V]
    inverse_index: Tensor | None,  # [R] int64
    problem: Problem,
    block_rows: int,  # of no use here: a program is a row
    *,
    stats: SuffixKLStats | None = None,  # four [R]
    statistics: bool = False,
    row_scale: Tensor | None = None,  # [R]
    gradient: Tensor | None = None,  # [R, V]
    shard_normalisers: Tensor | None = None,  # [R, 4]
    normalisers: Tensor | None = None,  # [R, 4]
    mean_score: Tensor | None = None,  # [R]
) -> None:
    """Do what the function of this name in torch_backend.py does, a program a row."""
    rows, vocab_size = student.shape
    divergence, student_entropy, teacher_entropy, agreement = stats or (None,) * 4
    _compare_rows_kernel[(rows,)](
        student,
        teacher,
        inverse_index,
        gradient,
        problem.student.bias,
        problem.teacher.bias,
        row_scale,
        divergence,
        student_entropy,
        teacher_entropy,
        agreement if normalisers is None else None,
        shard_normalisers,
        normalisers,
        mean_score,
        student.stride(0),
        teacher.stride(0),
        0 if gradient is None else gradient.stride(0),
        bias_stride(problem.student.bias),
        bias_stride(problem.teacher.bias),
        vocab_size,
        1.0 / problem.temperature,
        problem.beta,
        problem.student.transform.scale,
        problem.student.transform.softcap,
        problem.teacher.transform.scale,
        problem.teacher.transform.softcap,
        DIVERGENCE=DIVERGENCE_CODES[problem.divergence],
        STATISTICS=statistics,
        ONE_HEAD=problem.one_head,
        BLOCK_V=min(MAX_BLOCK_V, triton.next_power_of_2(vocab_size)),
        num_warps=NUM_WARPS,
        maxnreg=MAX_REGISTERS,
    )


@triton.jit
def _multiply_kernel(x_ptr, factor_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    x = tl.load(x_ptr + offsets, mask=mask) * tl.load(factor_ptr)
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty), mask=mask)


def multiplied(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Do what the function of this name in torch_backend.py does, in one pass.

    The two passes of torch, of which one does not load vectors, took 2.4 ms for 152064 x 3584 float32 numbers on an
    H200; this kernel 0.8 ms.
    """
    if not x.is_cuda and dtype != x.dtype:  # Triton's interpreter truncates where a GPU rounds
        return x.mul_(factor).to(dtype)
    out = x if dtype == x.dtype else torch.empty_like(x, dtype=dtype)
    assert out.stride() == x.stride()  # both dense, so that memory can be gone through as it lies
    if x.numel() > 0:
        grid = (triton.cdiv(x.numel(), MAX_BLOCK_V),)
        _multiply_kernel[grid](x, factor, out, x.numel(), BLOCK=MAX_BLOCK_V, num_warps=NUM_WARPS)
    return out
