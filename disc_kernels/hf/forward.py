"""Find the parts of a causal language model, and run it without its output head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

# By which value of their config models divide what their head is given.
_DIVISORS_OF_HIDDEN = {"inkling_text": "logits_mup_width_multiplier", "minicpm3": "logits_scaling"}


def last_hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """Run a causal language model without its output head; return what the head would have been given, `[..., D]`.

    The model runs as it does by itself, with everything around it: DDP, FSDP2, `torch.compile`, peft, and the autocast
    that accelerate put into its forward. Only the head, called at the end, hands through what it reads.

    Args:
        model: as for `output_head`.
        **inputs: what the model is called with, such as `input_ids`, `attention_mask` and `position_ids`; `labels` are
            left out, since there are no logits.

    Raises:
        ValueError: the model has no output head, or does not call it.
    """
    causal_lm = unwrapped(model)
    head, forward = head_module(causal_lm), causal_lm.forward
    inputs.pop("labels", None)

    def without_head(*args: Any, **kwargs: Any) -> Tensor:
        read: list[Tensor] = []

        def hand_through(hidden: Tensor, **_: Any) -> Tensor:
            read.append(hidden)
            return hidden

        run_as_forward(head, hand_through, *args, wrapper=forward, **kwargs)
        if not read:
            raise ValueError(not_called(causal_lm))
        if isinstance(model, DistributedDataParallel) and torch.is_grad_enabled():
            return _JoinToGraph.apply(read[-1], *(x for x in head.parameters() if x.requires_grad))
        return read[-1]

    # What is returned must be the output of all that wraps the model, whose hooks prepare the backward pass.
    return run_as_forward(causal_lm, without_head, wrapper=model, **inputs)


class _JoinToGraph(torch.autograd.Function):
    """Return hidden states from which the graph also leads to the head's parameters, without a gradient to them.

    DDP with `find_unused_parameters`, transformers.Trainer's default, would take the head for unused and fail when the
    loss, computed outside the model, gives it a gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = len(parameters)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, *[None] * ctx.parameters


def run_as_forward(
    module: nn.Module,
    function: Callable[..., Any],
    *args: Any,
    wrapper: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Run `function(*args, **kwargs)` in place of a module's forward, with all hooks of the module and what wraps it.

    TRL calls this forward redirection. PyTorch's `register_fsdp_forward_method` is not enough: it does nothing for DDP,
    and a head that shares a group of parameters with the last norm has to be called itself before the group is done.

    Args:
        wrapper: what is called, such as DDP around `module`; None: `module`.
    """
    before, bound = module.__dict__.get("forward"), module.forward  # accelerate may have put one there
    module.forward = function
    try:
        return (module if wrapper is None else wrapper)(*args, **kwargs)
    finally:
        if before is not None:
            module.forward = before
        elif torch.compiler.is_compiling():  # which cannot delete what it has only noted to set
            module.forward = bound
        else:
            del module.forward


def unwrapped(model: nn.Module) -> Any:
    """Return the causal language model inside DDP, FSDP or DeepSpeed's engine; other wrappers pass attributes on.

    DeepSpeed's engine passes most on as well, but has a config of its own.
    """
    while not hasattr(type(model), "get_output_embeddings") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    return model


def head_module(model: Any) -> Any:
    """Return the module that makes logits of hidden states.

    Raises:
        ValueError: the model has none.
    """
    plain = getattr(model, "_orig_mod", model)
    plain = plain.get_base_model() if hasattr(plain, "get_base_model") else plain  # of peft, which passes on the rest
    name = type(plain).__name__
    get_head = getattr(model, "get_output_embeddings", None)
    encoder = name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() and not model.can_generate()
    head = None if get_head is None or encoder else get_head()
    if getattr(head, "weight", None) is None:
        got = "an encoder" if encoder else "no such method" if get_head is None else type(head).__name__
        raise ValueError(
            f"{name}: expected a causal language model whose get_output_embeddings() is a linear layer, got {got}"
        )
    return head


def decoder_of(model: Any) -> nn.Module:
    """Return the part of a model that reads text and gives the hidden states that its head takes.

    Raises:
        ValueError: the model has none, or does not say which it is.
    """
    decoder: nn.Module | None = model.get_decoder()
    if decoder in (model, model.get_output_embeddings()):  # Llama 4, ModernBERT: they find no better, or the head
        decoder = getattr(model, "model", None)
    if decoder is None:
        raise ValueError(
            f"{type(model).__name__}: expected a model whose get_decoder() gives the layers below its head, got none:"
            " the loss needs their hidden states, so models of this family cannot be trained or read"
        )
    return decoder


def run_decoder(model: Any, **inputs: Any) -> Tensor:
    """Run the part of a model that reads text, by itself; return what the head is given, `[..., D]`.

    Unlike `last_hidden_states` it leaves out whatever else the model's forward does, such as to masks and images.
    """
    hidden: Tensor = decoder_of(model)(**inputs).last_hidden_state
    divisor = _DIVISORS_OF_HIDDEN.get(model.config.model_type)
    return hidden if divisor is None else hidden / getattr(model.config, divisor)


def not_called(model: nn.Module) -> str:
    """Say that a model's forward left out its head."""
    return f"{type(model).__name__}: expected a model that calls its get_output_embeddings(), got one that does not"
