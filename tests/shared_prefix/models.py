"""Tiny Hugging Face models, what tests compare of them, and what a packed sequence has to equal."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from disc_kernels.shared_prefix import SharedPrefixLayout

VOCABULARY = 61
# Wide weights, so that attention is far from uniform and a wrong mask shows.
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "use_cache": False,
    "pad_token_id": 0,
}
GROUPED = TINY | {"num_key_value_heads": 2}


def measure_gradients(
    model: nn.Module, run: Callable[[Tensor], Tensor], ids: Tensor, upstream: Tensor
) -> dict[str, Tensor]:
    """Run embeddings [L, D] -> logits [L, V]; return the logits, and the gradients of embeddings and parameters."""
    parameters = dict(model.named_parameters())
    embeddings = model.get_input_embeddings()(ids)
    logits = run(embeddings)
    grads = torch.autograd.grad(logits, [embeddings, *parameters.values()], upstream)
    return {"logits": logits.detach(), "embeddings": grads[0], **dict(zip(parameters, grads[1:], strict=True))}


def run_separately(model: Callable[[Tensor], Tensor], inputs: Tensor, layout: SharedPrefixLayout) -> Tensor:
    """Run each trunk alone, and each branch behind the first part of the trunk that it sees; differentiable.

    Args:
        model: a causal model of one sequence: [n, ...] -> [n, ...], a row a token (add the batch dimension inside).
        inputs: [L, ...], packed as in the layout; token ids, say.
        layout: L packed tokens.

    Returns:
        [L, ...]: the outputs in packed order. A trunk token's output comes from the trunk's own run.
    """
    packed = []
    for start, length, tree, attach in layout.segments.tolist():
        seen = inputs[tree : tree + attach]
        own = inputs[start : start + length]
        packed.append(model(torch.cat([seen, own]))[len(seen) :])
    return torch.cat(packed)
