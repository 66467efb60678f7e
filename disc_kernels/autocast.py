"""Tell which dtype autocast rounds the operands of matrix products to."""

from typing import Any

import torch
from torch import Tensor


def autocast_dtype(x: Any) -> torch.dtype | None:
    """Return the dtype of the autocast that is on for the device of `x`; None without one, or if `x` is no tensor.

    `torch.amp.is_autocast_available` is not asked, because torch 2.11 cannot trace it; of the devices that tensors
    here live on only "meta" has no autocast.
    """
    if not isinstance(x, Tensor) or x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)
