"""What a model answers of itself: greedy continuations, and whether the answer is in them."""

import string
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from disc_train.batches import MAX_BATCH_TOKENS, batches_by_length
from disc_train.decoding import continue_batch, end_tokens
from disc_train.evaluation.probes import Probe
from disc_train.models.causal_lm import check_vocabulary


def greedy_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> float:
    """The share of probes to which the greedy continuation is the answer, see `is_answer`.

    Raises:
        ValueError: no probes, or a prompt without tokens.
    """
    if not probes:
        raise ValueError("probes: expected at least one, got none")
    answers = greedy_answers(model, tokenizer, probes, max_new_tokens, batch_size)
    right = (is_answer(given, wanted_text(tokenizer, probe)) for given, probe in zip(answers, probes, strict=True))
    return sum(right) / len(probes)


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    max_new_tokens: int,
    batch_size: int = 64,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> list[str]:
    """The greedy continuation of every probe's context and prompt, as text without special tokens.

    Raises:
        ValueError: a prompt without tokens, or with a token that is none of the model's.
        FloatingPointError: logits that are NaN.
    """
    prompts = [tokenizer.encode(probe.context + probe.prompt, add_special_tokens=False) for probe in probes]
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"probes[{number}]: expected tokens in the prompt, got {probes[number]}")
        check_vocabulary(model, max(prompt))
    ends = end_tokens(model, tokenizer)
    answers = [""] * len(probes)
    for batch in batches_by_length([len(prompt) + max_new_tokens for prompt in prompts], batch_size, max_batch_tokens):
        continuations = continue_batch(model, [prompts[index] for index in batch], max_new_tokens, ends)
        for index, ids in zip(batch, continuations, strict=True):
            answers[index] = tokenizer.decode(ids, skip_special_tokens=True)  # type: ignore[assignment]
    return answers


def wanted_text(tokenizer: PreTrainedTokenizerBase, probe: Probe) -> str:
    """The text of a probe's answer, without what ends a turn."""
    ids = tokenizer.encode(probe.choices[probe.answer], add_special_tokens=False)
    return tokenizer.decode(ids, skip_special_tokens=True)  # type: ignore[return-value]


def is_answer(given: str, wanted: str) -> bool:
    """Whether two texts have the same words, whatever their case, white space and punctuation at the ends of words."""
    return _words(given) == _words(wanted)


def contains_answer(given: str, wanted: str) -> bool:
    """Whether the words of `wanted` stand in `given` one after another."""
    given_words, wanted_words = _words(given), _words(wanted)
    starts = range(len(given_words) - len(wanted_words) + 1)
    return any(given_words[start : start + len(wanted_words)] == wanted_words for start in starts)


def _words(text: str) -> list[str]:
    return [word.strip(string.punctuation) or word for word in text.casefold().split()]
