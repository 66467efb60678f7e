"""Fused linear + divergence: KL between teacher and student logits that are never materialised."""

from disc_kernels.linear_kl.api import FusedSuffixKLLoss, fused_suffix_kl
from disc_kernels.linear_kl.expected_embedding import TeacherSummary, expected_embedding_kl, teacher_summary
from disc_kernels.linear_kl.problem import LogitTransform, SuffixKLStats

__all__ = [
    "FusedSuffixKLLoss",
    "LogitTransform",
    "SuffixKLStats",
    "TeacherSummary",
    "expected_embedding_kl",
    "fused_suffix_kl",
    "teacher_summary",
]
