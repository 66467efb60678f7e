"""Freeze a model's output head, and tell whether it is frozen."""

from torch import nn
from transformers import PreTrainedModel


def freeze_head(model: PreTrainedModel) -> PreTrainedModel:
    """Train a model's output head no more; where its weight is the embeddings' (tied), neither are those."""
    _head(model).requires_grad_(False)
    return model


def head_is_frozen(model: PreTrainedModel) -> bool:
    """Tell whether nothing of a model's output head is trained; adapters that it has itself count."""
    return not any(parameter.requires_grad for parameter in _head(model).parameters())


def head_is_tied(model: PreTrainedModel) -> bool:
    """Tell whether the output head's weight is that of the input embeddings."""
    return _head(model).weight is model.get_input_embeddings().weight


def _head(model: PreTrainedModel) -> nn.Module:
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__}: expected a causal language model with an output head, got none")
    return head
