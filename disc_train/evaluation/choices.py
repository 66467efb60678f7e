"""Find which of a probe's choices a model finds the likeliest.

lm-eval's `HFLM.loglikelihood` gives the same numbers, but reads a prompt once for each of its choices:
docs/performance.md has the times.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from disc_kernels.hf import output_head
from disc_train.data.example import Context
from disc_train.evaluation.probes import Probe, encode_probes
from disc_train.evaluation.texts import check_numbers
from disc_train.generation.batches import MAX_BATCH_TOKENS, batches_by_length
from disc_train.models.causal_lm import target_states
from disc_train.objectives.cross_entropy import linear_cross_entropy
from disc_train.progress import show_progress


def choice_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe], batch_size: int = 64
) -> float:
    """Return the share of probes whose right choice is the likeliest of its choices, see `choice_scores`.

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
    prefix: Sequence[int] = (),
    what: str = "probes asked",
) -> list[list[float]]:
    """Return the mean log-probability of a token, in nats, for every choice of every probe.

    A choice is tokenised apart from what comes before it and appended. What a probe's choices have before them is read
    once where the model can share it. The model is used in its present mode, with "sdpa" or "eager" attention or that
    which `disc_train.models.causal_lm.use_attention` has picked; probes are batched by length, `batch_size` at most.

    Args:
        prefix: what every sequence starts with, see `disc_train.data.sequence_start.bos_prefix`.
        what: how progress begins: the items and what happens to them.

    Raises:
        ValueError: a prompt or a choice without tokens, or with a token that is none of the model's.
        FloatingPointError: a score that is NaN.
    """
    encoded = encode_probes(model, tokenizer, probes, prefix)
    branches = [[(prompt, Context(len(prompt)), choice) for choice in choices] for prompt, choices in encoded]
    lengths = [len(prompt) + sum(map(len, choices)) for prompt, choices in encoded]
    scores: list[list[float]] = [[]] * len(probes)
    batches = batches_by_length(lengths, batch_size, max_batch_tokens)
    for batch in show_progress(batches, len(probes), f"{what}, choices scored"):
        together = [branch for index in batch for branch in branches[index]]
        hidden, rows = target_states(model, together)
        targets = [torch.from_numpy(choice).long() for *_, choice in together]
        labels = torch.cat(targets).to(model.device)
        losses = linear_cross_entropy(hidden, output_head(model), labels, index=rows, reduction="none")
        means = iter(torch.stack([-each.mean() for each in losses.split(list(map(len, targets)))]).tolist())
        for index in batch:
            scores[index] = [next(means) for _ in branches[index]]
            check_numbers(f"probes[{index}]", scores[index])
    return scores


def likeliest(scores: Sequence[float]) -> int:
    """Return the index of the largest score, the first of equals."""
    return max(range(len(scores)), key=scores.__getitem__)
