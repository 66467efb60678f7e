"""Which dtype autocast rounds matrix products to."""

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype of the autocast that is on for `device_type`, or None.

    `torch.amp.is_autocast_available` is not asked, because torch 2.11 cannot trace it; of the devices that tensors
    here live on only "meta" has no autocast.
    """
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)
