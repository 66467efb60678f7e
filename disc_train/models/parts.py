"""Find what of a model text reaches, and freeze the rest."""

import torch
from torch import nn
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
    training = model.training
    model.eval()
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with torch.enable_grad():
        hidden = run_decoder(model, input_ids=token, use_cache=False)
        pending = [model.get_output_embeddings()(hidden).grad_fn]
    model.train(training)
    used, seen = set(), set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            used.add(getattr(node, "variable", None))  # of what adds up a parameter's gradient
            pending += [following for following, _ in node.next_functions]
    return all(parameter in used for parameter in model.parameters() if parameter.requires_grad)
