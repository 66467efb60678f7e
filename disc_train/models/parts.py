"""Find what of a model text reaches, and freeze the rest."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from disc_kernels.hf.forward import decoder_of, run_decoder


def freeze_unread(model: PreTrainedModel) -> None:
    """Freeze what text does not reach, such as a vision tower: it would get no gradient, for which DDP would wait."""
    decoder, head = decoder_of(model), model.get_output_embeddings()
    if not (isinstance(decoder, nn.Module) and isinstance(head, nn.Module)):
        return  # the model's check refuses it, in words
    read = {*decoder.parameters(), *head.parameters()}
    for parameter in model.parameters():
        if parameter not in read:
            parameter.requires_grad_(False)


def uses_all_parameters(model: PreTrainedModel) -> bool:
    """Tell whether every parameter that is trained has a part in the logits after a single token.

    Most of a layer's experts have none, nor has what chooses among earlier tokens: whether those get a gradient depends
    on the text.
    """
    if any(rate for name, rate in vars(model.config.get_text_config()).items() if "layerdrop" in name):
        return False
    with torch.enable_grad():
        used = parameters_behind([model.get_output_embeddings()(read_a_token(model))])
    return all(parameter in used for parameter in model.parameters() if parameter.requires_grad)


def read_a_token(model: PreTrainedModel) -> Tensor:
    """Return the last hidden state [1, 1, D] of a single token, with its graph, without dropout."""
    training = model.training
    model.eval()
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with torch.enable_grad():
        hidden = run_decoder(model, input_ids=token, use_cache=False)
    model.train(training)
    return hidden


def parameters_behind(tensors: Iterable[Tensor]) -> set[nn.Parameter]:
    """Return the trained parameters that tensors depend on, by their graph."""
    pending = [tensor.grad_fn for tensor in tensors]
    found: set[nn.Parameter] = set()
    seen = set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):  # what adds up a parameter's gradient
                found.add(node.variable)
            pending += [following for following, _ in node.next_functions]
    return found
