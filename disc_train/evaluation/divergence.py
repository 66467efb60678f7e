"""How far a model has moved from another: KL a token and entropies, whole corpora without logits."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from disc_kernels import SuffixKLStats, fused_suffix_kl
from disc_train.batches import MAX_BATCH_TOKENS, batches_by_length, pad_right
from disc_train.evaluation.likelihood import check_numbers
from disc_train.models.causal_lm import common_vocabulary, head_of


class Divergence(NamedTuple):
    """Sums over a text's tokens, in nats at temperature 1."""

    kl: float  # KL(reference || model)
    entropy: float
    reference_entropy: float
    agreement: float  # positions where both models find one token the likeliest
    tokens: int


def kl_to_reference(
    model: PreTrainedModel, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
) -> float:
    """Mean KL(reference || model), in nats a token at temperature 1, over the tokens of texts.

    Both models are on one device and are used in their present mode.

    Raises:
        ValueError: texts without a token.
    """
    results = divergences(model, reference, [tokenizer.encode(text, add_special_tokens=False) for text in texts])
    tokens = sum(result.tokens for result in results)
    if tokens == 0:
        raise ValueError("texts: expected at least one token, got none")
    return sum(result.kl for result in results) / tokens


@torch.no_grad()
def divergences(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    batch_size: int = 64,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> list[Divergence]:
    """One a text, given as token ids: over the distributions after each of its tokens. An empty text has zeros.

    Both models are on one device and are used in their present mode; of vocabularies that differ in padding the common
    part is compared.

    Raises:
        FloatingPointError: a number that is NaN.
    """
    head, reference_head = head_of(model), head_of(reference)
    results = [Divergence(0.0, 0.0, 0.0, 0.0, 0)] * len(texts)
    filled = [index for index, ids in enumerate(texts) if len(ids)]
    for chosen in batches_by_length([len(texts[index]) for index in filled], batch_size, max_batch_tokens):
        batch = [filled[each] for each in chosen]
        ids = pad_right([texts[index] for index in batch], model.device)
        lengths = [len(texts[index]) for index in batch]
        rows = torch.cat([row * ids.shape[1] + torch.arange(length) for row, length in enumerate(lengths)])
        stats: SuffixKLStats = fused_suffix_kl(  # type: ignore[assignment]
            model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state,
            head.weight,
            reference.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state,
            reference_head.weight,
            student_index=rows,
            teacher_index=rows,
            reduction="sum",
            student_bias=head.bias,
            teacher_bias=reference_head.bias,
            student_transform=head.transform,
            teacher_transform=reference_head.transform,
            vocab_size=common_vocabulary(head, reference_head),
            return_stats=True,
        )[1]
        sums = [torch.stack([part.double().sum() for part in values.split(lengths)]).tolist() for values in stats]
        for index, values in zip(batch, zip(*sums, lengths, strict=True), strict=True):
            check_numbers(f"texts[{index}] beside the reference", values)
            results[index] = Divergence(*values)
    return results
