"""Forward KL to a student whose head is frozen, from a summary of the teacher's rows."""

from disc_kernels.frozen_head.api import TeacherSummary, expected_embedding_kl, teacher_summary

__all__ = ["TeacherSummary", "expected_embedding_kl", "teacher_summary"]
