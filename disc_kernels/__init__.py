"""Fused linear + KL losses and shared-prefix attention masks for context distillation."""

from disc_kernels.linear_kl import FusedSuffixKLLoss, LogitTransform, SuffixKLStats, fused_suffix_kl
from disc_kernels.shared_prefix import SharedPrefixLayout, block_mask, dense_mask

__all__ = [
    "FusedSuffixKLLoss",
    "LogitTransform",
    "SharedPrefixLayout",
    "SuffixKLStats",
    "block_mask",
    "dense_mask",
    "fused_suffix_kl",
]
