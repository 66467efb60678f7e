"""Which teacher rows are projected: each distinct one once, however many student rows are compared with it.

How many distinct rows an index holds is a question to its values. For an index on an accelerator the host would have
to wait for the answer, so only an index on the CPU is asked; otherwise all rows of the teacher's hidden states are
projected once and kept, where they are few enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from disc_kernels.host import to_device
from disc_kernels.linear_kl.inputs import Problem


class Chunk(NamedTuple):
    """Rows start..stop of the student, compared with projected teacher rows first..last."""

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class TeacherRows:
    """The U teacher rows that are projected, and which of them each of the M student rows is compared with."""

    count: int  # U
    index: Tensor | None  # [U] int64, rows of the teacher's flattened hidden states; None: all of them, in order
    slot: Tensor | None = None  # [M] int64, in 0..U-1; None: row i is compared with projected row i
    host_slot: Tensor | None = None  # the same on the CPU, ascending; None: not known there
    order: Tensor | None = None  # [M] int64, the caller's row that is row i of the sorted problem; None: as they came

    @property
    def kept(self) -> bool:
        """Whether all of them are projected in the first chunk and kept to the end."""
        return self.slot is not None and self.host_slot is None

    def chunks(self, rows: int, chunk_rows: int) -> Iterator[Chunk]:
        """At most `chunk_rows` student rows each, with teacher rows in proportion."""
        if self.host_slot is None:
            for start in range(0, rows, chunk_rows):
                stop = min(start + chunk_rows, rows)
                yield Chunk(start, stop, *((start, stop) if self.slot is None else (0, self.count)))
            return
        teacher_rows = self.teacher_chunk_rows(rows, chunk_rows)
        start = 0
        while start < rows:
            first = int(self.host_slot[start])
            beyond = int(torch.searchsorted(self.host_slot, first + teacher_rows))
            stop = min(start + chunk_rows, beyond)
            yield Chunk(start, stop, first, int(self.host_slot[stop - 1]) + 1)
            start = stop

    def teacher_chunk_rows(self, rows: int, chunk_rows: int) -> int:
        """The most teacher rows that are projected at once."""
        return self.count if self.kept else -(-chunk_rows * self.count // max(rows, 1))

    def in_callers_order(self, x: Tensor) -> Tensor:
        """[M] values of the sorted problem's rows -> of the caller's."""
        return x if self.order is None else torch.empty_like(x).index_copy_(0, self.order, x)

    def in_sorted_order(self, x: Tensor) -> Tensor:
        """[M] values of the caller's rows -> of the sorted problem's."""
        return x if self.order is None else x[self.order]


def share_teacher_rows(problem: Problem, host_index: Tensor | None, most_kept_rows: int) -> tuple[Problem, TeacherRows]:
    """The problem, its rows sorted where that brings equal teacher rows together, and the teacher rows to project.

    Args:
        host_index: [M] int64 on the CPU, the values of `problem.teacher.index`; None: they are not known there.
        most_kept_rows: how many projected teacher rows there is room for besides a chunk.
    """
    teacher, rows = problem.teacher, problem.rows
    if host_index is not None:
        distinct, slot = torch.unique(host_index, return_inverse=True)
        if len(distinct) < rows:
            return _sorted_by_slot(problem, distinct, slot)
    elif teacher.index is not None and teacher.hidden_rows <= min(most_kept_rows, rows // 2):
        return problem, TeacherRows(teacher.hidden_rows, None, slot=teacher.index)
    return problem, TeacherRows(rows, teacher.index)


def _sorted_by_slot(problem: Problem, distinct: Tensor, slot: Tensor) -> tuple[Problem, TeacherRows]:
    order = None
    if bool((slot[1:] < slot[:-1]).any()):
        slot, host_order = slot.sort(stable=True)
        order = to_device(host_order, problem.device)
        student, teacher, weight = problem.student, problem.teacher, problem.row_weight
        assert teacher.index is not None
        problem = replace(
            problem,
            student=replace(student, index=order if student.index is None else student.index[order]),
            teacher=replace(teacher, index=teacher.index[order]),
            row_weight=None if weight is None else weight[order],
        )
    index, device_slot = to_device(distinct, problem.device), to_device(slot, problem.device)
    return problem, TeacherRows(len(distinct), index, device_slot, host_slot=slot, order=order)
