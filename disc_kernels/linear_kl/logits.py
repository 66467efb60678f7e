"""Compute both models' logits of one chunk of rows after the other, in the same memory."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from disc_kernels.linear_kl.inputs import Problem
from disc_kernels.linear_kl.products import project, take_rows, to_product_dtype, with_copied_weight
from disc_kernels.linear_kl.teacher_rows import Chunk
from disc_kernels.linear_kl.workspace import Plan


class Logits:
    """Hold the memory for the logits of one chunk of a problem's rows, and fill it chunk by chunk, in order."""

    def __init__(self, problem: Problem, plan: Plan):
        teacher_rows, new = problem.teacher_rows, problem.student.hidden.new_empty
        self.problem, self.tile_rows = problem, plan.tile_rows
        self.student, self.teacher = problem.student, replace(problem.teacher, index=teacher_rows.index)
        if plan.copy_weights:
            self.student, self.teacher = with_copied_weight(self.student), with_copied_weight(self.teacher)
        self.chunks = list(teacher_rows.chunks(problem.rows, plan.chunk_rows))
        most_student = max((chunk.stop - chunk.start for chunk in self.chunks), default=0)
        most_teacher = max((chunk.last - chunk.first for chunk in self.chunks), default=0)
        self.student_buffer = new(most_student, plan.row_stride, dtype=problem.accumulate_dtype)
        teacher_stride = 0 if self.teacher.ids is not None else plan.row_stride
        self.teacher_buffer = new(most_teacher, teacher_stride, dtype=problem.accumulate_dtype)
        self.projected: tuple[int, int] | None = None

    def of(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the chunk's logits without bias until the next call, and which teacher row each row is compared with.

        Returns:
            The student's, `[R, V]`, less the teacher's if `problem.one_head`; the teacher's, `[U, V]`, in the same
            memory and with the same values as before where the chunk before had the same teacher rows; `[R]` int64
            rows of them, or None: U = R, in order. Of a top k instead its log-probabilities and its ids, `[R, K]`.
        """
        start, stop, first, last = chunk
        problem, vocab_size = self.problem, self.problem.vocab_size
        student = self.student_buffer[: stop - start, :vocab_size]
        hidden = to_product_dtype(take_rows(problem.student, start, stop), problem.student)
        if problem.one_head:
            hidden = hidden - to_product_dtype(take_rows(problem.teacher, start, stop), problem.teacher)
        project(self.student, hidden, self.tile_rows, student)
        if self.teacher.ids is not None:
            ids = take_rows(replace(self.teacher, hidden=self.teacher.ids), first, last)
            return student, take_rows(self.teacher, first, last), ids
        teacher = self.teacher_buffer[: last - first, :vocab_size]
        if self.projected != (first, last):
            teacher_hidden = take_rows(self.teacher, first, last)
            if not self.teacher.is_given:
                teacher_hidden = to_product_dtype(teacher_hidden, self.teacher)
            project(self.teacher, teacher_hidden, self.tile_rows, teacher)
            self.projected = first, last
        inverse_index = problem.teacher_rows.inverse_index
        return student, teacher, None if inverse_index is None else inverse_index[start:stop] - first
