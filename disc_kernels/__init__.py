"""Fused linear + KL losses and shared-prefix attention masks for context distillation."""

from disc_kernels.frozen_head import TeacherSummary, expected_embedding_kl, teacher_summary
from disc_kernels.linear_kl import (
    FusedSuffixKLLoss,
    LogitTransform,
    SuffixKLStats,
    fused_cross_entropy,
    fused_suffix_kl,
    fused_topk_kl,
)
from disc_kernels.shared_prefix import SharedPrefixLayout, block_mask, dense_mask

__all__ = [
    "FusedSuffixKLLoss",
    "LogitTransform",
    "SharedPrefixLayout",
    "SuffixKLStats",
    "TeacherSummary",
    "block_mask",
    "dense_mask",
    "expected_embedding_kl",
    "fused_cross_entropy",
    "fused_suffix_kl",
    "fused_topk_kl",
    "teacher_summary",
]
