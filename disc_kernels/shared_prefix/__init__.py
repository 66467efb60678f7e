"""Trunk-and-branches layouts: many continuations of one text in one packed sequence, the shared part read once."""

from disc_kernels.shared_prefix.attention import attention_implementation, attention_mask
from disc_kernels.shared_prefix.layout import SharedPrefixLayout
from disc_kernels.shared_prefix.masks import block_mask, dense_mask

__all__ = ["SharedPrefixLayout", "attention_implementation", "attention_mask", "block_mask", "dense_mask"]
