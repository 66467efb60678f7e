"""Hold the arguments of the frozen-head calls as they were given, and the checked problems they pose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from disc_kernels.linear_kl.inputs import LogitTransform, Projection


class TeacherSummary(NamedTuple):
    """Hold what is kept of M teacher rows: D + 2 numbers each, float32 (float64 for float64 inputs), detached.

    Choose rows with `TeacherSummary(*(x[rows] for x in summary))`; save with `torch.save(summary._asdict(), path)`,
    load with `TeacherSummary(**torch.load(path))`.

    Attributes:
        embedding: `[M, D_s]`, sum_v p_v W_s[v], the student's output embedding that the teacher expects.
        entropy: `[M]`, nats, of the teacher's p = softmax(logits / T).
        bias: `[M]`, sum_v p_v b_s[v], 0 without a bias.
    """

    embedding: Tensor
    entropy: Tensor
    bias: Tensor


@dataclass(frozen=True)
class SummaryInputs:
    """Hold the arguments of one `teacher_summary` call, but for its group, before any check."""

    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_index: Tensor | None
    temperature: float
    teacher_transform: LogitTransform | None
    vocab_size: int | None
    max_workspace_bytes: int | None
    impl: str | None
    autocast_dtype: torch.dtype | None  # of the autocast that is on around the call


@dataclass(frozen=True)
class LossInputs:
    """Hold the arguments of one `expected_embedding_kl` call, but for its group, before any check."""

    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    summary: TeacherSummary
    student_index: Tensor | None
    summary_index: Tensor | None
    row_weight: Tensor | None
    temperature: float
    reduction: str
    student_scale: float
    vocab_size: int | None
    max_workspace_bytes: int | None
    return_stats: bool
    impl: str | None
    autocast_dtype: torch.dtype | None


@dataclass(frozen=True)
class SummaryProblem:
    """Hold the teacher's rows and the frozen head that are summarised over the same entries."""

    teacher: Projection
    head: Projection  # the student's; it has no rows
    temperature: float


@dataclass(frozen=True)
class LossProblem:
    """Hold M student rows, each compared with one row of a summary."""

    student: Projection
    summary: TeacherSummary
    summary_index: Tensor | None  # [M] int64; None: all rows, in order
    temperature: float
    row_factor: Tensor  # [M]: the derivative of the loss in each row's divergence
    statistics: bool

    @property
    def logit_factor(self) -> float:
        """Return the derivative of a logit over T in the head's output."""
        return self.student.transform.scale / self.temperature
