"""Freeze the lowest layers of a model, and its embeddings."""

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from disc_kernels.hf.forward import decoder_of


def freeze_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """Train a model's embeddings and its lowest `count` layers no more, nor an output head that is tied to those.

    Raises:
        ValueError: the model has no list of layers that could be found, or no layer above them.
    """
    decoder = decoder_of(model)
    layers = _layers(decoder)
    if count >= len(layers):
        raise ValueError(f"--freeze_layers: expected fewer than the {len(layers)} layers of the model, got {count}")
    layers[:count].requires_grad_(False)
    above = {*layers[count:].modules()}  # there embeddings are of what is between tokens
    for module in decoder.modules():
        if isinstance(module, nn.Embedding) and module not in above:
            module.requires_grad_(False)
    return model


def _layers(decoder: nn.Module) -> nn.ModuleList:
    """Find the list of layers: every one is of transformers' class for what can be checkpointed."""
    found = [
        module
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(each, GradientCheckpointingLayer) for each in module)
    ]
    if len(found) != 1:
        raise ValueError(
            f"--freeze_layers: expected a model with one list of layers, got {len(found)} in {type(decoder).__name__}"
        )
    return found[0]
