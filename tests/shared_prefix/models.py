"""Tiny Hugging Face models, and what tests compare of them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

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
