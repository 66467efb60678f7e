"""Prepare the arguments that Hugging Face models give our attention functions: one dtype, nothing a kernel lacks."""

from typing import Any

from torch import Tensor

from disc_kernels.autocast import autocast_dtype


def in_autocast_dtype(*tensors: Tensor) -> list[Tensor]:
    """Cast queries, keys and values to autocast's dtype where it is on; leave them as they are otherwise.

    A model's linear layers follow autocast, its rotary embedding and norms turn queries and keys back to float32, and
    the kernels are no autocast operations (FlexAttention is one since torch 2.13): they would refuse the mixture, or
    run several times slower in float32.
    """
    dtype = autocast_dtype(tensors[0])
    return [tensor if dtype is None else tensor.to(dtype) for tensor in tensors]


def check_call(backend: str, mask: Any, mask_type: type, dropout: float, options: dict[str, Any]) -> None:
    """Raise ValueError for a mask of another type, and for what a model may ask for and a kernel would leave out."""
    if not isinstance(mask, mask_type):
        raise ValueError(
            f"attention_mask: expected a {mask_type.__name__} of a packed sequence, got {type(mask).__name__};"
            " for other calls of the model: model.set_attn_implementation('sdpa')"
        )
    if dropout:
        raise ValueError(f"attention: {backend!r} has no dropout of attention weights, expected 0, got {dropout}")
    for option, meaning in {"s_aux": "attention sinks", "position_bias": "position bias"}.items():
        if options.get(option) is not None:
            raise ValueError(f"attention: {backend!r} has no {meaning} ({option}), use 'sdpa' or 'auto'")
