"""Generate what a model answers, by greedy decoding, and see whether the right answer is in it."""

import string
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from disc_train.evaluation.probes import Probe, encode_probes
from disc_train.generation.batches import MAX_BATCH_TOKENS
from disc_train.generation.decoding import continue_prompts


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    max_new_tokens: int,
    batch_size: int = 64,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    prefix: Sequence[int] = (),
    what: str = "probes asked",
) -> list[str]:
    """Return the greedy continuation of every probe's context and prompt, as text without special tokens.

    Args:
        prefix: what every sequence starts with, see `disc_train.data.sequence_start.bos_prefix`.
        what: how progress begins: the items and what happens to them.

    Raises:
        ValueError: a prompt or a choice without tokens, or with a token that is none of the model's.
        FloatingPointError: logits that are NaN.
    """
    prompts = [prompt.tolist() for prompt, _ in encode_probes(model, tokenizer, probes, prefix)]
    answers = [""] * len(probes)
    limits = max_new_tokens, batch_size, max_batch_tokens
    for index, text, _ in continue_prompts(model, tokenizer, prompts, *limits, what=f"{what}, answers generated"):
        answers[index] = text
    return answers


def right_answer(tokenizer: PreTrainedTokenizerBase, probe: Probe) -> str:
    """Return the text of a probe's answer, without the special tokens that end a turn."""
    ids = tokenizer.encode(probe.choices[probe.answer], add_special_tokens=False)
    return tokenizer.decode(ids, skip_special_tokens=True)  # type: ignore[return-value]


def is_answer(given: str, wanted: str) -> bool:
    """Tell whether two texts have the same words; case, white space and punctuation at words' ends do not count."""
    return _words(given) == _words(wanted)


def contains_answer(given: str, wanted: str) -> bool:
    """Tell whether the words of `wanted` stand in `given` one after another."""
    given_words, wanted_words = _words(given), _words(wanted)
    starts = range(len(given_words) - len(wanted_words) + 1)
    return any(given_words[start : start + len(wanted_words)] == wanted_words for start in starts)


def _words(text: str) -> list[str]:
    return [word.strip(string.punctuation) or word for word in text.casefold().split()]
