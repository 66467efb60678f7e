"""Models whose parameters are divided over the processes (FSDP2), and how modules run so that this works.

PyTorch puts a module's parameters together when its forward is called, and reduces and divides their gradients behind
it. Here the loss takes a head's weight without the head's forward, and a model's decoder without the model's; so both
are called by way of these, by `within`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from disc_train.models.adapters import has_adapters


def within(module: nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, run as a module's forward, with all that wraps or hooks it."""
    with patch.object(module, "forward", function):
        return module(*inputs)


def shard(model: PreTrainedModel, accelerator: Accelerator, *, trained: bool) -> None:
    """Divide a model's parameters over the processes, in place, as accelerate was told to.

    In mixed precision what is trained is kept in float32 and gathered in 16 bits; gradients are summed in float32. What
    is not trained keeps its dtype. The head, which accelerate groups with the last norm, stays whole until its backward
    pass.

    Raises:
        ValueError: it was told to by the older FSDP.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version: expected 2, got {plugin.fsdp_version}")
    as_configured = plugin.mixed_precision_policy
    policy = as_configured if trained and as_configured else MixedPrecisionPolicy()
    plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32) if policy.param_dtype else policy
    try:
        fsdp2_prepare_model(accelerator, model)
    finally:
        plugin.mixed_precision_policy = as_configured
    if has_adapters(model):  # so small that checkpoints need no parts
        plugin.set_state_dict_type("FULL_STATE_DICT")


def forget_gathered(model: nn.Module) -> None:
    """Free what forward passes without a backward pass have left whole; it would outlive new values of the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def taking_whole_values(model: nn.Module) -> Iterator[None]:
    """Let `load_state_dict` take whole tensors, which all processes have, for parameters that are divided."""
    parameters, load = dict(model.named_parameters()), model.load_state_dict

    def divided(name: str, value: Tensor) -> Tensor:
        like = parameters.get(name)
        if not isinstance(like, DTensor):
            return value
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    def load_whole(state: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        return load({name: divided(name, value) for name, value in state.items()}, *args, **kwargs)

    with patch.object(model, "load_state_dict", load_whole):
        yield


def own_part(parameter: Tensor) -> Tensor:
    """What this process has of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
