"""Measure how likely a model finds texts, and how far its predictions are from another model's, without logits."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from disc_kernels import fused_cross_entropy, fused_suffix_kl
from disc_kernels.hf import last_hidden_states, output_head
from disc_train.evaluation.results import TextSums, exp
from disc_train.generation.batches import MAX_BATCH_TOKENS, batches_by_length, pad
from disc_train.progress import show_progress

# The fields of `TextSums` that `SuffixKLStats` has, in its order.
_COMPARED = ("kl", "entropy", "reference_entropy", "agreement")


def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int = 64
) -> float:
    """Return exp of the mean negative log-likelihood of a token, over all tokens of the texts but the first of each.

    Raises:
        ValueError: no text has two tokens.
    """
    sums = text_sums(model, [tokenizer.encode(text, add_special_tokens=False) for text in texts], None, batch_size)
    predicted = sum(each.predicted for each in sums)
    if predicted == 0:
        raise ValueError("texts: expected one with at least two tokens, the first is not predicted; got none")
    return exp(sum(each.loss for each in sums) / predicted)


def kl_to_reference(
    model: PreTrainedModel, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
) -> float:
    """Return the mean KL(reference || model) of a token, in nats at temperature 1, over the tokens of texts.

    Raises:
        ValueError: texts without a token.
    """
    sums = text_sums(model, [tokenizer.encode(text, add_special_tokens=False) for text in texts], reference)
    tokens = sum(each.tokens for each in sums)
    if tokens == 0:
        raise ValueError("texts: expected at least one token, got none")
    return sum(each.kl or 0.0 for each in sums) / tokens


@torch.no_grad()
def text_sums(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    reference: PreTrainedModel | None = None,
    batch_size: int = 64,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> list[TextSums]:
    """Read texts, given as token ids, and return the sums over each.

    Both models are on one device and are used in their present mode; of vocabularies that differ in padding the common
    part is compared.

    Raises:
        FloatingPointError: a number that is NaN.
    """
    results = [TextSums() for _ in texts]
    filled = [index for index, ids in enumerate(texts) if len(ids)]
    batches = batches_by_length([len(texts[index]) for index in filled], batch_size, max_batch_tokens)
    for batch in show_progress(batches, len(filled), "texts read"):
        indices = [filled[each] for each in batch]
        lengths = [len(texts[index]) for index in indices]
        ids, _ = pad([texts[index] for index in indices], "right", model.device)
        hidden = _hidden_states(model, ids, lengths)
        head = output_head(model)
        # The last token of a text predicts nothing.
        labels = torch.cat([F.pad(ids[row, 1:length], (0, 1), value=-100) for row, length in enumerate(lengths)])
        measured: list[Tensor] = [fused_cross_entropy(hidden, head, labels, reduction="none")]
        if reference is not None:
            of_reference = _hidden_states(reference, ids, lengths), output_head(reference)
            measured += fused_suffix_kl(hidden, head, *of_reference, return_stats=True)[1]
        sums = torch.stack([each.double() for each in measured]).split(lengths, dim=1)
        for index, length, part in zip(indices, lengths, sums, strict=True):
            loss, *compared = part.sum(1).tolist()
            check_numbers(f"texts[{index}]", [loss])
            check_numbers(f"texts[{index}] beside the reference", compared)
            beside = dict(zip(_COMPARED, compared, strict=False))
            results[index] = TextSums(tokens=length, predicted=length - 1, loss=loss, **beside)
    return results


def _hidden_states(model: PreTrainedModel, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the hidden states of all tokens that are not padding, text after text."""
    hidden = last_hidden_states(model, input_ids=ids, use_cache=False)
    return torch.cat([hidden[row, :length] for row, length in enumerate(lengths)])


def check_numbers(name: str, values: Iterable[float]) -> None:
    """Raise FloatingPointError if what a model says of an item is NaN, which compares as if it were an answer."""
    if any(map(math.isnan, values)):
        raise FloatingPointError(
            f"{name}: expected numbers from the model, got NaN: its weights are damaged, or its dtype has too small a"
            " range"
        )
