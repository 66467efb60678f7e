"""Compare or normalise the rows of one chunk of logits, in torch: the twin of `triton_backend.py`.

Both files compute the same formulas. With log-probabilities lq (student) and lp (teacher) at temperature T, and m the
mixture for "jsd", every divergence is a sum of terms a (la - lb) + (b - a). The added b - a sums to zero over the
vocabulary, and makes rounding errors in the normalisers count squared: rows that are equal up to rounding give about
1e-13, not 1e-7 (generalised KL divergence; Csiszar 1975). Where a row's distributions are close, b - a is computed as
max(a, b) expm1(-|lb - la|) with the sign of lb - la, in Triton as (a + b) tanh((lb - la) / 2), which cancel nothing;
for forward KL it is the gradient as well. For the others the gradient is made of a score h, of which the mean under the
student is subtracted:

    divergence      value                                   d value / d (student logit / T)
    forward_kl      KL(p || q)                              q - p
    reverse_kl      KL(q || p)                              q (h - sum q h),  h = lq - lp
    jsd             beta KL(p || m) + (1-beta) KL(q || m)   q (h - sum q h),  h = (1-beta) (lq - lm)

Each is a sum over the vocabulary once the normalisers of the whole are known. So a rank that holds a shard of the
vocabulary sums over its shard and the ranks add up, in three calls of `compare_rows` with an exchange between them:

    1. with `shard_normalisers`                 what the normalisers of the whole vocabulary are made of
    2. with `normalisers`, `stats`, and         the shard's share of divergence and entropies; the gradient of forward
       `gradient` or `mean_score`               KL, or the share of the others' mean score
    3. with `normalisers`, `mean_score`,        the gradient of the others
       `gradient`
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from disc_kernels.linear_kl.inputs import Problem, Projection, SuffixKLStats

# Logits treated at once. On the CPU a block and its temporaries should stay in the cache; a GPU wants launches that
# fill it.
BLOCK_ENTRIES = {"cpu": 2**17, "cuda": 2**24}
BLOCK_TEMPORARIES = 10

# A row that diverges by less, in nats, counts as close (see above). Subtracting rounded probabilities puts about 3e-8
# nats into a row, which from here on is what rounding the divergence itself does; to cancel nothing takes 1.6 times as
# long (docs/performance.md).
CLOSE = 0.1

# The largest softmax weight of a row: a power of two, so exact, and near the top of float16's range.
LARGEST_WEIGHT = 2.0**15


def compare_rows(
    student: Tensor,  # [R, V] head outputs without bias, less the teacher's if problem.one_head; gradients overwrite it
    teacher: Tensor,  # [U, V]
    inverse_index: Tensor | None,  # [R] int64, the teacher row that each row is compared with; None: U = R, in order
    problem: Problem,
    block_rows: int,
    *,
    stats: SuffixKLStats | None = None,  # four [R] tensors to fill, or None
    statistics: bool = False,  # whether to fill more of them than the divergence
    row_scale: Tensor | None = None,  # [R] factor on the gradient's rows; None: 1
    gradient: Tensor | None = None,  # [R, V] to fill; may share memory with `student` row by row
    shard_normalisers: Tensor | None = None,  # [R, 4] to fill, and nothing else
    normalisers: Tensor | None = None,  # [R, 4] of the whole vocabulary; None: the logits are of the whole
    mean_score: Tensor | None = None,  # [R] to fill with `stats`, to subtract without
) -> None:
    """Fill `stats`, and `gradient` with d divergence / d (student logit), but for the factor scale / T.

    That factor is the same for all rows, and without it a 16-bit gradient uses its dtype's range well.

    A row of `shard_normalisers` is the student's largest logit / T, the sum of exp above it, and the teacher's two;
    with `statistics` the student's sum is negative where the models' largest logits are not the same entry. A row of
    `normalisers` has the logarithms of the sums. With them the agreement of `stats` is not filled.
    """
    for rows, z_t in _blocks(student.shape[0], teacher, inverse_index, block_rows):
        u_t, _ = scaled_logits(z_t, problem.teacher, problem.temperature)
        softcap_gradient = difference = None
        if problem.one_head:
            difference = student[rows] * (problem.student.transform.scale / problem.temperature)
            u_t = u_t - u_t.amax(-1, keepdim=True)  # so that the sum rounds least where probabilities are largest
            u_s = u_t + difference
        else:
            u_s, softcap_gradient = scaled_logits(student[rows], problem.student, problem.temperature)
        if shard_normalisers is not None:
            _fill_normalisers(shard_normalisers[rows], u_s, u_t, statistics)
            continue
        if normalisers is None:
            if stats is not None and statistics:
                stats.agreement[rows] = (u_s.argmax(-1) == u_t.argmax(-1)).to(u_s.dtype)
            max_s, max_t = u_s.amax(-1, keepdim=True), u_t.amax(-1, keepdim=True)
            log_sum_s = log_sum_t = None
        else:
            max_s, log_sum_s, max_t, log_sum_t = normalisers[rows].T.unsqueeze(2)
        q, p = u_s - max_s, u_t - max_t
        del z_t, u_s, u_t
        log_ratio = q - p if difference is None else difference
        log_sum_s, log_sum_t = _exponentiate(q, log_sum_s), _exponentiate(p, log_sum_t)
        if difference is None:
            log_ratio.sub_(log_sum_s - log_sum_t)
            if _may_be_masked(problem):
                log_ratio.masked_fill_((q == 0) & (p == 0), 0.0)  # both logits may be -inf
        else:
            log_ratio.sub_(_log_sum_ratio(p, difference, (max_s - max_t) + (log_sum_s - log_sum_t)))
        if stats is not None and statistics:
            stats.student_entropy[rows] = torch.special.entr(q).sum(-1)
            stats.teacher_entropy[rows] = torch.special.entr(p).sum(-1)
        out = gradient[rows] if gradient is not None and gradient.dtype == q.dtype else None
        divergence, score = divergence_and_score(q, p, log_ratio, problem, out)
        if stats is not None:
            stats.divergence[rows] = divergence
        if problem.divergence != "forward_kl" and (gradient is not None or mean_score is not None):
            mean = mean_score[rows] if stats is None and mean_score is not None else (q * score).sum(-1)
            if gradient is not None:
                score.sub_(mean.unsqueeze(1)).mul_(q)
            elif mean_score is not None:
                mean_score[rows] = mean
        if gradient is not None:
            if row_scale is not None:
                score.mul_(row_scale[rows].unsqueeze(1))
            if softcap_gradient is not None:
                score.mul_(softcap_gradient)
            if score is not out:
                gradient[rows] = score


def _blocks(
    count: int, teacher: Tensor, inverse_index: Tensor | None, block_rows: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of the `count` rows, with the teacher's row of each, or the one row that all of them share.

    On the CPU a block ends where its first teacher row does, if that is most of it: what a teacher row has to itself,
    such as its softmax, is then computed once a block. An index on a GPU is not looked at.
    """
    index = None if inverse_index is None or inverse_index.is_cuda else inverse_index.tolist()
    start = 0
    while start < count:
        stop = min(start + block_rows, count)
        same = start  # where rows with the first one's teacher row end
        while index is not None and same < stop and index[same] == index[start]:
            same += 1
        if 2 * (same - start) >= stop - start:
            stop = same
        rows = slice(start, stop)
        if inverse_index is None:
            yield rows, teacher[rows]
        elif index is not None and same == stop:
            yield rows, teacher[index[start]].unsqueeze(0)
        else:
            yield rows, teacher.index_select(0, inverse_index[rows])
        start = stop


def multiplied(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x`, a dense sum of gradients that nothing else needs, times `factor` (0-dim), rounded once to `dtype`.

    `x` may be overwritten, and may be what is returned.
    """
    known_to_be_one = not factor.is_cuda and factor == 1  # a GPU would have to be waited for
    return (x if known_to_be_one else x.mul_(factor)).to(dtype)


def _fill_normalisers(out: Tensor, u_s: Tensor, u_t: Tensor, statistics: bool) -> None:
    for column, u in ((0, u_s), (2, u_t)):
        maximum = u.amax(-1, keepdim=True)
        base = maximum.masked_fill(maximum == -torch.inf, 0.0)  # -inf - -inf would be NaN
        out[:, column] = maximum.squeeze(1)
        out[:, column + 1] = (u - base).exp_().sum(-1)
    if statistics:
        out[:, 1] *= torch.where(u_s.argmax(-1) == u_t.argmax(-1), 1, -1)


def normalise_rows(
    logits: Tensor,  # [R, V] head outputs without bias; overwritten where `weights` is asked
    projection: Projection,
    temperature: float,
    block_rows: int,
    numbers: Tensor,  # [5, R] to fill, as below
    weights: Tensor | None = None,  # [R, V] to fill: a multiple of p, row by row; may share memory with `logits`
    remainder: Tensor | None = None,  # [R, V] to fill: what rounding took from `weights`
    *,
    entropy: bool = True,
    other_bias: Tensor | None = None,  # [>= V]
) -> None:
    """Compute a softmax in place, for products of probabilities with a matrix.

    The numbers of a row are its largest logit / T; the log of sum_v exp(logit_v / T - that); with `entropy` the entropy
    of p = softmax(logits / T) in nats; with `other_bias` sum_v p_v other_bias_v; with `weights` the sum of these and
    `remainder` as they were stored, by which a product with them is to be divided. What is not asked for is not filled.

    A row's largest weight is `LARGEST_WEIGHT` and a row is divided by what was stored: rounding to 16 bits leaves the
    largest probability exact, a one-hot row stays one-hot, and float16 reaches down to 2^-39 of the largest. A row
    without a possible entry has maximum and log-sum -inf, weights 0 and entropy NaN.
    """
    maximum, log_sum, entropies, expected_bias, total = numbers
    for start in range(0, logits.shape[0], block_rows):
        rows = slice(start, start + block_rows)
        u, _ = scaled_logits(logits[rows], projection, temperature)
        maximum[rows] = u.amax(-1)
        base = maximum[rows].masked_fill(maximum[rows] == -torch.inf, 0.0)  # -inf - -inf would be NaN
        u = u - base.unsqueeze(1)
        e = u.exp()
        normaliser = e.sum(-1)
        log_sum[rows] = normaliser.log()
        if entropy:  # a sum of terms that are not negative: nothing cancels
            spread = u.mul_(e).masked_fill_(e == 0, 0.0).sum(-1)  # 0 log 0 = 0
            entropies[rows] = log_sum[rows] - spread / normaliser
        if other_bias is not None:
            terms = (e * other_bias[: projection.vocab_size]).masked_fill_(e == 0, 0.0)  # the bias may be -inf
            expected_bias[rows] = terms.sum(-1) / normaliser
        if weights is not None:
            weights[rows] = e.mul_(LARGEST_WEIGHT)
            total[rows] = weights[rows].sum(-1, dtype=total.dtype)
            if remainder is not None:
                remainder[rows] = e.sub_(weights[rows])
                total[rows] += remainder[rows].sum(-1, dtype=total.dtype)


def scaled_logits(z: Tensor, projection: Projection, temperature: float) -> tuple[Tensor, Tensor | None]:
    """Return the model's own logits over T, and the gradient of its softcap if it has one."""
    if projection.bias is not None:
        z = z + projection.bias[: projection.vocab_size]
    scale, softcap = projection.transform.scale, projection.transform.softcap
    if softcap is None:
        factor = scale / temperature
        return (z if factor == 1 else z * factor), None
    t = (z * (scale / softcap)).tanh_()
    return t * (softcap / temperature), t.square_().neg_().add_(1)


def _exponentiate(u: Tensor, log_sum: Tensor | None) -> Tensor:
    """Turn rows of logits / T less their maximum into probabilities, in place; return the log of the sum, [R, 1].

    `log_sum` is that of the whole vocabulary, of which `u` is a shard; None: `u` is the whole.
    """
    u.exp_()
    total = u.sum(-1, keepdim=True) if log_sum is None else log_sum.exp()
    u.div_(total)
    return total.log_() if log_sum is None else log_sum


def _log_sum_ratio(p: Tensor, difference: Tensor, subtracted: Tensor) -> Tensor:
    """Return log(sum exp u_s / sum exp u_t), [R, 1], from p and u_s - u_t, or as it was `subtracted`.

    Where the sums are close it comes from what lies between them, which cancels nothing.
    """
    small = torch.expm1(difference).mul_(p).sum(-1, keepdim=True)
    # Far from 0 it may have overflowed, and log1p would no longer gain anything.
    return torch.where(small.abs() < 0.5, torch.log1p(small), subtracted)


def _may_be_masked(problem: Problem) -> bool:
    """Return whether a log-probability may be -inf: a bias can make it that, and given logits may be."""
    return problem.student.bias is not None or problem.teacher.bias is not None or problem.teacher.is_given


def divergence_and_score(
    q: Tensor, p: Tensor, log_ratio: Tensor, problem: Problem, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return divergences [R], or the shard's share of them, and scores [R, V]; overwrite `log_ratio`, log(q / p).

    The score is the gradient itself for forward KL, in `out` if that is given. Rows may share one row of `p`.
    """
    masked = _may_be_masked(problem)
    kl = partial(_generalised_kl, masked=masked, one_head=problem.one_head)
    if problem.divergence == "forward_kl":
        return kl(p, q, log_ratio, out=out)
    if problem.divergence == "reverse_kl":
        value, _ = kl(q, p, -log_ratio)
        h = log_ratio
    else:
        beta = problem.beta
        # log(m / max(p, q)): what is exponentiated is never positive, and nothing cancels where p and q are close.
        smaller = torch.full_like(log_ratio, 1 - beta).masked_fill_(log_ratio > 0, beta)  # weight of the smaller one
        common = smaller.mul_(torch.expm1(log_ratio.abs().neg_())).log1p_()
        m = torch.lerp(q, p, beta)
        value = beta * kl(p, m, common + log_ratio.clamp(min=0))[0]
        h = common.neg_().add_(log_ratio.clamp_(max=0))  # log(q / m)
        value += (1 - beta) * kl(q, m, -h)[0]
        h.mul_(1 - beta)
    if masked:
        h.masked_fill_(q == 0, 0.0)
    return value, h


def _generalised_kl(
    a: Tensor, b: Tensor, log_ratio: Tensor, masked: bool, one_head: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return sum a log(a / b) + (b - a), [R], and b - a, [R, V], in `out`; `log_ratio` is log(b / a)."""
    weighted = a * log_ratio
    if masked:
        weighted.masked_fill_(a == 0, 0.0)  # 0 log 0 = 0
    total = weighted.sum(-1)
    # With one head `log_ratio` is more accurate than probabilities are. On a GPU the host would have to wait.
    if one_head or a.is_cuda or bool((total > -CLOSE).any()):
        difference = torch.maximum(a, b, out=out).mul_(torch.expm1(log_ratio.abs().neg_())).copysign_(log_ratio)
        return torch.sub(difference, weighted, out=weighted).sum(-1).clamp_min_(0), difference
    difference = torch.sub(b, a, out=out)
    return difference.sum(-1) - total, difference
