"""What a model knows and how far it has moved: accuracy on multiple-choice questions, and KL to another model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from disc_kernels import fused_suffix_kl
from disc_train.causal_lm import common_vocabulary, head_of, log_probability


@dataclass(frozen=True)
class Probe:
    """A text to go on from, and the continuations to choose among; a continuation brings its own leading space."""

    prompt: str
    choices: Sequence[str]
    answer: int  # index of the right choice
    context: str = ""  # put before the prompt, as it is

    def __post_init__(self) -> None:
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"answer: expected an index of the {len(self.choices)} choices, got {self.answer}")


@torch.no_grad()
def choice_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe], batch_size: int = 64
) -> float:
    """The share of probes whose right choice is the likeliest of its choices, by mean log-probability per token.

    A choice is tokenised apart from what comes before it and appended; sequences are batched by length. The model is
    used in its present mode.

    Raises:
        ValueError: no probes, or a prompt or a choice without tokens.
    """
    if not probes:
        raise ValueError("probes: expected at least one, got none")
    sequences = []  # (probe, choice, ids, length of the choice)
    for number, probe in enumerate(probes):
        prompt = tokenizer.encode(probe.context + probe.prompt, add_special_tokens=False)
        for choice, text in enumerate(probe.choices):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if not prompt or not ids:
                raise ValueError(f"probes[{number}]: expected tokens in the prompt and in every choice, got {probe}")
            sequences.append((number, choice, prompt + ids, len(ids)))
    sequences.sort(key=lambda sequence: len(sequence[2]))

    scores = [[0.0] * len(probe.choices) for probe in probes]
    head = head_of(model)
    for first in range(0, len(sequences), batch_size):
        batch = sequences[first : first + batch_size]
        longest = len(batch[-1][2])
        # Padding stands on the right, where a causal model's earlier tokens do not see it.
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for _, _, ids, _ in batch], device=model.device)
        hidden = model.get_decoder()(input_ids=padded, use_cache=False).last_hidden_state
        for row, (number, choice, ids, length) in zip(hidden, batch, strict=True):
            targets = torch.tensor(ids[-length:], device=model.device)
            predictors = row[len(ids) - length - 1 : len(ids) - 1]
            scores[number][choice] = log_probability(head, predictors, targets).mean().item()
    right = sum(max(range(len(s)), key=s.__getitem__) == probe.answer for s, probe in zip(scores, probes, strict=True))
    return right / len(probes)


@torch.no_grad()
def kl_to_reference(
    model: PreTrainedModel, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
) -> float:
    """Mean KL(reference || model), in nats a token at temperature 1, over the tokens of texts read one at a time.

    Both models are on one device and are used in their present mode.

    Raises:
        ValueError: texts without a token.
    """
    head, reference_head = head_of(model), head_of(reference)
    total, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)], dtype=torch.int64, device=model.device)
        if ids.numel() == 0:
            continue
        divergence = fused_suffix_kl(
            model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state,
            head.weight,
            reference.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state,
            reference_head.weight,
            reduction="sum",
            student_bias=head.bias,
            teacher_bias=reference_head.bias,
            student_transform=head.transform,
            teacher_transform=reference_head.transform,
            vocab_size=common_vocabulary(head, reference_head),
        )
        total += float(divergence)  # type: ignore[arg-type]
        tokens += ids.numel()
    if tokens == 0:
        raise ValueError("texts: expected at least one token, got none")
    return total / tokens
