"""Give Hugging Face models the attention and the masks that packed sequences need.

Nothing here imports transformers before it has to register an attention function with it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from disc_kernels.shared_prefix.backends.flex import flex_attention_forward
from disc_kernels.shared_prefix.backends.varlen import VarlenMask, find_kernel, varlen_attention_forward, varlen_mask
from disc_kernels.shared_prefix.choice import choose_attention
from disc_kernels.shared_prefix.hf_config import (
    attention_dropout,
    attention_softcap,
    can_share,
    layer_windows,
    model_name,
)
from disc_kernels.shared_prefix.layout import SharedPrefixLayout
from disc_kernels.shared_prefix.masks import block_mask, check_rows, has_one_sequence_per_row, row_masks

Mask = Tensor | BlockMask | VarlenMask

# The names under which transformers finds our functions.
FLEX = "shared_prefix_flex"
VARLEN = "shared_prefix_varlen"


def attention_implementation(
    config: Any, requested: str = "auto", device_type: str = "cpu", flex_saving: float | None = None
) -> str:
    """Return the transformers `attn_implementation` that runs this model right on a packed sequence.

    "sdpa" takes dense masks: any device, memory quadratic in a row's length. "flex" takes block masks: memory linear in
    the sequence's length; it is compiled at the first calls and has no backward on the CPU. "varlen" is flash attention
    on gathered keys: 16 bits, CUDA only. Neither of the last two can drop attention weights out. "auto" is what
    `choose_attention` chooses; never "varlen", which rounds to 16 bits and copies a trunk for every branch.

    Args:
        config: the model's config.
        requested: "auto", "sdpa", "flex" or "varlen".
        device_type: the type of the device that the model runs on.
        flex_saving: of `disc_kernels.shared_prefix.flex_saving`; None: nothing is known of the batches.

    Returns:
        "sdpa"; "eager", which "auto" gives in its place where attention logits are softcapped (Gemma 2), since
        `scaled_dot_product_attention` would leave that out; or the name of our own attention function, which has then
        been registered with transformers.

    Raises:
        ValueError: an unknown name; what was asked for cannot do the model's softcap or attention dropout; "varlen"
            without a CUDA device.
    """
    if requested not in ("auto", "sdpa", "flex", "varlen"):
        raise ValueError(f"attention: expected 'auto', 'sdpa', 'flex' or 'varlen', got {requested!r}")
    wanted = choose_attention(config, device_type, flex_saving).implementation if requested == "auto" else requested
    if wanted in ("flex", "varlen") and attention_dropout(config):
        raise ValueError(
            f"attention: {wanted!r} cannot drop out attention weights, expected a {model_name(config)} config"
            f" with an attention dropout of 0, got {attention_dropout(config)}; set it to 0, or use 'sdpa'"
        )
    if wanted == "varlen":
        find_kernel(attention_softcap(config), device_type)
        return _register(VARLEN, varlen_attention_forward)
    if wanted == "flex":
        return _register(FLEX, flex_attention_forward)
    if wanted == "sdpa" and attention_softcap(config) is not None:
        raise ValueError(
            f"attention: 'sdpa' leaves out the softcap of attention logits of {model_name(config)} models"
            f" (attn_logit_softcapping={attention_softcap(config)}); expected 'auto' or 'flex'"
        )
    return wanted


def attention_mask(
    config: Any,
    layout: SharedPrefixLayout,
    implementation: str,
    dtype: torch.dtype = torch.float32,
    rows: int = 1,
) -> Mask | dict[str, Mask] | None:
    """Make a model's `attention_mask`, which goes with `position_ids=layout.position_ids.view(rows, N)`.

    Args:
        config: the model's config. Sliding windows are taken from it: a branch's token sees as far back as it would if
            its trunk's first part and the branch were a sequence of their own.
        layout: the tokens of all rows, one row after another, N each, on the model's device.
        implementation: the model's `attn_implementation`, from `attention_implementation`.
        dtype: of the additive mask, the model's own; only "eager" uses it.
        rows: of the batch. More than one for "sdpa" and "eager" only, whose masks grow with N^2.

    Returns:
        For "sdpa" a bool tensor [rows, 1, N, N], True where a query sees a key; for "eager" a tensor of that shape and
        `dtype`, 0 where it does and -inf elsewhere; for "flex" a `BlockMask`, for "varlen" a `VarlenMask`. If the
        model's layers are of several types: a dict of masks by layer type, which its `forward` takes instead of one.
        None, with which a model is called without `position_ids` as well, where causal attention is all it takes: for
        "sdpa" and "eager" where every row is one sequence, and for a model that cannot share a trunk, whose rows hold
        one sequence each and padding to the right, which no token before it sees.

    Raises:
        ValueError: an unknown implementation; a tree in two rows; several rows with "flex" or "varlen"; a tree with
            branches, or more than a sequence and its padding in a row, for a model that cannot share a trunk; a sliding
            layer type in a config without `sliding_window`.
    """
    if not can_share(config):
        _check_padded_sequences(config, layout, rows)
        return None
    if implementation in ("sdpa", "eager") and has_one_sequence_per_row(layout, rows):
        return None
    windows = dict(layer_windows(config))
    masks = {layer_type: _mask(layout, implementation, window, dtype, rows) for layer_type, window in windows.items()}
    return masks if len(masks) > 1 else masks.popitem()[1]


def _check_padded_sequences(config: Any, layout: SharedPrefixLayout, rows: int) -> None:
    """Raise ValueError unless each row is one sequence and at most one tree of padding, for a model of such rows."""
    check_rows(layout, rows)
    first, _, tree, _ = layout.segments.unbind(1)
    trees_in_row = (tree * rows // max(len(layout), 1)).bincount(minlength=rows)
    if (first != tree).any():
        got = f"a tree of several segments that begins at token {int(tree[first != tree][0])}"
    elif (trees_in_row > 2).any():
        got = f"{int(trees_in_row.max())} trees in row {int(trees_in_row.argmax())}"
    else:
        return
    raise ValueError(
        f"{model_name(config)} models cannot share a trunk: expected one sequence a row and a tree of its padding,"
        f" got {got}"
    )


def _mask(layout: SharedPrefixLayout, implementation: str, window: int | None, dtype: torch.dtype, rows: int) -> Mask:
    if implementation in (FLEX, VARLEN):
        if rows != 1:
            raise ValueError(f"rows: expected 1 with attention {implementation!r}, got {rows}")
        return block_mask(layout, window=window) if implementation == FLEX else varlen_mask(layout, window=window)
    if implementation not in ("sdpa", "eager"):
        raise ValueError(f"implementation: expected 'sdpa', 'eager', {FLEX!r} or {VARLEN!r}, got {implementation!r}")
    visible = row_masks(layout, rows, window=window)[:, None]
    if implementation == "sdpa":
        return visible
    # Every query sees itself, so that -inf never fills a row.
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))


def _register(implementation: str, function: Callable[..., tuple[Tensor, None]]) -> str:
    from transformers import AttentionInterface

    AttentionInterface.register(implementation, function)
    return implementation
