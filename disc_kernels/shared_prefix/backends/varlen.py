"""Variable-length flash attention over a packed sequence: every trunk and branch a sequence of its own.

The queries of a segment (a trunk or a branch) run against the first part of the trunk that it sees and the segment
itself, gathered one behind the other; the mask is then causal, aligned at the last query and the last key. The gathered
keys and values of a layer cost memory in proportion to K, the sum of attach + length over the segments, with a window W
of min(attach, W - 1) + length; in the backward they exist once more, as gradients.
"""

import inspect
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from disc_kernels.host import to_device
from disc_kernels.shared_prefix.backends.inputs import in_autocast_dtype, refuse_options
from disc_kernels.shared_prefix.layout import SharedPrefixLayout


class VarlenMask(Tensor):
    """Which keys each segment's queries run against, for S segments, L queries and K gathered keys.

    Models hand it to their attention layers because it is a tensor of four dimensions, [1, 1, 1, K]: others they would
    build anew from. What counts are the attributes; any operation on the tensor loses them.
    """

    gathered: Tensor  # [K] int64: the packed token of each gathered key
    query_ends: Tensor  # [S + 1] int32: where each segment's queries begin, and L
    key_ends: Tensor  # [S + 1] int32: where each segment's gathered keys begin, and K
    most_queries: int  # of one segment
    most_keys: int
    window: int | None


def varlen_mask(layout: SharedPrefixLayout, *, window: int | None = None) -> VarlenMask:
    """The segments of a layout as variable-length attention takes them; nothing waits for the layout's device.

    Args:
        layout: L packed tokens in S segments.
        window: as in `disc_kernels.dense_mask`; the keys out of every query's reach are not gathered.

    Raises:
        ValueError: window below 1.
    """
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    start, length, tree, attach = layout.segments.unbind(1)
    seen = attach if window is None else attach.clamp(max=window - 1)
    queries_and_keys = torch.stack([length, seen + length])
    ends = pad(queries_and_keys.cumsum(1), (1, 0)).int()
    total = int(ends[1, -1])
    most_queries, most_keys = queries_and_keys.amax(1).tolist() if total else (0, 0)

    # Gathered keys are runs of neighbouring tokens, two a segment: key i of a run that begins at token `first` and at
    # gathered key `behind` is token first + i - behind.
    runs = torch.stack([seen, length], dim=1).flatten()
    first = torch.stack([tree + attach - seen, start], dim=1).flatten()
    behind = runs.cumsum(0) - runs
    runs, shift = to_device(torch.stack([runs, first - behind]), layout.device)
    index = torch.arange(total, device=layout.device) + shift.repeat_interleave(runs, output_size=total)

    mask = index[None, None, None].as_subclass(VarlenMask)
    mask.gathered = index
    mask.query_ends, mask.key_ends = to_device(ends, layout.device)
    mask.most_queries, mask.most_keys, mask.window = most_queries, most_keys, window
    return mask


def varlen_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: VarlenMask,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, as transformers' `AttentionInterface` defines it.

    The kernels compute in 16 bits: outside autocast, float32 inputs are rounded to bfloat16 for them.

    Args:
        query: [1, H, L, D].
        key, value: [1, H_kv, L, D], H a multiple of H_kv.
        attention_mask: of L tokens, from `disc_kernels.shared_prefix.attention_mask`; it holds the layer's window.
        scaling: of the attention logits; None: 1 / sqrt(D).

    Returns:
        [1, L, H, D], and None in place of the attention weights.

    Raises:
        ValueError: no mask of `varlen_mask`, dropout, an option that the kernels lack, or there is no kernel.
    """
    if not isinstance(attention_mask, VarlenMask):
        raise ValueError(
            f"attention_mask: expected a VarlenMask of a packed sequence, got {type(attention_mask).__name__};"
            " for other calls of the model: model.set_attn_implementation('sdpa')"
        )
    refuse_options("varlen", dropout, options)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in in_autocast_dtype(query, key, value))
    kernel = find_kernel(softcap, query.device.type)
    key, value = _gather(key, attention_mask.gathered), _gather(value, attention_mask.gathered)
    output = kernel(query, key, value, attention_mask, scaling, softcap)
    return output[None].to(query.dtype), None


def _gather(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens [L, H, D] by index [K], by way of float32: there the backward sums a trunk token's many gradients."""
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32)).index_select(0, index).to(tokens.dtype)


Kernel = Callable[[Tensor, Tensor, Tensor, VarlenMask, float | None, float | None], Tensor]


@cache
def find_kernel(softcap: float | None, device_type: str) -> Kernel:
    """A kernel: (query [L, H, D], gathered key and value [K, H_kv, D], mask, scaling, softcap) -> [L, H, D].

    torch's own `varlen_attn` where it can do what is asked; flash-attn for a softcap, which torch's is built without.

    Raises:
        ValueError: there is none for the device, or none that can do a softcap.
    """
    if device_type != "cuda":
        raise ValueError(f"attention: 'varlen' has no kernel for device type {device_type!r}, only 'cuda'; use 'sdpa'")
    if softcap is None:
        return _torch_kernel
    if find_spec("flash_attn") is None:
        raise ValueError(
            f"attention: 'varlen' cannot softcap attention logits (attn_logit_softcapping={softcap}) unless flash-attn"
            " is installed (pip install flash-attn); expected 'auto' or 'flex'"
        )
    return _flash_attn_kernel


def _torch_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: VarlenMask, scaling: float | None, softcap: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = _in_16_bits(query, key, value)
    output = varlen_attn(
        query,
        key,
        value,
        mask.query_ends,
        mask.key_ends,
        mask.most_queries,
        mask.most_keys,
        scale=scaling,
        window_size=_window_size(mask),
        **_grouped_heads(),
    )
    assert isinstance(output, Tensor)  # it returns more if asked to
    return output


@cache
def _grouped_heads() -> dict[str, Any]:
    """The flag for fewer heads of keys than of queries; without such a flag (torch 2.11) `varlen_attn` takes them."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _flash_attn_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: VarlenMask, scaling: float | None, softcap: float | None
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        *_in_16_bits(query, key, value),
        mask.query_ends,
        mask.key_ends,
        mask.most_queries,
        mask.most_keys,
        softmax_scale=scaling,
        causal=True,
        window_size=_window_size(mask),
        softcap=softcap or 0.0,
    )


def _window_size(mask: VarlenMask) -> tuple[int, int]:
    """(left, right): how many keys a query sees before and behind its own; -1: all."""
    return (-1 if mask.window is None else mask.window - 1, 0)


def _in_16_bits(*tensors: Tensor) -> list[Tensor]:
    return [tensor if tensor.dtype == torch.float16 else tensor.to(torch.bfloat16) for tensor in tensors]
