"""Statistics of rows whose vocabulary is divided into parts, and the function that makes one part of several.

A part is a range of entries that one program of `stream_triton.py` has seen, or the shard of a rank, of which
`vocab_group.py` merges the normalisers alone. It describes its own entries as if there were no others: the normaliser
of each model, and divergence and entropies of the two distributions conditioned on the part. With P_i and Q_i the
shares of part i in the two whole distributions, the chain rule (Cover and Thomas 2006, theorems 2.2.1 and 2.5.3) gives
the whole without approximation:

    KL(p || q) = sum_i P_i (KL_i + log P_i - log Q_i)        H(p) = sum_i P_i (H_i - log P_i)

Everything is measured from its own part's maximum, so nothing overflows and no digits are lost where logits lie far
from zero. The Jensen-Shannon divergence has no such rule: its mixture needs both models' normalisers over the whole
vocabulary before its first term.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from disc_kernels.linear_kl.problem import SuffixKLStats

MERGEABLE = ("forward_kl", "reverse_kl")


class VocabPart(NamedTuple):
    """Rows over a part of the vocabulary, each `[..., R]`, float32 or float64.

    Where a model has no entry in the part, or none that a bias of -inf left possible, its maximum is -inf and its sum
    0; what the divergence and its entropy are then does not matter, as long as they are not NaN. The last three are
    None where no statistics are asked for.
    """

    student_maximum: Tensor  # largest student logit / T
    student_sum: Tensor  # sum of exp(student logit / T - student_maximum)
    teacher_maximum: Tensor
    teacher_sum: Tensor
    divergence: Tensor  # nats, of the distributions conditioned on the part
    student_entropy: Tensor | None = None  # nats, of the student's distribution conditioned on the part
    teacher_entropy: Tensor | None = None
    agreement: Tensor | None = None  # 1.0 where both models' largest logit of the part is the same entry, else 0.0


def merge(parts: VocabPart, divergence: str, dim: int = 0) -> VocabPart:
    """The part that all parts along `dim` make up, in vocabulary order: `[..., n, ...]` to `[..., ...]`.

    Associative up to rounding, so parts may be merged in any grouping. Computed in float64, where the shares sum to one
    to 1e-16, so that the plain formula has nothing to cancel: rows that agree up to rounding stay at the divergences of
    their parts. No host synchronisation.

    Raises:
        ValueError: `divergence` is not one of `MERGEABLE`.
    """
    if divergence not in MERGEABLE:
        raise ValueError(f"divergence: expected one of {', '.join(MERGEABLE)}, which merge, got {divergence!r}")
    dtype = parts.divergence.dtype
    student_maximum, student_sum, log_q = merge_normalisers(parts.student_maximum, parts.student_sum, dim)
    teacher_maximum, teacher_sum, log_p = merge_normalisers(parts.teacher_maximum, parts.teacher_sum, dim)
    log_a, log_b = (log_p, log_q) if divergence == "forward_kl" else (log_q, log_p)
    merged = VocabPart(
        student_maximum,
        student_sum.to(dtype),
        teacher_maximum,
        teacher_sum.to(dtype),
        expectation(log_a, parts.divergence + log_a - log_b, dim).to(dtype),
    )
    if parts.student_entropy is None or parts.teacher_entropy is None or parts.agreement is None:
        return merged
    # The whole's largest logit is that of the first part whose maximum is the largest.
    student_best, teacher_best = (m.argmax(dim, keepdim=True) for m in (parts.student_maximum, parts.teacher_maximum))
    same_entry = parts.agreement.gather(dim, student_best)
    return merged._replace(
        student_entropy=expectation(log_q, parts.student_entropy - log_q, dim).to(dtype),
        teacher_entropy=expectation(log_p, parts.teacher_entropy - log_p, dim).to(dtype),
        agreement=torch.where(student_best == teacher_best, same_entry, 0.0).squeeze(dim),
    )


def finish(whole: VocabPart) -> SuffixKLStats:
    """What the part that is the whole vocabulary says of its rows, each `[..., R]`; NaN what was not asked for.

    The divergence is NaN where a model has no possible entry, as its softmax is. Rounding may leave a divergence of
    nothing just below zero, which becomes zero; NaN stays NaN.
    """
    possible = (whole.student_sum != 0) & (whole.teacher_sum != 0)
    divergence = whole.divergence.clamp_min(0).masked_fill_(~possible, torch.nan)
    unasked = torch.full_like(divergence, torch.nan)
    rest = (whole.student_entropy, whole.teacher_entropy, whole.agreement)
    return SuffixKLStats(divergence, *(unasked if x is None else x for x in rest))


def merge_normalisers(maximum: Tensor, total: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(the parts' common maximum, their sum above it, float64, the logarithm of each part's share, float64)

    `maximum` and `total` are a model's, of each part along `dim`: ranges of entries, or the shards of ranks.
    """
    top = maximum.amax(dim, keepdim=True)
    base = top.masked_fill(top == -torch.inf, 0.0)  # -inf - -inf would be NaN
    log_part = (maximum.double() - base) + total.double().log()
    whole = log_part.exp().sum(dim, keepdim=True)
    log_share = (log_part - whole.log()).masked_fill_(total == 0, -torch.inf)
    return top.squeeze(dim), whole.squeeze(dim), log_share


def expectation(log_share: Tensor, value: Tensor, dim: int) -> Tensor:
    """Sum of share times value, where a share of 0 counts nothing."""
    share = log_share.exp()
    return (share * value).masked_fill_(share == 0, 0.0).sum(dim)
