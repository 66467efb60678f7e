"""Tiny models with heads that do something to their logits, and their losses from plain logits."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from benchmarks.families import LONG, make_model, tiny_config

IDS = torch.arange(3, 27).view(2, 12)
# Families, with what each does to the output of its head; "mpt" has a scale in its config that it does not use.
FAMILIES = {
    "llama": {},
    "phi": {},  # a bias
    "cohere": {"logit_scale": 0.3},
    "falcon_h1": {"lm_head_multiplier": 3.0},
    "granite": {"logits_scaling": 5.0},
    "hyperclovax": {"logits_scaling": 5.0},
    "mpt": {"logit_scale": 2.0},
    "gemma2": {"final_logit_softcapping": 3.0},
    "modernbert-decoder": {},  # layers between decoder and head
}


def make(family: str = "llama", **options: float) -> PreTrainedModel:
    """Make a model in float64, with something to be seen of its bias."""
    config = tiny_config(family, LONG)
    for name, value in (FAMILIES[family] | options).items():
        setattr(config.get_text_config(), name, value)
    return make_model(config).double()


def perturbed(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model, with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * parameter.std(correction=0) * torch.randn_like(parameter))
    return other


def loss_of_logits(student: nn.Module, teacher: nn.Module) -> Tensor:
    """Compute the mean of KL(teacher || student) from the models' own logits."""
    with torch.no_grad():
        p = log_softmax(teacher(input_ids=IDS).logits.double(), -1)
    q = log_softmax(student(input_ids=IDS).logits.double(), -1)
    return (p.exp() * (p - q)).sum(-1).mean()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Compute the gradients of a loss in all parameters that have one."""
    model.zero_grad()
    loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
