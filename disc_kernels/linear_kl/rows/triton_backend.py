"""Row statistics and in-place row gradient of one chunk of logits, in Triton: the twin of `rows_torch.py`.

The formulas stand there. One program a row. Pass 1 over the vocabulary finds both normalisers online (Milakov and
Gimelshein 2018, arXiv 1805.02867); pass 2 sums the divergence and, for forward KL, writes the gradient; reverse KL and
JSD need their mean slope first, so their gradient takes a third pass. Nothing but the block size depends on a shape.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from disc_kernels.linear_kl.inputs import Problem, Side, SuffixKLStats
from disc_kernels.linear_kl.rows.triton_math import (
    FORWARD_KL,
    KINDS,
    divergence_terms,
    expm1,
    first_maximum,
    log1p,
    online_logsumexp,
    tanh,
    zero_where,
)

# Nothing but registers: the plan need not reserve memory.
BLOCK_ENTRIES = {"cpu": 0, "cuda": 0}
BLOCK_TEMPORARIES = 0

# One program holds one tile of both rows in registers: 2048 entries over 8 warps are 8 of each a thread. At 4096 the
# kernel takes twice the registers, so that one program fits a multiprocessor where two or more do now
# (tests/linear_kl/test_aot.py reads registers and spills from the compiled kernels; speed was not measured).
MAX_BLOCK_V = 2048
NUM_WARPS = 8

# Left to itself, ptxas spills a few registers of `_normalise_rows_kernel` to keep it at 32 or 48. With a bound that it
# does not come near, it takes 48 (80 with softcap and biases) and spills none.
MAX_REGISTERS = 128

# One number a row: a chunk's rows of them start at an aligned address or not, by M, which is no reason to compile anew.
ROW_NUMBERS = (
    *("teacher_slot_ptr", "row_scale_ptr", "divergence_ptr", "student_entropy_ptr", "teacher_entropy_ptr"),
    *("agreement_ptr", "maximum_ptr", "log_sum_ptr", "entropy_ptr", "total_ptr", "expected_bias_ptr"),
    *("part_ptr", "whole_ptr", "mean_slope_ptr"),
)

PEAK: tl.constexpr = tl.constexpr(2.0**15)  # see rows_torch.py


@triton.jit
def _load_logits(side, offsets, mask, inverse_temperature):
    """(logits / T with -inf outside the vocabulary, du/d(scale z) which is 1 without a softcap)"""
    row_ptr, bias_ptr, stride_b, scale, softcap = side
    z = tl.load(row_ptr + offsets, mask=mask, other=0.0)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offsets.to(tl.int64) * stride_b, mask=mask, other=0.0).to(z.dtype)
    u = z * scale
    slope = tl.full(z.shape, 1.0, z.dtype)
    if softcap is not None:
        t = tanh(u / softcap)
        slope = 1.0 - t * t
        u = t * softcap
    return tl.where(mask, u * inverse_temperature, float("-inf")), slope


@triton.jit
def _load_pair(student, teacher, offsets, mask, inverse_temperature, ONE_HEAD: tl.constexpr):
    """(student's logits / T, their slope, the teacher's logits / T, difference of the two where known by itself)"""
    u_t, _ = _load_logits(teacher, offsets, mask, inverse_temperature)
    if ONE_HEAD:
        row_ptr, _, _, scale, _ = student
        difference = tl.load(row_ptr + offsets, mask=mask, other=0.0) * scale * inverse_temperature
        return u_t + difference, 1.0, u_t, difference
    else:
        u_s, slope = _load_logits(student, offsets, mask, inverse_temperature)
        return u_s, slope, u_t, 0.0


@triton.jit
def row_sums(
    student, teacher, V, inverse_temperature, STATISTICS: tl.constexpr, ONE_HEAD: tl.constexpr, BLOCK_V: tl.constexpr
):
    """(student's maximum, its sum above that, the teacher's two, excess of the sums, whether the maxima agree)"""
    max_s = float("-inf")
    max_t = float("-inf")
    sum_s = 0.0
    sum_t = 0.0
    excess = 0.0  # of the student's sum over the teacher's
    best_s = -1
    best_t = -1
    for start in range(0, V, BLOCK_V):
        offsets = start + tl.arange(0, BLOCK_V)
        u_s, _, u_t, difference = _load_pair(student, teacher, offsets, offsets < V, inverse_temperature, ONE_HEAD)
        if STATISTICS:
            best_s = first_maximum(u_s, offsets, max_s, best_s)
            best_t = first_maximum(u_t, offsets, max_t, best_t)
        max_s, sum_s = online_logsumexp(u_s, max_s, sum_s)
        old = max_t
        max_t, sum_t = online_logsumexp(u_t, max_t, sum_t)
        if ONE_HEAD:
            base = tl.where(max_t == float("-inf"), 0.0, max_t)
            excess = excess * tl.exp(old - base) + tl.sum(tl.exp(u_t - base) * expm1(difference), axis=0)
    return max_s, sum_s, max_t, sum_t, excess, best_s == best_t


@triton.jit
def _normalisers(
    student, teacher, V, inverse_temperature, STATISTICS: tl.constexpr, ONE_HEAD: tl.constexpr, BLOCK_V: tl.constexpr
):
    """(student's maximum, log of its sum above that, the teacher's two, log of the sums' ratio, whether maxima agree)

    Maximum and log-sum stay apart: added up, they would lose the log-sum's digits where logits lie far from zero.
    """
    max_s, sum_s, max_t, sum_t, excess, agree = row_sums(
        student, teacher, V, inverse_temperature, STATISTICS, ONE_HEAD, BLOCK_V
    )
    log_ratio = 0.0
    if ONE_HEAD:
        small = excess / sum_t
        # Far from 0 it may have overflowed, and log1p gains nothing: NaN says to subtract log-probabilities.
        log_ratio = tl.where(tl.abs(small) < 0.5, log1p(small), float("nan"))
    return max_s, tl.log(sum_s), max_t, tl.log(sum_t), log_ratio, agree


@triton.jit
def log_probabilities(student, teacher, normalisers, offsets, mask, inverse_temperature, ONE_HEAD: tl.constexpr):
    """(lq, lp, lq - lp, slope of the student's logits)"""
    max_s, logsum_s, max_t, logsum_t, log_ratio, _ = normalisers
    u_s, slope, u_t, difference = _load_pair(student, teacher, offsets, mask, inverse_temperature, ONE_HEAD)
    lq = u_s - max_s - logsum_s
    lp = u_t - max_t - logsum_t
    gap = tl.where(lq == lp, 0.0, lq - lp)  # a bias may make both -inf
    if ONE_HEAD:
        gap = tl.where(log_ratio == log_ratio, difference - log_ratio, gap)
    return lq, lp, gap, slope


@triton.jit
def store_in_place(row_ptr, offsets, mask, x, NARROW: tl.constexpr):
    if NARROW:
        # 16-bit numbers land on float32 logits of this and earlier tiles: all threads must have read theirs.
        tl.debug_barrier()
    tl.store(row_ptr + offsets, x.to(row_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=ROW_NUMBERS)
def _compare_rows_kernel(
    student_ptr,  # [R, V] head outputs without bias, ONE_HEAD: less the teacher's
    teacher_ptr,  # [U, V]
    teacher_slot_ptr,  # [R] int64, the teacher row a row is compared with, or None: U = R, in order
    gradient_ptr,  # [R, V] or None; may be the memory of `student_ptr` in a narrower dtype: NARROW
    student_bias_ptr,  # [V] or None
    teacher_bias_ptr,  # [V] or None
    row_scale_ptr,  # [R] or None
    divergence_ptr,  # [R]
    student_entropy_ptr,  # [R]
    teacher_entropy_ptr,  # [R]
    agreement_ptr,  # [R]
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
    KIND: tl.constexpr,
    STATISTICS: tl.constexpr,
    NARROW: tl.constexpr,
    ONE_HEAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    teacher_row = row
    if teacher_slot_ptr is not None:
        teacher_row = tl.load(teacher_slot_ptr + row)
    student = (student_ptr + row * stride_sr, student_bias_ptr, stride_sb, student_scale, student_softcap)
    teacher = (teacher_ptr + teacher_row * stride_tr, teacher_bias_ptr, stride_tb, teacher_scale, teacher_softcap)
    normalisers = _normalisers(student, teacher, V, inverse_temperature, STATISTICS, ONE_HEAD, BLOCK_V)

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
        lq, lp, gap, slope = log_probabilities(
            student, teacher, normalisers, offsets, mask, inverse_temperature, ONE_HEAD
        )
        q = tl.exp(lq)
        terms, h = divergence_terms(lq, lp, gap, beta, KIND)
        if KIND != FORWARD_KL:
            mean_slope += tl.sum(zero_where(q, q * h), axis=0)
        divergence += tl.sum(tl.where(mask, terms, 0.0), axis=0)
        if STATISTICS:
            entropy_s -= tl.sum(zero_where(q, q * lq), axis=0)
            p = tl.exp(lp)
            entropy_t -= tl.sum(zero_where(p, p * lp), axis=0)
        if gradient_ptr is not None and KIND == FORWARD_KL:
            store_in_place(gradient_ptr + row * stride_gr, offsets, mask, h * slope * row_scale, NARROW)

    # Rounding may leave a sum of nothing just below zero; written so that NaN stays NaN.
    tl.store(divergence_ptr + row, tl.where(divergence < 0, 0.0, divergence))
    if STATISTICS:
        tl.store(student_entropy_ptr + row, entropy_s)
        tl.store(teacher_entropy_ptr + row, entropy_t)
        tl.store(agreement_ptr + row, tl.where(normalisers[5], 1.0, 0.0))

    if gradient_ptr is not None and KIND != FORWARD_KL:
        for start in range(0, V, BLOCK_V):
            offsets = start + tl.arange(0, BLOCK_V)
            mask = offsets < V
            lq, lp, gap, slope = log_probabilities(
                student, teacher, normalisers, offsets, mask, inverse_temperature, ONE_HEAD
            )
            q = tl.exp(lq)
            _, h = divergence_terms(lq, lp, gap, beta, KIND)
            g = zero_where(q, q * (h - mean_slope)) * slope * row_scale
            store_in_place(gradient_ptr + row * stride_gr, offsets, mask, g, NARROW)


def compare_rows(
    student: Tensor,  # [R, V] float32, see rows_torch.py; overwritten where a gradient is asked
    teacher: Tensor,  # [U, V] float32
    teacher_slot: Tensor | None,  # [R] int64
    problem: Problem,
    block_rows: int,  # of no use here: a program is a row
    out: SuffixKLStats,  # four [R] tensors; the divergence is filled, the other three only where `statistics`
    *,
    row_scale: Tensor | None,  # [R] factor on the gradient's rows; None: 1
    gradient: Tensor | None,  # [R, V] to fill, see rows_torch.py; may share memory with `student` row by row
    statistics: bool,
) -> None:
    rows, vocab_size = student.shape
    _compare_rows_kernel[(rows,)](
        student,
        teacher,
        teacher_slot,
        gradient,
        problem.student.bias,
        problem.teacher.bias,
        row_scale,
        *out,
        student.stride(0),
        teacher.stride(0),
        0 if gradient is None else gradient.stride(0),
        _stride(problem.student.bias),
        _stride(problem.teacher.bias),
        vocab_size,
        1.0 / problem.temperature,
        problem.beta,
        problem.student.transform.scale,
        problem.student.transform.softcap,
        problem.teacher.transform.scale,
        problem.teacher.transform.softcap,
        KIND=KINDS[problem.divergence],
        STATISTICS=statistics,
        NARROW=gradient is not None and gradient.dtype != torch.float32,
        ONE_HEAD=problem.one_head,
        BLOCK_V=min(MAX_BLOCK_V, triton.next_power_of_2(vocab_size)),
        num_warps=NUM_WARPS,
    )


@triton.jit(do_not_specialize_on_alignment=ROW_NUMBERS)
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
    side = (logits_ptr + row * stride_zr, bias_ptr, stride_b, scale, softcap)
    maximum = float("-inf")
    normaliser = 0.0
    for start in range(0, V, BLOCK_V):
        offsets = start + tl.arange(0, BLOCK_V)
        u, _ = _load_logits(side, offsets, offsets < V, inverse_temperature)
        maximum, normaliser = online_logsumexp(u, maximum, normaliser)
    log_sum = tl.log(normaliser)
    base = tl.where(maximum == float("-inf"), 0.0, maximum)  # -inf - -inf would be NaN
    tl.store(maximum_ptr + row, maximum)
    tl.store(log_sum_ptr + row, log_sum)

    if weights_ptr is not None or entropy_ptr is not None or expected_bias_ptr is not None:
        spread = 0.0
        total = 0.0
        expected_bias = 0.0
        for start in range(0, V, BLOCK_V):
            offsets = start + tl.arange(0, BLOCK_V)
            mask = offsets < V
            u, _ = _load_logits(side, offsets, mask, inverse_temperature)
            e = tl.exp(u - base)
            if entropy_ptr is not None:
                spread += tl.sum(zero_where(e, e * (u - base)), axis=0)
            if expected_bias_ptr is not None:
                bias = tl.load(other_bias_ptr + offsets.to(tl.int64) * stride_ob, mask=mask, other=0.0).to(e.dtype)
                expected_bias += tl.sum(zero_where(e, e * bias), axis=0)
            if weights_ptr is not None:
                weight = (e * PEAK).to(weights_ptr.dtype.element_ty)
                stored = weight.to(e.dtype)
                if remainder_ptr is not None:
                    rest = (e * PEAK - stored).to(remainder_ptr.dtype.element_ty)
                    tl.store(remainder_ptr + row * stride_rr + offsets, rest, mask=mask)
                    stored += rest.to(e.dtype)
                total += tl.sum(tl.where(mask, stored, 0.0), axis=0)
                store_in_place(weights_ptr + row * stride_wr, offsets, mask, weight, NARROW)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + row, log_sum - spread / normaliser)
        if expected_bias_ptr is not None:
            tl.store(expected_bias_ptr + row, expected_bias / normaliser)
        if weights_ptr is not None:
            tl.store(total_ptr + row, total)


def normalise_rows(
    logits: Tensor,  # [R, V] float32 head outputs without bias; overwritten where `weights` is asked
    side: Side,
    temperature: float,
    block_rows: int,  # of no use here: a program is a row
    *,
    maximum: Tensor,  # [R] to fill, as all that follow; see rows_torch.py
    log_sum: Tensor,  # [R]
    entropy: Tensor | None = None,  # [R]
    weights: Tensor | None = None,  # [R, V]; may share memory with `logits` row by row
    remainder: Tensor | None = None,  # [R, V]
    total: Tensor | None = None,  # [R]
    other_bias: Tensor | None = None,  # [>= V], read
    expected_bias: Tensor | None = None,  # [R]
) -> None:
    rows, vocab_size = logits.shape
    _normalise_rows_kernel[(rows,)](
        logits,
        weights,
        remainder,
        side.bias,
        other_bias,
        maximum,
        log_sum,
        entropy,
        total,
        expected_bias,
        logits.stride(0),
        0 if weights is None else weights.stride(0),
        0 if remainder is None else remainder.stride(0),
        _stride(side.bias),
        _stride(other_bias),
        vocab_size,
        1.0 / temperature,
        side.transform.scale,
        side.transform.softcap,
        NARROW=weights is not None and weights.dtype != torch.float32,
        BLOCK_V=min(MAX_BLOCK_V, triton.next_power_of_2(vocab_size)),
        num_warps=NUM_WARPS,
        maxnreg=MAX_REGISTERS,
    )


def _stride(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.stride(0)
