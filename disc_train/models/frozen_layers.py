"""Freeze the lowest layers of a model, and all that a text passes before them."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from disc_kernels.hf.forward import decoder_of
from disc_train.models.parts import parameters_behind, read_a_token


def freeze_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """Train a model's embeddings, its lowest `count` layers and what stands between them no more.

    An output head that is tied to the embeddings is then frozen too, and so are blocks that layers share.

    Raises:
        ValueError: no layer of the model would be trained, or its layers cannot be told from its other parts.
    """
    decoder = decoder_of(model)
    lists = _lists_of_layers(decoder)
    if len(lists) != 1:
        raise ValueError(
            "--freeze_layers: expected a model with one list of layers (transformers' GradientCheckpointingLayer), got"
            f" {len(lists)} in {type(decoder).__name__}: leave it out"
        )
    layers = lists[0]
    if count >= len(layers):
        raise ValueError(f"--freeze_layers: expected fewer than the {len(layers)} layers of the model, got {count}")
    layers[:count].requires_grad_(False)
    above = {*layers[count:].modules()}  # relative positions, say, which belong to their layer
    for module in decoder.modules():
        if isinstance(module, nn.Embedding) and module not in above:
            module.requires_grad_(False)
    for parameter in _parameters_before(model, layers[count]):  # norms and projections of the embeddings
        parameter.requires_grad_(False)
    return model


def count_frozen(model: PreTrainedModel) -> tuple[int, int]:
    """Count the lowest layers of which nothing is trained, and all; (0, 1) where they cannot be told."""
    lists = _lists_of_layers(decoder_of(model))
    if len(lists) != 1:
        return 0, 1
    trained = [any(parameter.requires_grad for parameter in layer.parameters()) for layer in lists[0]]
    return [*trained, True].index(True), len(trained)


def _lists_of_layers(decoder: nn.Module) -> list[nn.ModuleList]:
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return [each for each in lists if all(isinstance(layer, GradientCheckpointingLayer) for layer in each)]


def _parameters_before(model: PreTrainedModel, layer: nn.Module) -> set[nn.Parameter]:
    """Return the trained parameters that what a layer reads of a token depends on."""
    read: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read.extend(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))

    hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
    read_a_token(model)
    hook.remove()
    return parameters_behind(read)
