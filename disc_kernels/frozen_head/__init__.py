"""Forward KL to a student whose head is frozen, from a summary of the teacher's rows."""

from disc_kernels.frozen_head.inputs import TeacherSummary
from disc_kernels.frozen_head.loss import expected_embedding_kl
from disc_kernels.frozen_head.summary import teacher_summary

__all__ = ["TeacherSummary", "expected_embedding_kl", "teacher_summary"]
