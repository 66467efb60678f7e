"""Row statistics and in-place row gradient of one chunk of logits, in torch: the twin of `rows_triton.py`.

Both files compute the same formulas. With log-probabilities lq (student) and lp (teacher) at temperature T, and m the
mixture for "jsd", every divergence is a sum of terms a (la - lb) + (b - a). The added b - a sums to zero over the
vocabulary, and makes rounding errors in the normalisers count squared: rows that are equal up to rounding give about
1e-13, not 1e-7 (generalised KL divergence; Csiszar 1975). And b - a is computed as max(a, b) expm1(-|lb - la|) with the
sign of lb - la, which cancels nothing; for forward KL it is the gradient as well.

    divergence      value                                   d value / d (student logit / T)
    forward_kl      KL(p || q)                              q - p
    reverse_kl      KL(q || p)                              q (h - sum q h),  h = lq - lp
    jsd             beta KL(p || m) + (1-beta) KL(q || m)   q (h - sum q h),  h = (1-beta) (lq - lm)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from disc_kernels.linear_kl.problem import Problem, Side, SuffixKLStats

# Logits treated at once. On the CPU a block and its temporaries should stay in the cache; a GPU wants launches that
# fill it.
BLOCK_ENTRIES = {"cpu": 2**17, "cuda": 2**24}
BLOCK_TEMPORARIES = 10


def compare_rows(
    student: Tensor,  # [R, V] head outputs without bias; overwritten where a gradient is asked
    teacher: Tensor,  # [R, V]
    problem: Problem,
    block_rows: int,
    out: SuffixKLStats,  # four [R] tensors; the divergence is filled, the other three only where `statistics`
    *,
    row_scale: Tensor | None,  # [R] factor on the gradient's rows; None: 1
    gradient: Tensor | None,  # [R, V] to fill; may share memory with `student` row by row
    statistics: bool,
) -> None:
    """Fill `out`, and `gradient` with d divergence / d (student logit), but for the factor scale / T.

    That factor is the same for all rows, and without it a 16-bit gradient uses its dtype's range well.
    """
    for start in range(0, student.shape[0], block_rows):
        rows = slice(start, start + block_rows)
        u_s, slope = _scaled_logits(student[rows], problem.student, problem)
        u_t, _ = _scaled_logits(teacher[rows], problem.teacher, problem)
        lq, lp = torch.log_softmax(u_s, dim=-1), torch.log_softmax(u_t, dim=-1)
        if statistics:
            out.agreement[rows] = (u_s.argmax(-1) == u_t.argmax(-1)).to(out.agreement.dtype)
            out.student_entropy[rows] = _entropy(lq)
            out.teacher_entropy[rows] = _entropy(lp)
        del u_s, u_t
        out.divergence[rows], block = _divergence(lq, lp, problem, gradient is not None)
        if gradient is not None:
            if row_scale is not None:
                block.mul_(row_scale[rows].unsqueeze(1))
            if slope is not None:
                block.mul_(slope)
            gradient[rows] = block


def _scaled_logits(z: Tensor, side: Side, problem: Problem) -> tuple[Tensor, Tensor | None]:
    """The model's own logits over T, and du/d(scale z) where it is not 1."""
    if side.bias is not None:
        z = z + side.bias[: side.vocab_size]
    scale, softcap = side.transform.scale, side.transform.softcap
    if softcap is None:
        factor = scale / problem.temperature
        return (z if factor == 1 else z * factor), None
    t = (z * (scale / softcap)).tanh_()
    return t * (softcap / problem.temperature), t.square_().neg_().add_(1)


def _divergence(lq: Tensor, lp: Tensor, problem: Problem, gradient: bool) -> tuple[Tensor, Tensor]:
    """Divergences [R], and d divergence / d (student logit / T), [R, V]; something of no use unless `gradient`."""
    # Only a bias of -inf makes a log-probability infinite, and only then do the masks below have anything to do.
    masked = problem.student.bias is not None or problem.teacher.bias is not None
    if problem.divergence == "forward_kl":
        return _generalised_kl(lp, lq, masked)
    if problem.divergence == "reverse_kl":
        value, _ = _generalised_kl(lq, lp, masked)
        lm, weight = lp, 1.0
    else:
        beta, weight = problem.beta, 1 - problem.beta
        lm = torch.logaddexp(lp + math.log(beta), lq + math.log(weight))
        value = beta * _generalised_kl(lp, lm, masked)[0] + weight * _generalised_kl(lq, lm, masked)[0]
    if not gradient:
        return value, value
    h = (lq - lm).mul_(weight)
    if masked:
        h.masked_fill_(lq == -torch.inf, 0.0)
    q = lq.exp_()
    return value, h.sub_((q * h).sum(-1, keepdim=True)).mul_(q)


def _generalised_kl(la: Tensor, lb: Tensor, masked: bool) -> tuple[Tensor, Tensor]:
    """sum a (la - lb) + (b - a), [R], and b - a, [R, V]."""
    gap = lb - la
    if masked:
        gap.masked_fill_(la == lb, 0.0)  # both may be -inf
    difference = torch.maximum(la, lb).exp_().mul_(torch.expm1(gap.abs().neg_())).copysign_(gap)
    if masked:
        gap.masked_fill_(la == -torch.inf, 0.0)  # 0 log 0 = 0
    value = torch.addcmul(difference, la.exp(), gap, value=-1).sum(-1)
    return value.clamp_min_(0), difference


def _entropy(lp: Tensor) -> Tensor:
    return -(lp.exp() * lp.clamp_min(torch.finfo(lp.dtype).min)).sum(-1)
