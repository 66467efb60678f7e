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

import torch
from torch import Tensor

from disc_kernels.linear_kl.inputs import Problem, Side, SuffixKLStats

# Logits treated at once. On the CPU a block and its temporaries should stay in the cache; a GPU wants launches that
# fill it.
BLOCK_ENTRIES = {"cpu": 2**17, "cuda": 2**24}
BLOCK_TEMPORARIES = 10

# The largest softmax weight of a row: a power of two, so exact, and near the top of float16's range.
PEAK = 2.0**15


def compare_rows(
    student: Tensor,  # [R, V] head outputs without bias, less the teacher's if problem.one_head; gradients overwrite it
    teacher: Tensor,  # [U, V]
    teacher_slot: Tensor | None,  # [R] int64, the teacher row that each row is compared with; None: U = R, in order
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
        z_t = teacher[rows] if teacher_slot is None else teacher.index_select(0, teacher_slot[rows])
        u_t, _ = scaled_logits(z_t, problem.teacher, problem.temperature)
        lp = torch.log_softmax(u_t, dim=-1)
        if problem.one_head:
            slope, gap = None, student[rows] * (problem.student.transform.scale / problem.temperature)
            u_s = u_t + gap
            lq = torch.log_softmax(u_s, dim=-1)  # sums to 1, as lp + gap would not where the models are far apart
            gap -= _log_ratio(lp, gap)
        else:
            u_s, slope = scaled_logits(student[rows], problem.student, problem.temperature)
            lq = torch.log_softmax(u_s, dim=-1)
            gap = lq - lp
            if problem.student.bias is not None or problem.teacher.bias is not None:
                gap.masked_fill_(lq == lp, 0.0)  # both may be -inf
        if statistics:
            out.agreement[rows] = (u_s.argmax(-1) == u_t.argmax(-1)).to(out.agreement.dtype)
            out.student_entropy[rows] = row_entropy(lq)
            out.teacher_entropy[rows] = row_entropy(lp)
        del z_t, u_s, u_t
        out.divergence[rows], block = divergence_and_slope(lq, lp, gap, problem)
        if gradient is not None:
            if problem.divergence != "forward_kl":
                q = lq.exp_()
                block.sub_((q * block).sum(-1, keepdim=True)).mul_(q)
            if row_scale is not None:
                block.mul_(row_scale[rows].unsqueeze(1))
            if slope is not None:
                block.mul_(slope)
            gradient[rows] = block


def normalise_rows(
    logits: Tensor,  # [R, V] head outputs without bias; overwritten where `weights` is asked
    side: Side,
    temperature: float,
    block_rows: int,
    *,
    maximum: Tensor,  # [R] to fill: the largest logit / T
    log_sum: Tensor,  # [R] to fill: log of sum_v exp(logit_v / T - maximum)
    entropy: Tensor | None = None,  # [R] to fill: nats, of p = softmax(logits / T)
    weights: Tensor | None = None,  # [R, V] to fill: a multiple of p, row by row; may share memory with `logits`
    remainder: Tensor | None = None,  # [R, V] to fill: what rounding took from `weights`
    total: Tensor | None = None,  # [R] to fill: the sums of `weights` + `remainder` as they were stored
    other_bias: Tensor | None = None,  # [>= V]
    expected_bias: Tensor | None = None,  # [R] to fill: sum_v p_v other_bias_v
) -> None:
    """Softmax in place, for products of probabilities with a matrix: divide those by `total`.

    A row's largest weight is `PEAK` and a row is divided by what was stored: rounding to 16 bits leaves the largest
    probability exact, a certain row stays certain, and float16 reaches down to 2^-39 of the largest. A row without a
    possible entry has maximum and log-sum -inf, weights 0 and entropy NaN.
    """
    for start in range(0, logits.shape[0], block_rows):
        rows = slice(start, start + block_rows)
        u, _ = scaled_logits(logits[rows], side, temperature)
        maximum[rows] = u.amax(-1)
        base = maximum[rows].masked_fill(maximum[rows] == -torch.inf, 0.0)  # -inf - -inf would be NaN
        u = u - base.unsqueeze(1)
        e = u.exp()
        normaliser = e.sum(-1)
        log_sum[rows] = normaliser.log()
        if entropy is not None:  # a sum of terms that are not negative: nothing cancels
            spread = u.mul_(e).masked_fill_(e == 0, 0.0).sum(-1)  # 0 log 0 = 0
            entropy[rows] = log_sum[rows] - spread / normaliser
        if expected_bias is not None and other_bias is not None:
            terms = (e * other_bias[: side.vocab_size]).masked_fill_(e == 0, 0.0)  # the bias may be -inf
            expected_bias[rows] = terms.sum(-1) / normaliser
        if weights is not None and total is not None:
            weights[rows] = e.mul_(PEAK)
            total[rows] = weights[rows].sum(-1, dtype=total.dtype)
            if remainder is not None:
                remainder[rows] = e.sub_(weights[rows])
                total[rows] += remainder[rows].sum(-1, dtype=total.dtype)


def scaled_logits(z: Tensor, side: Side, temperature: float) -> tuple[Tensor, Tensor | None]:
    """The model's own logits over T, and du/d(scale z) where it is not 1."""
    if side.bias is not None:
        z = z + side.bias[: side.vocab_size]
    scale, softcap = side.transform.scale, side.transform.softcap
    if softcap is None:
        factor = scale / temperature
        return (z if factor == 1 else z * factor), None
    t = (z * (scale / softcap)).tanh_()
    return t * (softcap / temperature), t.square_().neg_().add_(1)


def _log_ratio(lp: Tensor, difference: Tensor) -> Tensor:
    """log(sum exp u_s / sum exp u_t), [R, 1], from log-probabilities of the teacher and u_s - u_t."""
    small = (lp.exp() * torch.expm1(difference)).sum(-1, keepdim=True)
    # Far from 0 it may have overflowed, and log1p would no longer gain anything.
    return torch.where(small.abs() < 0.5, torch.log1p(small), torch.logsumexp(lp + difference, -1, keepdim=True))


def divergence_and_slope(lq: Tensor, lp: Tensor, gap: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Divergences [R]; and [R, V] the gradient itself for forward KL, for the others h. `gap`, lq - lp, is overwritten.

    Over a part of the vocabulary, the part's share of each divergence.
    """
    # Only a bias of -inf makes a log-probability infinite, and only then do the masks below have anything to do.
    masked = problem.student.bias is not None or problem.teacher.bias is not None
    if problem.divergence == "forward_kl":
        return _generalised_kl(lp, lq, gap, masked)
    if problem.divergence == "reverse_kl":
        value, _ = _generalised_kl(lq, lp, -gap, masked)
        h = gap
    else:
        beta = problem.beta
        # lm - max(lp, lq): what is exponentiated is never positive, and nothing cancels where p and q are close.
        smaller = torch.full_like(gap, 1 - beta).masked_fill_(gap > 0, beta)  # the weight of the smaller of the two
        common = smaller.mul_(torch.expm1(gap.abs().neg_())).log1p_()
        lm = torch.maximum(lp, lq) + common
        value = beta * _generalised_kl(lp, lm, common + gap.clamp(min=0), masked)[0]
        h = common.neg_().add_(gap.clamp_(max=0))  # lq - lm
        value += (1 - beta) * _generalised_kl(lq, lm, -h, masked)[0]
        h.mul_(1 - beta)
    if masked:
        h.masked_fill_(lq == -torch.inf, 0.0)
    return value, h


def _generalised_kl(la: Tensor, lb: Tensor, gap: Tensor, masked: bool) -> tuple[Tensor, Tensor]:
    """sum a (la - lb) + (b - a), [R], and b - a, [R, V], where gap = lb - la; it is overwritten."""
    difference = torch.maximum(la, lb).exp_().mul_(torch.expm1(gap.abs().neg_())).copysign_(gap)
    a = la.exp()
    if masked:
        gap.masked_fill_(a == 0, 0.0)  # 0 log 0 = 0
    value = torch.addcmul(difference, a, gap, value=-1).sum(-1)
    return value.clamp_min_(0), difference


def row_entropy(lp: Tensor) -> Tensor:
    return -(lp.exp() * lp.clamp_min(torch.finfo(lp.dtype).min)).sum(-1)
