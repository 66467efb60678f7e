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

from disc_kernels.linear_kl.problem import Problem, Side, SuffixKLStats

# Nothing but registers: the plan need not reserve memory.
BLOCK_ENTRIES = {"cpu": 0, "cuda": 0}
BLOCK_TEMPORARIES = 0

# One program holds one tile of both rows in registers: 2048 entries over 8 warps are 8 of each a thread. At 4096 the
# kernel takes twice the registers, so that one program fits a multiprocessor where two or more do now
# (tests/linear_kl/test_aot.py reads registers and spills from the compiled kernels; speed was not measured).
MAX_BLOCK_V = 2048
NUM_WARPS = 8

_KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}
FORWARD_KL: tl.constexpr = tl.constexpr(0)
REVERSE_KL: tl.constexpr = tl.constexpr(1)


@triton.jit
def _load_logits(side, offsets, mask, inverse_temperature):
    """(logits / T with -inf outside the vocabulary, du/d(scale z) which is 1 without a softcap)"""
    row_ptr, bias_ptr, stride_b, scale, softcap = side
    z = tl.load(row_ptr + offsets, mask=mask, other=0.0)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offsets * stride_b, mask=mask, other=0.0).to(z.dtype)
    u = z * scale
    slope = tl.full(z.shape, 1.0, z.dtype)
    if softcap is not None:
        # tanh(x) = sign(x) (1 - e) / (1 + e), e = exp(-2 |x|): no overflow, and -inf and +inf give -1 and 1.
        e = tl.exp(-2.0 * tl.abs(u / softcap))
        t = (1.0 - e) / (1.0 + e)
        t = tl.where(u < 0, -t, t)
        slope = 1.0 - t * t
        u = t * softcap
    return tl.where(mask, u * inverse_temperature, float("-inf")), slope


@triton.jit
def _online_logsumexp(u, maximum, total):
    new = tl.maximum(maximum, tl.max(u, axis=0))
    # While every entry seen is -inf (masked by a bias) there is nothing to rescale, and -inf - -inf would be NaN.
    base = tl.where(new == float("-inf"), 0.0, new)
    total = total * tl.exp(maximum - base) + tl.sum(tl.exp(u - base), axis=0)
    return new, total


@triton.jit
def _first_maximum(u, offsets, best, best_index):
    """Index of the running maximum; the lowest of equals, as `torch.argmax` gives on the CPU."""
    top = tl.max(u, axis=0)
    index = tl.min(tl.where(u == top, offsets, 2147483647), axis=0)
    return tl.where(top > best, index, best_index)


@triton.jit
def _normalisers(student, teacher, V, inverse_temperature, STATISTICS: tl.constexpr, BLOCK_V: tl.constexpr):
    """(student's maximum, log of its sum above that, the teacher's two, whether both maxima are the same entry)

    Maximum and log-sum stay apart: added up, they would lose the log-sum's digits where logits lie far from zero.
    """
    max_s = float("-inf")
    max_t = float("-inf")
    sum_s = 0.0
    sum_t = 0.0
    best_s = -1
    best_t = -1
    for start in range(0, V, BLOCK_V):
        offsets = start + tl.arange(0, BLOCK_V)
        u_s, _ = _load_logits(student, offsets, offsets < V, inverse_temperature)
        u_t, _ = _load_logits(teacher, offsets, offsets < V, inverse_temperature)
        if STATISTICS:
            best_s = _first_maximum(u_s, offsets, max_s, best_s)
            best_t = _first_maximum(u_t, offsets, max_t, best_t)
        max_s, sum_s = _online_logsumexp(u_s, max_s, sum_s)
        max_t, sum_t = _online_logsumexp(u_t, max_t, sum_t)
    return max_s, tl.log(sum_s), max_t, tl.log(sum_t), best_s == best_t


@triton.jit
def _generalised_kl_terms(la, lb):
    """(a (la - lb) + (b - a), b - a)"""
    gap = lb - la
    larger = tl.exp(tl.maximum(la, lb))
    x = tl.abs(gap)
    e = tl.exp(-x)
    series = 1 - x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5 * (1 - x / 6 * (1 - x / 7 * (1 - x / 8))))))
    shrink = larger * tl.where(x < 0.5, x * series, 1 - e)  # max(a, b) - min(a, b)
    difference = _zero_where(larger, tl.where(gap > 0, shrink, -shrink))
    a = tl.where(gap > 0, larger * e, larger)
    return tl.where(a == 0, difference, difference - a * gap), difference


@triton.jit
def _zero_where(a, x):
    """x, but 0 where a is 0: 0 log 0 = 0."""
    return tl.where(a == 0, 0.0, x)


@triton.jit
def _store_gradient(gradient_ptr, offsets, mask, g, NARROW: tl.constexpr):
    if NARROW:
        # A 16-bit gradient lands on float32 logits of this and earlier tiles: all threads must have read theirs.
        tl.debug_barrier()
    tl.store(gradient_ptr + offsets, g.to(gradient_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _compare_rows_kernel(
    student_ptr,  # [R, V] head outputs without bias
    teacher_ptr,  # [R, V]
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
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student = (student_ptr + row * stride_sr, student_bias_ptr, stride_sb, student_scale, student_softcap)
    teacher = (teacher_ptr + row * stride_tr, teacher_bias_ptr, stride_tb, teacher_scale, teacher_softcap)
    max_s, logsum_s, max_t, logsum_t, agree = _normalisers(
        student, teacher, V, inverse_temperature, STATISTICS, BLOCK_V
    )

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
        u_s, slope = _load_logits(student, offsets, mask, inverse_temperature)
        u_t, _ = _load_logits(teacher, offsets, mask, inverse_temperature)
        lq = u_s - max_s - logsum_s
        lp = u_t - max_t - logsum_t
        q = tl.exp(lq)
        p = tl.exp(lp)
        if KIND == FORWARD_KL:
            terms, difference = _generalised_kl_terms(lp, lq)
        elif KIND == REVERSE_KL:
            terms, _ = _generalised_kl_terms(lq, lp)
            mean_slope += tl.sum(_zero_where(q, q * (lq - lp)), axis=0)
        else:
            lm = tl.log(beta * p + (1.0 - beta) * q)
            terms_t, _ = _generalised_kl_terms(lp, lm)
            terms_s, _ = _generalised_kl_terms(lq, lm)
            terms = beta * terms_t + (1.0 - beta) * terms_s
            mean_slope += tl.sum(_zero_where(q, q * (1.0 - beta) * (lq - lm)), axis=0)
        divergence += tl.sum(tl.where(mask, terms, 0.0), axis=0)
        if STATISTICS:
            entropy_s -= tl.sum(_zero_where(q, q * lq), axis=0)
            entropy_t -= tl.sum(_zero_where(p, p * lp), axis=0)
        if gradient_ptr is not None and KIND == FORWARD_KL:
            _store_gradient(gradient_ptr + row * stride_gr, offsets, mask, difference * slope * row_scale, NARROW)

    # Rounding may leave a sum of nothing just below zero; written so that NaN stays NaN.
    tl.store(divergence_ptr + row, tl.where(divergence < 0, 0.0, divergence))
    if STATISTICS:
        tl.store(student_entropy_ptr + row, entropy_s)
        tl.store(teacher_entropy_ptr + row, entropy_t)
        tl.store(agreement_ptr + row, tl.where(agree, 1.0, 0.0))

    if gradient_ptr is not None and KIND != FORWARD_KL:
        for start in range(0, V, BLOCK_V):
            offsets = start + tl.arange(0, BLOCK_V)
            mask = offsets < V
            u_s, slope = _load_logits(student, offsets, mask, inverse_temperature)
            u_t, _ = _load_logits(teacher, offsets, mask, inverse_temperature)
            lq = u_s - max_s - logsum_s
            lp = u_t - max_t - logsum_t
            q = tl.exp(lq)
            if KIND == REVERSE_KL:
                h = lq - lp
            else:
                h = (1.0 - beta) * (lq - tl.log(beta * tl.exp(lp) + (1.0 - beta) * q))
            g = _zero_where(q, q * (h - mean_slope)) * slope * row_scale
            _store_gradient(gradient_ptr + row * stride_gr, offsets, mask, g, NARROW)


def compare_rows(
    student: Tensor,  # [R, V] float32 head outputs without bias; overwritten where a gradient is asked
    teacher: Tensor,  # [R, V] float32
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
        gradient,
        problem.student.bias,
        problem.teacher.bias,
        row_scale,
        *out,
        student.stride(0),
        teacher.stride(0),
        0 if gradient is None else gradient.stride(0),
        _bias_stride(problem.student),
        _bias_stride(problem.teacher),
        vocab_size,
        1.0 / problem.temperature,
        problem.beta,
        float(problem.student.transform.scale),
        problem.student.transform.softcap,
        float(problem.teacher.transform.scale),
        problem.teacher.transform.softcap,
        KIND=_KINDS[problem.divergence],
        STATISTICS=statistics,
        NARROW=gradient is not None and gradient.dtype != torch.float32,
        BLOCK_V=min(MAX_BLOCK_V, triton.next_power_of_2(vocab_size)),
        num_warps=NUM_WARPS,
    )


def _bias_stride(side: Side) -> int:
    return 0 if side.bias is None else side.bias.stride(0)
