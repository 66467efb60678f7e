"""Read a model's output head, and compare it with the model's own logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from disc_kernels.hf.forward import head_module, not_called, run_as_forward, unwrapped
from disc_kernels.hf.weights import adapters_to_merge, dequantised, is_quantised
from disc_kernels.linear_kl.inputs import LogitTransform, OutputHead

# What configs call the factors that logits are multiplied with (Cohere, Falcon-H1, Muse Glimmer) or divided by
# (Granite), and the soft cap that follows (Gemma, xLSTM, Jev).
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling",)
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap")
# Models that multiply by what others divide by, and classes that do nothing to them, whatever their config
# says (MiniCPM3 divides the hidden states).
_MULTIPLIES = {"hyperclovax"}
_DO_NOTHING = {"Gemma3ForConditionalGeneration", "MiniCPM3ForCausalLM", "MptForCausalLM"}


def output_head(model: nn.Module) -> OutputHead:
    """Return the output head of a causal language model, with what the model does to its logits.

    Its tensors are the model's own, so that a loss's gradients reach them. An active LoRA adapter of peft on the head
    is merged, `W + s B A`, with gradients to A and B. Where the teacher is the model with its adapters off, read its
    head while they are off (`with model.disable_adapter()`): a head in `modules_to_save` is another one then. A
    quantised head (torchao, bitsandbytes) is dequantised, without gradients: do so once, outside the loop.

    Args:
        model: a causal language model of transformers, or another model with `get_output_embeddings()` and `config`; it
            may be wrapped by DDP, `torch.compile`, peft or accelerate.

    Returns:
        `OutputHead(weight [V, D], bias [V] or None, transform, vocab_size)`. The transform is what the config says;
        `check_output_head` tells whether the model does so. `vocab_size` is the number of the model's logits.

    Raises:
        ValueError: the model has no such head, as encoders have none; its weight is divided by DeepSpeed's ZeRO-3; an
            adapter other than plain LoRA, or with dropout in training; a quantised head in a model that is trained.
    """
    causal_lm = unwrapped(model)
    head, name = head_module(causal_lm), type(causal_lm).__name__
    adapters = adapters_to_merge(head)
    base = getattr(head, "base_layer", head)
    weight, bias = base.weight, getattr(base, "bias", None)
    if is_quantised(weight):
        if adapters or (torch.is_grad_enabled() and any(x.requires_grad for x in causal_lm.parameters())):
            raise ValueError(
                f"{name}: expected an output head that can be trained, got a quantised one ({type(weight).__name__});"
                " leave the head out of the quantisation, or, where the model is a teacher, freeze it by"
                " model.requires_grad_(False) or read its head under torch.no_grad()"
            )
        weight = dequantised(base)
    if weight.ndim != 2:
        divided = hasattr(weight, "ds_id")
        raise ValueError(
            f"{name}: expected an output head with a weight of shape [V, D], got {list(weight.shape)}"
            + (", a part of ZeRO-3; read and use it inside deepspeed.zero.GatheredParameters" if divided else "")
        )
    for adapter in adapters:
        a, b, scale = head.lora_A[adapter], head.lora_B[adapter], head.scaling[adapter]
        with torch.autocast(weight.device.type, enabled=False):
            weight = weight + (scale * (b.weight @ a.weight)).to(weight.dtype)
        if b.bias is not None:
            bias = scale * b.bias if bias is None else bias + (scale * b.bias).to(bias.dtype)
    config = causal_lm.config.get_text_config()
    entries = min(weight.shape[0], getattr(config, "unpadded_vocab_size", None) or weight.shape[0])
    ignored = any(kind.__name__ in _DO_NOTHING for kind in type(causal_lm).__mro__)
    return OutputHead(weight, bias, LogitTransform() if ignored else _logit_transform(config), entries)


def _logit_transform(config: Any) -> LogitTransform:
    """Read from a config what its model does to its logits."""
    scale = 1.0
    for name in FACTORS:
        scale *= getattr(config, name, None) or 1.0
    for name in DIVISORS:
        factor = getattr(config, name, None) or 1.0
        scale = scale * factor if config.model_type in _MULTIPLIES else scale / factor
    softcaps = [getattr(config, name, None) or None for name in SOFTCAPS]
    return LogitTransform(scale=scale, softcap=next((cap for cap in softcaps if cap is not None), None))


@torch.no_grad()
def check_output_head(model: nn.Module, input_ids: Tensor) -> None:
    """Compare the logits that `output_head` gives on the model's hidden states with the model's own.

    Call it once, before training, with a few tokens: a model may do to its logits what its config does not say.

    Args:
        model: as for `output_head`; its mode, weights and gradients are left alone.
        input_ids: `[batch, length]` int64, on the model's device.

    Raises:
        ValueError: they differ, with the largest difference; or as `output_head`.
    """
    causal_lm = unwrapped(model)
    module, both = head_module(causal_lm), []
    forward = module.forward

    def compute_both(
        hidden: Tensor, **kwargs: Any
    ) -> Tensor:  # here the weight is whole, and autocast as it is for the head
        head = output_head(causal_lm)
        both.append((head, logits_of(head, hidden)))
        return forward(hidden, **kwargs)

    output = run_as_forward(module, compute_both, wrapper=getattr(model, "_orig_mod", model), input_ids=input_ids)
    if not both:
        raise ValueError(not_called(causal_lm))
    head, logits = both[-1]
    check_logits(causal_lm, head, logits, output.logits)


def check_logits(
    model: nn.Module, head: OutputHead, ours: Tensor, theirs: Tensor, tolerance: float | None = None
) -> None:
    """Raise ValueError where logits of a head differ from the model's own by more than `tolerance` of the largest.

    Values that are not finite pass: the first training step reports those, with its documents.

    Args:
        tolerance: None: what rounding of one product and what follows it may be, in 16 bits or, in float32, in TF32.
    """
    if ours.shape != theirs.shape:
        raise ValueError(
            f"{type(model).__name__}: expected logits of shape {list(ours.shape)}, as its head and config say, got"
            f" {list(theirs.shape)}"
        )
    if tolerance is None:
        tolerance = {2: 0.03, 4: 1e-3, 8: 1e-9}[min(ours.dtype.itemsize, theirs.dtype.itemsize)]
    difference, largest = (ours.double() - theirs.double()).abs().max(), theirs.double().abs().max()
    if difference > tolerance * largest:
        raise ValueError(
            f"{type(model).__name__}: expected logits equal to its head's output on its hidden states with"
            f" {head.transform}, but they differ by up to {difference:.3g} (largest logit {largest:.3g}): the model"
            " does something else to its logits, and the loss would be wrong"
        )


def logits_of(head: OutputHead, hidden: Tensor) -> Tensor:
    """Compute logits [..., vocab_size] of hidden states [..., D], in the dtype of the product."""
    z = linear(hidden, head.weight.to(hidden.dtype), None if head.bias is None else head.bias.to(hidden.dtype))
    scale, softcap = head.transform.scale, head.transform.softcap
    logits = scale * z[..., : head.vocab_size].to(torch.promote_types(z.dtype, torch.float32))
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).to(z.dtype)
