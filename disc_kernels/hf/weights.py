"""Find what a head's weight does not show: adapters of peft beside it, and what it was before it was quantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.bitsandbytes import dequantize_bnb_weight


def adapters_to_merge(head: Any) -> list[str]:
    """Name the LoRA adapters that peft adds to a head's output.

    Raises:
        ValueError: an adapter adds something that no weight of a linear layer does.
    """
    library, kind = type(head).__module__, type(head).__name__
    if not library.startswith("peft.") or kind == "ModulesToSaveWrapper":
        return []
    if head.merged:
        if head.disable_adapters:
            raise ValueError(
                "the output head: expected adapters that can be left out, got merged ones: unmerge_adapter()"
            )
        return []  # peft then adds no others
    if head.disable_adapters:
        return []
    weights = getattr(head, "lora_A", None)
    active = [name for name in head.active_adapters if weights is None or name in weights]
    for name in active:
        if not isinstance(weights, nn.ModuleDict) or name in head.lora_variant:
            variant = getattr(head, "lora_variant", {}).get(name)
            raise ValueError(
                f"the output head's adapter {name!r}: expected plain LoRA, which can be merged into the weight, got"
                f" {kind if variant is None else type(variant).__name__} of peft; leave the head out of target_modules"
            )
        dropout = getattr(head.lora_dropout[name], "p", 0.0)
        if head.training and dropout:
            raise ValueError(
                f"the output head's adapter {name!r}: expected lora_dropout 0 in training, because a loss takes the"
                f" adapter merged into the weight, got {dropout}; or leave the head out of target_modules"
            )
    return active


def is_quantised(weight: Tensor) -> bool:
    """Tell whether a weight holds other numbers than it stands for; subclasses of torchao claim a float dtype."""
    return not weight.is_floating_point() or weight.dtype.itemsize == 1 or _has_own_dequantize(weight)


def _has_own_dequantize(weight: Tensor) -> bool:
    return type(weight).dequantize is not Tensor.dequantize


@torch.no_grad()
def dequantised(head: Any) -> Tensor:
    """Return the weight [V, D] that a quantised linear layer stands for, without gradients.

    Raises:
        ValueError: it is quantised by neither torchao nor bitsandbytes.
    """
    if _has_own_dequantize(head.weight):
        return head.weight.dequantize()
    weight = dequantize_bnb_weight(head.weight, getattr(head, "state", None))
    if is_quantised(weight):
        raise ValueError(f"the output head: expected one quantised by torchao or bitsandbytes, got {head}")
    return weight
