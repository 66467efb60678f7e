"""How likely a model finds texts, and which of a probe's choices it finds the likeliest."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from disc_train.causal_lm import head_of, log_probability
from disc_train.evaluation.batches import MAX_BATCH_TOKENS, batches_by_length, pad_right
from disc_train.evaluation.probes import Probe


def choice_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe], batch_size: int = 64
) -> float:
    """The share of probes whose right choice is the likeliest of its choices, see `choice_scores`.

    Raises:
        ValueError: no probes, or a prompt or a choice without tokens.
    """
    if not probes:
        raise ValueError("probes: expected at least one, got none")
    scores = choice_scores(model, tokenizer, probes, batch_size)
    return sum(likeliest(s) == probe.answer for s, probe in zip(scores, probes, strict=True)) / len(probes)


def choice_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    batch_size: int = 64,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> list[list[float]]:
    """The mean log-probability a token, in nats, of every choice of every probe.

    A choice is tokenised apart from what comes before it and appended; sequences are batched by length. The model is
    used in its present mode.

    Raises:
        ValueError: a prompt or a choice without tokens.
    """
    sequences = []
    for number, probe in enumerate(probes):
        prompt = tokenizer.encode(probe.context + probe.prompt, add_special_tokens=False)
        for text in probe.choices:
            choice = tokenizer.encode(text, add_special_tokens=False)
            if not prompt or not choice:
                raise ValueError(f"probes[{number}]: expected tokens in the prompt and in every choice, got {probe}")
            sequences.append((prompt + choice, len(choice)))
    sums = iter(_log_probabilities(model, sequences, batch_size, max_batch_tokens))
    means = (total / scored for total, (_, scored) in zip(sums, sequences, strict=True))
    return [[next(means) for _ in probe.choices] for probe in probes]


def likeliest(scores: Sequence[float]) -> int:
    """The index of the largest score, the first of equals."""
    return max(range(len(scores)), key=scores.__getitem__)


class TextLoss(NamedTuple):
    """Negative log-likelihood of a text, in nats, summed over the tokens that are predicted: all but the first."""

    nats: float
    tokens: int


def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int = 64
) -> float:
    """exp of the mean negative log-likelihood a token, over all tokens of the texts but the first of each.

    Raises:
        ValueError: no text has two tokens.
    """
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    losses = text_losses(model, ids, batch_size)
    tokens = sum(loss.tokens for loss in losses)
    if tokens == 0:
        raise ValueError("texts: expected one with at least two tokens, the first is not predicted; got none")
    return math.exp(sum(loss.nats for loss in losses) / tokens)


def text_losses(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    batch_size: int = 64,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> list[TextLoss]:
    """A number a text, given as token ids; a text of fewer than two tokens has nothing that is predicted."""
    predicted = [max(0, len(ids) - 1) for ids in texts]
    long_enough = [(ids, count) for ids, count in zip(texts, predicted, strict=True) if count]
    sums = iter(_log_probabilities(model, long_enough, batch_size, max_batch_tokens))
    return [TextLoss(-next(sums), count) if count else TextLoss(0.0, 0) for count in predicted]


@torch.no_grad()
def _log_probabilities(
    model: PreTrainedModel, sequences: Sequence[tuple[Sequence[int], int]], batch_size: int, max_batch_tokens: int
) -> list[float]:
    """The summed log-probability of the last `scored` tokens of each of the sequences (ids, scored)."""
    head = head_of(model)
    sums = [0.0] * len(sequences)
    for batch in batches_by_length([len(ids) for ids, _ in sequences], batch_size, max_batch_tokens):
        ids = pad_right([sequences[index][0] for index in batch], model.device)
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        # Position i predicts the token at i + 1.
        spans = [(len(sequences[index][0]) - sequences[index][1], len(sequences[index][0])) for index in batch]
        rows = torch.cat([hidden[row, start - 1 : stop - 1] for row, (start, stop) in enumerate(spans)])
        targets = torch.cat([ids[row, start:stop] for row, (start, stop) in enumerate(spans)])
        scores = log_probability(head, rows, targets).split([stop - start for start, stop in spans])
        for index, total in zip(batch, torch.stack([score.double().sum() for score in scores]).tolist(), strict=True):
            sums[index] = total
    return sums
