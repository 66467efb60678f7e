"""Pack many continuations of one text into one sequence that reads the shared part once."""

from disc_kernels.shared_prefix.attention import FLEX, VARLEN, attention_implementation, attention_mask
from disc_kernels.shared_prefix.choice import choose_attention, flex_saving
from disc_kernels.shared_prefix.hf_config import can_share
from disc_kernels.shared_prefix.layout import SharedPrefixLayout
from disc_kernels.shared_prefix.masks import block_mask, dense_mask

__all__ = [
    "FLEX",
    "VARLEN",
    "SharedPrefixLayout",
    "attention_implementation",
    "attention_mask",
    "block_mask",
    "can_share",
    "choose_attention",
    "dense_mask",
    "flex_saving",
]
