"""Fused linear + divergence: KL between teacher and student logits that are never materialised."""

from disc_kernels.linear_kl.api import FusedSuffixKLLoss, fused_suffix_kl
from disc_kernels.linear_kl.cross_entropy import fused_cross_entropy
from disc_kernels.linear_kl.inputs import LogitTransform, OutputHead, SuffixKLStats
from disc_kernels.linear_kl.topk import fused_topk_kl

__all__ = [
    "FusedSuffixKLLoss",
    "LogitTransform",
    "OutputHead",
    "SuffixKLStats",
    "fused_cross_entropy",
    "fused_suffix_kl",
    "fused_topk_kl",
]
