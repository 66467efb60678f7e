"""Specify the loss: plain torch that materialises the logits. Any dtype, any device, gradients by autograd.

Everything else in this package is held to this file, run in float64.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from disc_kernels.linear_kl.inputs import Problem, Projection, SuffixKLStats
from disc_kernels.linear_kl.reduction import row_factors, weighted_sum

# The least that a teacher leaves beside its top k: 1 less a sum of probabilities, which float32 knows to about 1e-7.
# Without it reverse KL would be infinite wherever rounding made the sum 1. (TRL has it for all divergences.)
SMALLEST_TAIL = {"forward_kl": 0.0, "reverse_kl": 1e-7, "jsd": 0.0}


def reference_suffix_kl(problem: Problem) -> tuple[Tensor, SuffixKLStats]:
    """Compute the loss (scalar, or `[M]` for reduction "none") and its statistics, in nats."""
    student_logits = reference_logits(problem.student)
    if problem.teacher.ids is not None:
        log_q, log_p = _topk_outcomes(problem, F.log_softmax(student_logits / problem.temperature, dim=-1))
        divergence = _divergence(log_p, log_q, problem.divergence, problem.beta)
        return _reduced(problem, divergence), SuffixKLStats(*(divergence.detach(),) * 4)
    teacher_logits = reference_logits(problem.teacher).detach()
    log_q = F.log_softmax(student_logits / problem.temperature, dim=-1)
    log_p = F.log_softmax(teacher_logits / problem.temperature, dim=-1)
    divergence = _divergence(log_p, log_q, problem.divergence, problem.beta)
    with torch.no_grad():
        agreement = student_logits.argmax(-1) == teacher_logits.argmax(-1)
        entropies = reference_entropy(log_q), reference_entropy(log_p)
        stats = SuffixKLStats(divergence.detach(), *entropies, agreement.to(log_q.dtype))
    return _reduced(problem, divergence), stats


def _reduced(problem: Problem, divergence: Tensor) -> Tensor:
    if problem.reduction == "none":
        return divergence
    factors = row_factors(problem.row_weight, problem.rows, problem.reduction, divergence.dtype, problem.device)
    return weighted_sum(divergence, factors)


def _topk_outcomes(problem: Problem, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the outcomes, student's and teacher's, from the student's of all entries [M, V]."""
    teacher = problem.teacher
    assert teacher.ids is not None
    log_p, ids = (x.flatten(0, -2) for x in (teacher.hidden.detach().to(log_q.dtype), teacher.ids.to(torch.int64)))
    if teacher.index is not None:
        log_p, ids = log_p[teacher.index], ids[teacher.index]
    listed = log_p > -torch.inf
    ids = torch.where(listed, ids, 0)
    named = log_q.gather(1, ids).masked_fill(~listed, -torch.inf)
    if problem.tail == "renormalise":
        log_q, log_p = (x.log_softmax(-1) for x in (named, log_p))
        return log_q.masked_fill(~listed, -torch.inf), log_p.masked_fill(~listed, -torch.inf)
    columns = torch.arange(log_q.shape[1], device=log_q.device)
    taken_out = ((ids.unsqueeze(2) == columns) & listed.unsqueeze(2)).any(1)
    all_listed = taken_out.all(1, keepdim=True)
    tail = log_q.masked_fill(taken_out, -torch.inf).masked_fill(all_listed, 0.0).logsumexp(-1, keepdim=True)
    tail = tail.masked_fill(all_listed, -torch.inf)
    smallest = torch.full_like(tail, SMALLEST_TAIL[problem.divergence]).masked_fill(tail == -torch.inf, 0.0)
    rest = torch.maximum(1 - log_p.exp().sum(-1, keepdim=True), smallest).masked_fill(all_listed, 0.0)
    return torch.cat([named, tail], 1).log_softmax(-1), torch.cat([log_p, rest.log()], 1).log_softmax(-1)


def reference_rows(model: Projection) -> Tensor:
    """Return the hidden rows [M, D] as they are multiplied, in the dtype everything accumulates in."""
    hidden = model.hidden.flatten(0, -2)
    hidden = hidden if model.index is None else hidden.index_select(0, model.index)
    return hidden.to(model.operand_dtype).to(model.accumulate_dtype)


def reference_logits(model: Projection) -> Tensor:
    """Compute the logits, [M, vocab_size], in the dtype everything accumulates in."""
    logits = reference_rows(model)
    if not model.is_given:
        with torch.autocast(model.hidden.device.type, enabled=False):
            weight = model.weight[: model.vocab_size].to(model.operand_dtype).to(model.accumulate_dtype)
            logits = logits @ weight.T
    if model.bias is not None:
        logits = logits + model.bias[: model.vocab_size].to(logits.dtype)
    scale, cap = model.transform.scale, model.transform.softcap
    return logits * scale if cap is None else cap * torch.tanh(logits * (scale / cap))


def _divergence(log_p: Tensor, log_q: Tensor, divergence: str, beta: float) -> Tensor:
    """Compute divergences [M] from log-probabilities [M, V] of teacher and student."""
    if divergence == "forward_kl":
        return _kl(log_p, log_q)
    if divergence == "reverse_kl":
        return _kl(log_q, log_p)
    # Where both are -inf the gradient of their mixture is undefined, and nothing of it counts.
    nowhere = (log_p == -torch.inf) & (log_q == -torch.inf)
    weighted = (log_p + math.log(beta), log_q + math.log(1 - beta))
    log_m = torch.logaddexp(*(torch.where(nowhere, 0.0, x) for x in weighted))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Compute KL(a || b) = sum a (log a - log b), with 0 log 0 = 0: an entry without probability counts nothing."""
    masked = log_a.exp() == 0
    log_ratio = torch.where(masked, 0.0, log_a) - torch.where(masked, 0.0, log_b)
    return (log_a.exp() * log_ratio).sum(-1)


def reference_entropy(log_p: Tensor) -> Tensor:
    """Compute entropies [M] in nats from log-probabilities [M, V], with 0 log 0 = 0."""
    return -(log_p.exp() * torch.where(log_p == -torch.inf, 0.0, log_p)).sum(-1)
