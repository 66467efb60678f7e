"""Attention of Hugging Face models over a packed sequence: which implementation a model needs, and the masks it takes.

Nothing here imports transformers: a config is whatever has its attributes (`layer_types`, `sliding_window`, ...).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from disc_kernels.shared_prefix.layout import SharedPrefixLayout
from disc_kernels.shared_prefix.masks import block_mask, dense_mask

Mask = Tensor | BlockMask


def attention_implementation(config: Any, requested: str = "auto") -> str:
    """The transformers `attn_implementation` that runs this model right on a packed sequence.

    Args:
        config: the model's config.
        requested: "auto" (dense masks), "sdpa" (a dense mask) or "flex" (a block mask: memory linear in the sequence's
            length, but FlexAttention has no backward on the CPU).

    Returns:
        "sdpa", "eager" or "flex_attention". "auto" gives "sdpa", or "eager" for models whose attention logits are
        softcapped (Gemma 2), which `scaled_dot_product_attention` cannot do.

    Raises:
        ValueError: an unknown name, "varlen" (not implemented), or "sdpa" for a model with softcapped attention logits.
    """
    text_config = _text_config(config)
    softcap = getattr(text_config, "attn_logit_softcapping", None)
    if requested == "auto":
        return "sdpa" if softcap is None else "eager"
    if requested == "flex":
        return "flex_attention"
    if requested == "varlen":
        raise ValueError("attention: 'varlen' is not implemented yet; expected 'auto', 'sdpa' or 'flex'")
    if requested != "sdpa":
        raise ValueError(f"attention: expected 'auto', 'sdpa', 'flex' or 'varlen', got {requested!r}")
    if softcap is not None:
        raise ValueError(
            f"attention: 'sdpa' leaves out the softcap of attention logits of {_name(text_config)} models"
            f" (attn_logit_softcapping={softcap}); expected 'auto' or 'flex'"
        )
    return "sdpa"


def attention_mask(
    config: Any, layout: SharedPrefixLayout, implementation: str, dtype: torch.dtype = torch.float32
) -> Mask | dict[str, Mask]:
    """What to pass as `attention_mask` to a Hugging Face model, beside `position_ids=layout.position_ids[None]`.

    Args:
        config: the model's config. Sliding windows are taken from it: a branch's token sees as far back as it would if
            its trunk's first part and the branch were a sequence of their own.
        layout: L packed tokens, on the model's device.
        implementation: the model's `attn_implementation`, from `attention_implementation`.
        dtype: of the additive mask, the model's own; only "eager" uses it.

    Returns:
        One mask of shape [1, 1, L, L]: for "sdpa" a bool tensor, True where a query sees a key; for "eager" a tensor of
        `dtype`, 0 where it does and -inf elsewhere; for "flex_attention" a `BlockMask`. If the model's layers are of
        several types: a dict of masks by layer type, which its `forward` takes instead of one.

    Raises:
        ValueError: an unknown implementation, a layer type that no mask can confine to its branch (linear attention,
            state space, ...), or a sliding layer type in a config without `sliding_window`.
    """
    windows = _layer_windows(_text_config(config))
    masks = {layer_type: _mask(layout, implementation, window, dtype) for layer_type, window in windows.items()}
    return masks if len(masks) > 1 else masks.popitem()[1]


def _mask(layout: SharedPrefixLayout, implementation: str, window: int | None, dtype: torch.dtype) -> Mask:
    if implementation == "flex_attention":
        return block_mask(layout, window=window)
    if implementation not in ("sdpa", "eager"):
        raise ValueError(f"implementation: expected 'sdpa', 'eager' or 'flex_attention', got {implementation!r}")
    visible = dense_mask(layout, window=window)[None, None]
    if implementation == "sdpa":
        return visible
    # Every query sees itself, so that -inf never fills a row.
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))


def _layer_windows(config: Any) -> dict[str, int | None]:
    """The window of each type of layer that the model has; None: no limit."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        if getattr(config, "num_attention_heads", None) is None:
            raise ValueError(f"{_name(config)} models have no attention that a mask could confine to a branch")
        # Without layer types a window holds for all layers (Mistral).
        return {"full_attention": window} if window is None else {"sliding_attention": window}

    for layer_type in layer_types:
        if layer_type not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"{_name(config)} models have layers of type {layer_type!r}, which no mask can confine to a branch;"
                " expected 'full_attention' or 'sliding_attention'"
            )
    if window is None and "sliding_attention" in layer_types:
        raise ValueError(f"sliding_window: expected the window of {_name(config)}'s sliding layers, got None")
    return {layer_type: window if layer_type == "sliding_attention" else None for layer_type in set(layer_types)}


def _text_config(config: Any) -> Any:
    """The language model's part of a composite config (transformers' own accessor), or the config itself."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _name(config: Any) -> str:
    return getattr(config, "model_type", type(config).__name__)
