"""Compare the rows of one chunk of student logits with K entries that a teacher named, and with the rest as one.

The vocabulary becomes K + 1 outcomes: the entries that were named, and all others together. The student's logit of the
last is l = logsumexp of the others' logits u = z / T, summed over these alone, so that nothing cancels. The divergence
and its gradient g in the logits of K + 1 outcomes are those of `torch_backend.py`, and a logit of the tail moves its
outcome by its share of it:

    d divergence / d u_k = g_k    for the entries that were named;    g_tail exp(u_v - l)    for every other entry v

What is done on `[R, K + 1]` numbers is done in float64, which costs little beside `[R, V]`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from disc_kernels.linear_kl.inputs import LogitTransform, Problem, SuffixKLStats
from disc_kernels.linear_kl.ranks.group import VocabGroup
from disc_kernels.linear_kl.reference import SMALLEST_TAIL
from disc_kernels.linear_kl.rows.torch_backend import divergence_and_score, scaled_logits


def compare_topk_rows(
    backend: ModuleType,  # rows.torch_backend or rows.triton_backend
    group: VocabGroup | None,
    student: Tensor,  # [R, V] head outputs without bias; overwritten
    logprobs: Tensor,  # [R, K] of the teacher; -inf: no entry
    ids: Tensor,  # [R, K] int64 or int32
    problem: Problem,
    block_rows: int,
    *,
    stats: SuffixKLStats,  # of which the divergence is filled
    statistics: bool,
    row_scale: Tensor | None,  # [R]
    gradient: Tensor | None,  # [R, V] to fill; may be the memory of `student`
) -> None:
    """Fill the divergence, and `gradient` as `compare_rows` of `torch_backend.py` does."""
    listed = logprobs > -torch.inf
    ids = ids.to(torch.int64) - (0 if group is None else group.first)
    here = listed & (ids >= 0) & (ids < problem.vocab_size)  # the others are in another rank's shard
    ids = torch.where(here, ids, 0)
    named, slope = _named_logits(student, ids, here, problem)
    tail = None
    if problem.tail == "bucket":
        wanted = gradient is not None
        tail, total, tail_slope = _normalise_tail(backend, student, ids, here, problem, block_rows, wanted)
    entries, share = problem.vocab_size, torch.ones((), dtype=named.dtype, device=named.device)
    if group is not None:
        entries = group.entries
        named, tail, share = group.merge_outcomes(named, tail)
    log_q, log_p = _outcomes(named, tail, logprobs, listed, entries, SMALLEST_TAIL[problem.divergence])
    log_ratio = (log_q - log_p).masked_fill_(log_q == log_p, 0.0)  # both may be -inf
    q = log_q.exp_()
    stats.divergence[:], score = divergence_and_score(q, log_p.exp_(), log_ratio, problem)
    if gradient is None or problem.vocab_size == 0:
        return
    if problem.divergence != "forward_kl":
        score.sub_((q * score).sum(-1, keepdim=True)).mul_(q)
    if row_scale is not None:
        score.mul_(row_scale.unsqueeze(1))
    if tail is None:
        gradient.zero_()
    else:
        if tail_slope is not None:
            student.mul_(tail_slope)
        factor = torch.where(total == 0, 0.0, score[:, -1] * share / total)
        torch.mul(student, factor.to(student.dtype).unsqueeze(1), out=gradient)
    # What was named has a gradient of 0 so far, and 0 is added to what was not.
    gradient.scatter_add_(1, ids, torch.where(here, score[:, : ids.shape[1]] * slope, 0.0).to(gradient.dtype))


def _named_logits(student: Tensor, ids: Tensor, here: Tensor, problem: Problem) -> tuple[Tensor, Tensor | float]:
    """Return the student's logits / T of the named entries, [R, K], -inf where not `here`; their softcap's gradient."""
    model = problem.student
    if problem.vocab_size == 0:
        return torch.full_like(ids, -torch.inf, dtype=torch.float64), 1.0
    z = student.gather(1, ids).double()
    if model.bias is not None:
        z += model.bias[ids]
    u, slope = scaled_logits(z, replace(model, bias=None), problem.temperature)
    return u.masked_fill(~here, -torch.inf), 1.0 if slope is None else slope


def _normalise_tail(
    backend: ModuleType,
    student: Tensor,
    ids: Tensor,
    here: Tensor,
    problem: Problem,
    block_rows: int,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take the named entries out; return of the others the largest logit and the log of the sum above it, [R, 2].

    Both are -inf where there is none, and apart, since the sum of two numbers may not tell that there is a second one.

    With `weights` the student's logits become multiples of exp(u - logsumexp). Then also returned are what these are to
    be divided by, [R], 0 where there is none, and the gradient of a softcap, [R, V].
    """
    model, slope = problem.student, None
    numbers = student.new_zeros(5, len(student))
    if problem.vocab_size == 0:
        return numbers[:2].T.double() - torch.inf, numbers[4], None
    scale, softcap = model.transform.scale, model.transform.softcap
    if softcap is not None:  # the row functions do not keep its gradient, nor takes its -inf an entry out
        if model.bias is not None:
            student.add_(model.bias[: problem.vocab_size])
        student.mul_(scale / softcap).tanh_()
        slope = student.square().neg_().add_(1) if weights else None
        student.mul_(softcap)
        model, scale = replace(model, bias=None, transform=LogitTransform()), 1.0
    taken_out = torch.where(here, math.copysign(math.inf, -scale), 0.0)
    student.scatter_add_(1, ids, taken_out.to(student.dtype))
    rows = student, model, problem.temperature, block_rows, numbers
    backend.normalise_rows(*rows, student if weights else None, entropy=False)
    return numbers[:2].T.double(), numbers[4], slope


def _outcomes(
    named: Tensor, tail: Tensor | None, logprobs: Tensor, listed: Tensor, entries: int, smallest_tail: float
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the outcomes, student's and teacher's, [R, K + 1], or [R, K] without a tail."""
    logits = logprobs.double()
    if tail is None:
        # Where nothing is listed there is nothing to compare.
        outcomes = (x.log_softmax(-1).masked_fill_(~listed, -torch.inf) for x in (named, logits))
    else:
        # Where a student has no rest either, rounding alone should not say that the teacher has one.
        maximum, log_sum = tail.unbind(1)
        smallest = torch.full_like(maximum, smallest_tail).masked_fill(maximum == -torch.inf, 0.0)
        rest = torch.maximum(1 - logits.exp().sum(-1), smallest)
        rest = torch.where(listed.sum(-1) == entries, 0.0, rest).log()
        largest = torch.maximum(maximum, named.amax(-1))
        largest.masked_fill_(largest == -torch.inf, 0.0)  # -inf - -inf would be NaN
        named, tail = named.sub_(largest.unsqueeze(1)), maximum - largest + log_sum
        pairs = (named, tail), (logits, rest)
        outcomes = (torch.cat([x, y.unsqueeze(1)], 1).log_softmax(-1) for x, y in pairs)
    log_q, log_p = outcomes
    return log_q, log_p
