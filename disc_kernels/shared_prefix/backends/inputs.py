"""What our attention functions share: the dtype a kernel runs in, and the options that no kernel here has."""

from typing import Any

import torch
from torch import Tensor


def in_autocast_dtype(*tensors: Tensor) -> list[Tensor]:
    """Queries, keys and values in one dtype: autocast's where it is on, their own otherwise.

    A model's linear layers follow autocast, its rotary embedding and norms turn queries and keys back to float32, and
    the kernels are no autocast operations (FlexAttention is one since torch 2.13): they would refuse the mixture, or
    run several times slower in float32.
    """
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    return [tensor.to(dtype) for tensor in tensors]


def refuse_options(backend: str, dropout: float, options: dict[str, Any]) -> None:
    """Raise ValueError for what a model may ask of its attention function and a kernel would leave out.

    Args:
        backend: the name for the message.
        dropout: of the attention weights.
        options: the other keyword arguments of the attention function.
    """
    if dropout:
        raise ValueError(f"attention: {backend!r} has no dropout of attention weights, expected 0, got {dropout}")
    for option, meaning in {"s_aux": "attention sinks", "position_bias": "position bias"}.items():
        if options.get(option) is not None:
            raise ValueError(f"attention: {backend!r} has no {meaning} ({option}), use 'sdpa' or 'auto'")
