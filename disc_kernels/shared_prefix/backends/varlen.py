"""Run variable-length flash attention over a packed sequence: every trunk and branch as a sequence of its own.

A segment's queries run against the first part of the trunk that it sees and the segment itself, gathered one behind the
other; the mask is causal, aligned at the last query and last key. Gathered keys and values cost memory in proportion
to K, the sum of attach + length over the segments, in a layer's backward once more.
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
from disc_kernels.shared_prefix.backends.inputs import check_call, in_autocast_dtype
from disc_kernels.shared_prefix.layout import SharedPrefixLayout


class VarlenMask(Tensor):
    """Hold which keys each segment's queries run against, for S segments, L queries and K gathered keys.

    Models hand it on to their attention layers because it is a tensor of four dimensions, [1, 1, 1, K]; from anything
    else they would make a mask of their own. What counts are the attributes; any operation on the tensor loses them.
    """

    key_index: Tensor  # [K] int64: the packed token of each gathered key
    query_ends: Tensor  # [S + 1] int32: where each segment's queries begin, and L
    key_ends: Tensor  # [S + 1] int32: where each segment's gathered keys begin, and K
    max_queries: int  # of one segment
    max_keys: int
    window: int | None


def varlen_mask(layout: SharedPrefixLayout, *, window: int | None = None) -> VarlenMask:
    """Describe a layout's segments as variable-length attention takes them; nothing waits for the layout's device.

    With a `window`, as in `disc_kernels.dense_mask`, keys out of every query's reach are not gathered.
    """
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    start, length, tree, attach = layout.segments.unbind(1)
    trunk_keys = attach if window is None else attach.clamp(max=window - 1)
    queries_and_keys = torch.stack([length, trunk_keys + length])
    ends = pad(queries_and_keys.cumsum(1), (1, 0)).int()
    total = int(ends[1, -1])
    max_queries, max_keys = queries_and_keys.amax(1).tolist() if total else (0, 0)

    # Gathered keys are runs of neighbouring tokens, two a segment: gathered key i of a run that begins at token `token`
    # and at gathered key `first` is token + i - first.
    runs = torch.stack([trunk_keys, length], dim=1).flatten()
    token = torch.stack([tree + attach - trunk_keys, start], dim=1).flatten()
    first = runs.cumsum(0) - runs
    runs, shift = to_device(torch.stack([runs, token - first]), layout.device)
    index = torch.arange(total, device=layout.device) + shift.repeat_interleave(runs, output_size=total)

    mask = index[None, None, None].as_subclass(VarlenMask)
    mask.key_index = index
    mask.query_ends, mask.key_ends = to_device(ends, layout.device)
    mask.max_queries, mask.max_keys, mask.window = max_queries, max_keys, window
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
    """Compute one layer's attention, with the arguments and results of `flex_attention_forward`.

    The kernels compute in 16 bits: outside autocast, float32 inputs are rounded to bfloat16 for them.

    Raises:
        ValueError: no mask of `varlen_mask`, dropout, an option that the kernels lack, or there is no kernel.
    """
    check_call("varlen", attention_mask, VarlenMask, dropout, options)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in in_autocast_dtype(query, key, value))
    kernel = find_kernel(softcap, query.device.type)
    key, value = (_gather(tensor, attention_mask.key_index) for tensor in (key, value))
    output = kernel(query, key, value, attention_mask, scaling, softcap)
    return output[None].to(query.dtype), None


def _gather(tokens: Tensor, index: Tensor) -> Tensor:
    """Gather tokens [L, H, D] by index [K] in float32, in which the backward sums a trunk token's many gradients."""
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32)).index_select(0, index).to(tokens.dtype)


Kernel = Callable[[Tensor, Tensor, Tensor, VarlenMask, float | None, float | None], Tensor]


@cache
def find_kernel(softcap: float | None, device_type: str) -> Kernel:
    """Find a kernel: (query [L, H, D], gathered key and value [K, H_kv, D], mask, scaling, softcap) -> [L, H, D].

    It is torch's `varlen_attn`, or flash-attn for a softcap, which that lacks. Raises ValueError where there is none.
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

    query, key, value = _to_16_bits(query, key, value)
    output = varlen_attn(
        query,
        key,
        value,
        mask.query_ends,
        mask.key_ends,
        mask.max_queries,
        mask.max_keys,
        scale=scaling,
        window_size=_window_size(mask),
        **_grouped_heads(),
    )
    assert isinstance(output, Tensor)  # it returns more if asked to
    return output


@cache
def _grouped_heads() -> dict[str, Any]:
    """Return the flag for fewer heads of keys than of queries; torch 2.11 has none and takes them as they are."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _flash_attn_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: VarlenMask, scaling: float | None, softcap: float | None
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        *_to_16_bits(query, key, value),
        mask.query_ends,
        mask.key_ends,
        mask.max_queries,
        mask.max_keys,
        softmax_scale=scaling,
        causal=True,
        window_size=_window_size(mask),
        softcap=softcap or 0.0,
    )


def _window_size(mask: VarlenMask) -> tuple[int, int]:
    """Return how many keys a query sees on the left and on the right of its own; -1: all."""
    return (-1 if mask.window is None else mask.window - 1, 0)


def _to_16_bits(*tensors: Tensor) -> list[Tensor]:
    return [tensor if tensor.dtype == torch.float16 else tensor.to(torch.bfloat16) for tensor in tensors]
