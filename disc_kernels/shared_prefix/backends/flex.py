"""Run FlexAttention over a packed sequence: the attention function that Hugging Face models call."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from disc_kernels.shared_prefix.backends.inputs import check_call, in_autocast_dtype


def flex_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute one layer's attention, as transformers' `AttentionInterface` defines it.

    Beside what transformers' own function does, it follows autocast on every torch version and compiles for few
    shapes: see `_compiled_flex_attention`.

    Args:
        query: [1, H, L, D].
        key: [1, H_kv, L, D], H a multiple of H_kv.
        value: [1, H_kv, L, D_v].
        attention_mask: of L tokens, from `disc_kernels.shared_prefix.attention_mask`; it holds the layer's window.
        scaling: of the attention logits; None: 1 / sqrt(D).

    Returns:
        [1, L, H, D_v], and None in place of the attention weights.

    Raises:
        ValueError: no block mask, dropout, or an option that FlexAttention lacks.
    """
    check_call("flex", attention_mask, BlockMask, dropout, options)
    query, key, value = in_autocast_dtype(query, key, value)
    for tensor in (query, key, value):
        # The student's heads and the teacher's may differ in number: two static sizes, not one symbolic size.
        torch._dynamo.mark_static(tensor, [0, 1, 3])
    output = _compiled_flex_attention()(
        query,
        key,
        value,
        score_mod=None if softcap is None else _softcapping(softcap),
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=True,
    )
    return output.transpose(1, 2).contiguous(), None


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """Compile FlexAttention when it is first called, and again when a second length shows that lengths vary.

    From then on a new layout compiles nothing: its tensors' sizes are symbolic and its mask function is the same code.
    Each of these stands for a graph of its own: with or without gradients, with or without softcap, one block or more,
    another number of heads.
    """
    return torch.compile(flex_attention)


@cache
def _softcapping(softcap: float) -> Callable[..., Tensor]:
    def softcapped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return softcapped
