"""Row statistics and in-place row gradient of one chunk of logits, in torch: the twin of `rows_triton.py`.

Both files compute the same formulas. With log-probabilities lq (student) and lp (teacher) at temperature T, and m the
mixture for "jsd", every divergence is a sum of terms a (la - lb) + b - a, each >= 0. The added b - a sums to zero over
the vocabulary, and makes a rounding error in the normalisers count squared: identical rows give about 1e-13, not 1e-7,
and no divergence is negative (the generalised KL divergence; Csiszar 1975).

    divergence      value                                   d value / d (student logit / T)
    forward_kl      KL(p || q)                              q - p
    reverse_kl      KL(q || p)                              q (h - sum q h),  h = lq - lp
    jsd             beta KL(p || m) + (1-beta) KL(q || m)   q (h - sum q h),  h = (1-beta) (lq - lm)
"""

from __future__ import annotations

import torch
from torch import Tensor

from disc_kernels.linear_kl.problem import LogitTransform, Problem, SuffixKLStats

# Logits treated at once on the CPU: 64 Ki float32 entries and their temporaries fit a core's second-level cache.
# A GPU wants launches that fill it.
BLOCK_ENTRIES = {"cpu": 2**16, "cuda": 2**24}
BLOCK_TEMPORARIES = 10


def compare_rows(
    student: Tensor,  # [R, V] head outputs without bias; overwritten where a gradient is asked
    teacher: Tensor,  # [R, V]
    problem: Problem,
    block_rows: int,
    out: SuffixKLStats,  # four [R] tensors; the divergence is filled, the other three only where `statistics`
    *,
    row_scale: Tensor | None,  # [R] factor on the gradient's rows; None: 1
    gradient: Tensor | None,  # [R, V] to fill with d divergence / d student, may share memory with `student` row by row
    statistics: bool,
) -> None:
    for start in range(0, student.shape[0], block_rows):
        rows = slice(start, start + block_rows)
        u_s, slope = _transformed(student[rows], problem.student.bias, problem.student.transform, problem)
        u_t, _ = _transformed(teacher[rows], problem.teacher.bias, problem.teacher.transform, problem)
        if statistics:
            out.agreement[rows] = (u_s.argmax(-1) == u_t.argmax(-1)).to(out.agreement.dtype)
        lq = torch.log_softmax(u_s.div_(problem.temperature), dim=-1)
        lp = torch.log_softmax(u_t.div_(problem.temperature), dim=-1)
        if statistics:
            out.student_entropy[rows] = _entropy(lq)
            out.teacher_entropy[rows] = _entropy(lp)
        out.divergence[rows] = _divergence(lq, lp, problem)
        if gradient is not None:
            block = _gradient(lq, lp, problem)
            factor = problem.student.transform.scale / problem.temperature
            block.mul_(factor) if row_scale is None else block.mul_((row_scale[rows] * factor).unsqueeze(1))
            if slope is not None:
                block.mul_(slope)
            gradient[rows] = block


def _transformed(
    z: Tensor, bias: Tensor | None, transform: LogitTransform, problem: Problem
) -> tuple[Tensor, Tensor | None]:
    """The model's own logits, and du/d(scale z) where it is not 1."""
    u = z * transform.scale if bias is None else (z + bias[: problem.vocab_size]).mul_(transform.scale)
    if transform.softcap is None:
        return u, None
    u.div_(transform.softcap).tanh_()
    slope = 1 - u * u
    return u.mul_(transform.softcap), slope


def _divergence(lq: Tensor, lp: Tensor, problem: Problem) -> Tensor:
    if problem.divergence == "forward_kl":
        return _generalised_kl(lp, lq)
    if problem.divergence == "reverse_kl":
        return _generalised_kl(lq, lp)
    lm = _log_mixture(lq, lp, problem.beta)
    return problem.beta * _generalised_kl(lp, lm) + (1 - problem.beta) * _generalised_kl(lq, lm)


def _generalised_kl(la: Tensor, lb: Tensor) -> Tensor:
    """sum a (la - lb) + b - a = sum a (d + exp(-d) - 1) with d = la - lb."""
    a, b, d = la.exp(), lb.exp(), la - lb
    # For small d the direct form cancels; for large |d| exp(-d) overflows. expm1 serves between.
    near = d.abs() < 0.5
    term = torch.where(near, a * (d + torch.expm1(-d.clamp(-0.5, 0.5))), a * d + (b - a))
    return torch.where(a == 0, b, term).sum(-1)


def _log_mixture(lq: Tensor, lp: Tensor, beta: float) -> Tensor:
    return (lp.exp().mul_(beta) + lq.exp().mul_(1 - beta)).log_()


def _gradient(lq: Tensor, lp: Tensor, problem: Problem) -> Tensor:
    """d divergence / d (student logit / T), [R, V]."""
    q = lq.exp()
    if problem.divergence == "forward_kl":
        return q.sub_(lp.exp_())
    if problem.divergence == "reverse_kl":
        h = lq - lp
    else:
        h = (lq - _log_mixture(lq, lp, problem.beta)).mul_(1 - problem.beta)
    h = torch.where(q == 0, 0.0, h)  # an entry the student cannot give: 0 log 0 = 0
    return h.sub_((q * h).sum(-1, keepdim=True)).mul_(q)


def _entropy(lp: Tensor) -> Tensor:
    p = lp.exp()
    return -torch.where(p == 0, 0.0, p * lp).sum(-1)
