"""The row functions of a rank that holds a shard of the vocabulary, in torch: the twin of `shard_rows_triton.py`.

The formulas stand in `rows_torch.py`; each is a sum over the vocabulary once the normalisers of the whole are known,
so a rank sums over its shard and the ranks add up. What they must know together divides the work in three:

    normalise_shard     what the normalisers of the whole vocabulary are made of
    compare_shard       with those: the shard's share of divergence, entropies, mean slope; the gradient of forward KL
    centred_gradient    with the mean slope of the whole vocabulary: the gradient of the other divergences
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from disc_kernels.linear_kl.inputs import Problem, SuffixKLStats
from disc_kernels.linear_kl.rows.torch_backend import (
    BLOCK_ENTRIES,
    divergence_and_slope,
    row_entropy,
    scaled_logits,
)
from disc_kernels.linear_kl.rows.torch_backend import BLOCK_TEMPORARIES as WHOLE_TEMPORARIES

__all__ = ["BLOCK_ENTRIES", "BLOCK_TEMPORARIES", "centred_gradient", "compare_shard", "normalise_shard"]

# Logits and their slope stay while a block is compared.
BLOCK_TEMPORARIES = WHOLE_TEMPORARIES + 3


def normalise_shard(
    student: Tensor,  # [R, V] head outputs without bias
    teacher: Tensor,  # [U, V]
    teacher_slot: Tensor | None,  # [R] int64, the teacher row that each row is compared with; None: U = R, in order
    problem: Problem,
    block_rows: int,
    part: Tensor,  # [4, R] to fill: student's largest logit / T, sum of exp above it, the teacher's two
    *,
    statistics: bool,  # whether the sign of the student's sum tells if both models' largest logit is the same entry
) -> None:
    for rows, u_s, _, u_t in _blocks(student, teacher, teacher_slot, problem, block_rows):
        for row, u in ((0, u_s), (2, u_t)):
            maximum = u.amax(-1, keepdim=True)
            base = maximum.masked_fill(maximum == -torch.inf, 0.0)  # -inf - -inf would be NaN
            part[row, rows] = maximum.squeeze(1)
            part[row + 1, rows] = (u - base).exp_().sum(-1)
        if statistics:
            part[1, rows] *= torch.where(u_s.argmax(-1) == u_t.argmax(-1), 1, -1)


def compare_shard(
    student: Tensor,  # [R, V]; the gradient overwrites it where asked
    teacher: Tensor,  # [U, V]
    teacher_slot: Tensor | None,  # [R] int64
    problem: Problem,
    block_rows: int,
    whole: Tensor,  # [4, R], of the whole vocabulary: student's maximum, log of the sum above it, the teacher's two
    out: SuffixKLStats,  # four [R] tensors: the divergence to fill, and where `statistics` the entropies
    *,
    row_scale: Tensor | None,  # [R] factor on the gradient's rows; None: 1
    gradient: Tensor | None,  # [R, V] to fill, for forward KL; may share memory with `student` row by row
    mean_slope: Tensor | None,  # [R] to fill, for the others
    statistics: bool,
) -> None:
    for rows, u_s, slope, u_t in _blocks(student, teacher, teacher_slot, problem, block_rows):
        lq, lp, gap = _log_probabilities(u_s, u_t, whole[:, rows], problem)
        if statistics:
            out.student_entropy[rows] = row_entropy(lq)
            out.teacher_entropy[rows] = row_entropy(lp)
        out.divergence[rows], h = divergence_and_slope(lq, lp, gap, problem)
        if mean_slope is not None:
            mean_slope[rows] = (lq.exp_() * h).sum(-1)
        if gradient is not None:
            gradient[rows] = _scaled(h, slope, row_scale, rows)


def centred_gradient(
    student: Tensor,  # [R, V]; the gradient overwrites it
    teacher: Tensor,  # [U, V]
    teacher_slot: Tensor | None,  # [R] int64
    problem: Problem,
    block_rows: int,
    whole: Tensor,  # [4, R], of the whole vocabulary
    mean_slope: Tensor,  # [R], of the whole vocabulary
    *,
    row_scale: Tensor | None,  # [R]
    gradient: Tensor,  # [R, V] to fill
) -> None:
    for rows, u_s, slope, u_t in _blocks(student, teacher, teacher_slot, problem, block_rows):
        lq, lp, gap = _log_probabilities(u_s, u_t, whole[:, rows], problem)
        _, h = divergence_and_slope(lq, lp, gap, problem)
        h.sub_(mean_slope[rows].unsqueeze(1)).mul_(lq.exp_())
        gradient[rows] = _scaled(h, slope, row_scale, rows)


def _blocks(
    student: Tensor, teacher: Tensor, teacher_slot: Tensor | None, problem: Problem, block_rows: int
) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor]]:
    """(rows, the student's logits / T, their slope where it is not 1, the teacher's logits / T)"""
    for start in range(0, student.shape[0], block_rows):
        rows = slice(start, start + block_rows)
        z_t = teacher[rows] if teacher_slot is None else teacher.index_select(0, teacher_slot[rows])
        u_s, slope = scaled_logits(student[rows], problem.student, problem.temperature)
        yield rows, u_s, slope, scaled_logits(z_t, problem.teacher, problem.temperature)[0]


def _log_probabilities(u_s: Tensor, u_t: Tensor, whole: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(lq, lp, lq - lp)"""
    maximum_s, log_sum_s, maximum_t, log_sum_t = whole.unsqueeze(2)
    lq = (u_s - maximum_s).sub_(log_sum_s)
    lp = (u_t - maximum_t).sub_(log_sum_t)
    gap = lq - lp
    if problem.student.bias is not None or problem.teacher.bias is not None:
        gap.masked_fill_(lq == lp, 0.0)  # both may be -inf
    return lq, lp, gap


def _scaled(h: Tensor, slope: Tensor | None, row_scale: Tensor | None, rows: slice) -> Tensor:
    if row_scale is not None:
        h.mul_(row_scale[rows].unsqueeze(1))
    return h if slope is None else h.mul_(slope)
