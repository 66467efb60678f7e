"""How likely a model finds texts, and which of a probe's choices it finds the likeliest."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from disc_train.batches import MAX_BATCH_TOKENS, batches_by_length, pad_right
from disc_train.data.chat import encode
from disc_train.data.example import Ids, Place
from disc_train.evaluation.probes import Probe
from disc_train.evaluation.results import exp
from disc_train.models.causal_lm import check_vocabulary, head_of, hidden_states
from disc_train.objectives.cross_entropy import linear_cross_entropy
from disc_train.packing.branch_inputs import read_branches
from disc_train.packing.rows import arrange, row_rule


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


@torch.no_grad()
def choice_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    batch_size: int = 64,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> list[list[float]]:
    """The mean log-probability a token, in nats, of every choice of every probe.

    A choice is tokenised apart from what comes before it and appended. What a probe's choices have before them is read
    once where the model can share it. The model is used in its present mode, with "sdpa" or "eager" attention or that
    which `disc_train.models.causal_lm.use_attention` has picked; probes are batched by length, `batch_size` at most.

    Raises:
        ValueError: a prompt or a choice without tokens, or with a token that is none of the model's.
        FloatingPointError: a score that is NaN.
    """
    branches: list[list[tuple[Ids, Place, Ids]]] = []
    for number, probe in enumerate(probes):
        prompt = encode(tokenizer, probe.context + probe.prompt)
        choices = [encode(tokenizer, text) for text in probe.choices]
        if not all(map(len, (prompt, *choices))):
            raise ValueError(f"probes[{number}]: expected tokens in the prompt and in every choice, got {probe}")
        check_vocabulary(model, max(int(ids.max()) for ids in (prompt, *choices)))
        branches.append([(prompt, Place(len(prompt)), choice) for choice in choices])
    lengths = [len(of_one[0][0]) + sum(len(choice) for *_, choice in of_one) for of_one in branches]

    head, rule = head_of(model), row_rule(model)
    scores: list[list[float]] = [[]] * len(probes)
    for batch in batches_by_length(lengths, batch_size, max_batch_tokens):
        together = [branch for index in batch for branch in branches[index]]
        rows = arrange(read_branches(together, rule.share), rule)
        hidden = hidden_states(model, rows.input_ids.to(model.device), rows.layout.to(model.device)).flatten(0, 1)
        # A row predicts the next token, and the last token read predicts the choice's last.
        ends = [positions[-len(choice) :] for positions, (*_, choice) in zip(rows.positions, together, strict=True)]
        targets = np.concatenate([choice for *_, choice in together])
        losses = linear_cross_entropy(
            hidden,
            head,
            torch.from_numpy(targets).long().to(model.device),
            index=torch.from_numpy(np.concatenate(ends)),
            reduction="none",
        )
        means = iter(torch.stack([-each.mean() for each in losses.split([len(end) for end in ends])]).tolist())
        for index in batch:
            scores[index] = [next(means) for _ in branches[index]]
            check_numbers(f"probes[{index}]", scores[index])
    return scores


def likeliest(scores: Sequence[float]) -> int:
    """The index of the largest score, the first of equals."""
    return max(range(len(scores)), key=scores.__getitem__)


def check_numbers(name: str, values: Iterable[float]) -> None:
    """Raise FloatingPointError if what a model says of an item is NaN, which compares as if it were an answer."""
    if any(map(math.isnan, values)):
        raise FloatingPointError(
            f"{name}: expected numbers from the model, got NaN: its weights are damaged, or its dtype has too small a"
            " range"
        )


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
    return exp(sum(loss.nats for loss in losses) / tokens)


@torch.no_grad()
def text_losses(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    batch_size: int = 64,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> list[TextLoss]:
    """A number a text, given as token ids; a text of fewer than two tokens has nothing that is predicted.

    Raises:
        FloatingPointError: a loss that is NaN.
    """
    head = head_of(model)
    losses = [TextLoss(0.0, 0)] * len(texts)
    filled = [index for index, ids in enumerate(texts) if len(ids) > 1]
    for chosen in batches_by_length([len(texts[index]) for index in filled], batch_size, max_batch_tokens):
        batch = [filled[each] for each in chosen]
        ids = pad_right([texts[index] for index in batch], model.device)
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        counts = [len(texts[index]) - 1 for index in batch]
        rows = torch.cat([hidden[row, :count] for row, count in enumerate(counts)])
        targets = torch.cat([ids[row, 1 : count + 1] for row, count in enumerate(counts)])
        nats = linear_cross_entropy(rows, head, targets, reduction="none").split(counts)
        sums = torch.stack([each.double().sum() for each in nats]).tolist()
        for index, total, count in zip(batch, sums, counts, strict=True):
            check_numbers(f"texts[{index}]", [total])
            losses[index] = TextLoss(total, count)
    return losses
