"""What the loss takes from a causal language model: hidden states of a packed sequence, and the output head."""

from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from transformers import AutoModelForCausalLM, PreTrainedModel

from disc_kernels import LogitTransform, SharedPrefixLayout
from disc_kernels.shared_prefix import attention_implementation, attention_mask


class Head(NamedTuple):
    """A model's logits are `transform(hidden @ weight.T + bias)`."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    transform: LogitTransform


def load_model(name_or_path: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a causal language model.

    Raises:
        ValueError, OSError: there is none, it is of another kind, or its files are damaged.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype)
    except SafetensorError as error:
        raise ValueError(f"{name_or_path}: the weights cannot be read, a file is damaged: {error}") from error


def head_of(model: PreTrainedModel) -> Head:
    """The output head of a causal language model, with what its config says is done to the logits.

    Raises:
        ValueError: the model has no output head with a weight of shape [V, D].
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    weight = getattr(head, "weight", None)
    if weight is None or weight.ndim != 2:
        got = "no such method" if get_head is None else type(head).__name__
        raise ValueError(
            f"{type(model).__name__}: expected a causal language model whose get_output_embeddings() is a linear layer,"
            f" got {got}"
        )
    return Head(weight, getattr(head, "bias", None), _logit_transform(model))


def _logit_transform(model: PreTrainedModel) -> LogitTransform:
    """The factor (Cohere, Granite, Falcon-H1) and the soft cap (Gemma 2) that a model's config puts on its logits."""
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return LogitTransform(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))


def check_vocabulary(model: PreTrainedModel, largest_token: int) -> None:
    """Raise ValueError if a token of the documents is none of the model's; a GPU would fail without saying so."""
    embeddings: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    entries = min(embeddings.shape[0], head_of(model).weight.shape[0])
    if largest_token >= entries:
        raise ValueError(
            f"{model.name_or_path or type(model).__name__}: expected an entry for every token of the documents, up to"
            f" {largest_token}, got a vocabulary of {entries}: the tokenizer is another model's"
        )


def common_vocabulary(student: Head, teacher: Head) -> int | None:
    """The loss's `vocab_size`: None where the heads have as many rows, else the smaller number (padding differs)."""
    sizes = {student.weight.shape[0], teacher.weight.shape[0]}
    return None if len(sizes) == 1 else min(sizes)


def hidden_states(model: PreTrainedModel, input_ids: Tensor, layout: SharedPrefixLayout, attention: str) -> Tensor:
    """The decoder's last hidden states [1, L, D] of a packed sequence; the head is not run.

    Args:
        model: a causal language model that `use_attention` has prepared.
        input_ids: [1, L] int64.
        layout: L tokens on the model's device.
        attention: the name given to `use_attention`.
    """
    return model.get_decoder()(**_inputs(model, input_ids, layout, attention)).last_hidden_state


def _inputs(model: PreTrainedModel, input_ids: Tensor, layout: SharedPrefixLayout, attention: str) -> dict[str, Any]:
    implementation = attention_implementation(model.config, attention)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask(model.config, layout, implementation, model.dtype),
        "position_ids": layout.position_ids[None],
        "use_cache": False,
    }


@torch.no_grad()
def use_attention(model: PreTrainedModel, attention: str, input_ids: Tensor) -> None:
    """Switch a model to the attention that packed sequences need, and check that it computes what the loss expects.

    Args:
        model: a causal language model; its mode (train or eval) is kept.
        attention: "auto", "sdpa", "flex" or "varlen", see `disc_kernels.shared_prefix.attention_implementation`.
        input_ids: [1, L] int64, a few tokens on the model's device to check the model with.

    Raises:
        ValueError: the model has no usable head, does something unknown to its logits, or runs a text packed behind
            another differently from the text alone: training would minimise the wrong loss. Or it cannot run a packed
            sequence at all. Or "flex" on the CPU.
    """
    if attention == "flex" and input_ids.device.type == "cpu":
        raise ValueError("attention: 'flex' cannot train on the CPU (FlexAttention has no backward there), use 'sdpa'")
    head = head_of(model)
    training = model.training
    model.eval()
    try:
        model.set_attn_implementation(attention_implementation(model.config, attention))
        length = input_ids.shape[1]
        alone = SharedPrefixLayout.from_trees([(length, [])]).to(input_ids.device)
        packed = SharedPrefixLayout.from_trees([(0, [(0, length), (0, length)])]).to(input_ids.device)
        logits = model(**_inputs(model, input_ids, alone, attention)).logits.float()
        hidden = hidden_states(model, input_ids, alone, attention)
        second = hidden_states(model, input_ids.repeat(1, 2), packed, attention)[:, length:]
    except Exception as failure:  # of whatever kind the model's own code raises
        raise ValueError(
            f"{type(model).__name__}: expected a model that runs a packed sequence, by its attention_mask and"
            f" position_ids, with attention {attention!r}, got {type(failure).__name__}: {failure}"
        ) from failure
    finally:
        model.train(training)

    # Values that are not finite pass: the first training step reports those, with its documents. The bounds leave room
    # for rounding, in 16 bits or in TF32, and for kernels that differ between lengths; real faults are further off.
    low_precision = torch.finfo(model.dtype).bits < 32
    difference, largest = (_logits(head, hidden) - logits).abs().max(), logits.abs().max()
    if difference > (0.1 if low_precision else 1e-3) * largest:
        raise ValueError(
            f"{type(model).__name__}: expected logits equal to its head's output on its hidden states with"
            f" {head.transform}, but they differ by up to {difference:.3g} (largest logit {largest:.3g}): the model"
            " does something else to its logits, and the loss would be wrong"
        )
    error = (second - hidden).float().norm() / hidden.float().norm()
    if error > (0.2 if low_precision else 0.01):
        raise ValueError(
            f"{type(model).__name__}: expected the same hidden states for a text packed behind another as for the text"
            f" alone, but they differ by {error:.1%}: the model does not follow attention_mask or position_ids"
        )


@torch.no_grad()
def log_probability(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probability, float32 [M] in nats, that a head gives to targets [M] after hidden states [M, D]."""
    # In pieces, since a whole [M, V] would be the largest tensor of the program.
    return torch.cat(
        [
            -cross_entropy(_logits(head, rows), wanted, reduction="none")
            for rows, wanted in zip(hidden.split(256), targets.split(256), strict=True)
        ]
    )


def _logits(head: Head, hidden: Tensor) -> Tensor:
    """Logits, float32 [..., V], of hidden states [..., D]."""
    scale, softcap = head.transform.scale, head.transform.softcap
    logits = scale * linear(hidden, head.weight, head.bias).float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
