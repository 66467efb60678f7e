"""Divide models over the processes (FSDP2).

PyTorch gathers a module's parameters when its forward is called, and reduces and divides their gradients after it. The
loss takes a head's weight without calling the head, and a model's decoder without calling the model, so both run by way
of `disc_kernels.hf.forward.run_as_forward`.
"""

from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from disc_train.models.adapters import has_adapters
from disc_train.models.pretrained import quantised_by


def shard(model: PreTrainedModel, accelerator: Accelerator, *, trained: bool) -> None:
    """Divide a model's parameters over the processes, in place, as accelerate was told to.

    In mixed precision what is trained is kept in float32 and gathered in 16 bits; gradients are summed in float32. What
    is not trained keeps its dtype. The head, which accelerate groups with the last norm, stays whole until its backward
    pass. Raises ValueError for the older FSDP, and for quantised weights.
    """
    if method := quantised_by(model):  # PyTorch divides neither torchao's weights nor those of bitsandbytes
        raise ValueError(
            f"--fsdp: expected weights that can be divided over the processes, got some that are quantised ({method}):"
            " leave it out, and each process holds the whole quantised model"
        )
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
    if trained and has_adapters(model):  # they are small enough to be saved whole
        plugin.set_state_dict_type("FULL_STATE_DICT")


def free_gathered_parameters(model: nn.Module) -> None:
    """Free the whole parameters that forward passes without a backward pass leave behind.

    They would outlive new values of the parts they were gathered from.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_part(parameter: Tensor) -> Tensor:
    """Return the part of a parameter that this process holds; all of it where it is not divided."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
