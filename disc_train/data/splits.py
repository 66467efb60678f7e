"""Find sentence boundaries in tokens, and choose a document's split points among them."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from disc_train.data.documents import Document
from disc_train.data.sequence_start import starts_with

SENTENCE_STRATEGIES = ("sentence_boundary", "middle_sentence", "uniform_sentence")
TOKEN_STRATEGIES = ("random_token", "uniform_token", "random_token_fixed")
SPLIT_STRATEGIES = SENTENCE_STRATEGIES + TOKEN_STRATEGIES

# Where the student sees nothing before a suffix, its first token is never predicted. Behind a student's header one
# token would do; but then the template would decide where documents are split.
MIN_SUFFIX_TOKENS = 2


class Split(NamedTuple):
    """Name a split point: the suffix is the document's tokens [start, stop), its prefix all tokens before start."""

    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """Hold a document's tokens, and where its sentences begin."""

    name: str
    input_ids: np.ndarray  # [N] int32, no special tokens
    sentence_starts: tuple[int, ...]  # index of each sentence's first token; the first is 0; empty where N = 0
    cut: int = 0  # tokens beyond max_tokens, dropped


def check_split_options(strategy: str, num_splits: int, suffix_tokens: int) -> None:
    """Raise ValueError for options of `choose_splits` that are unknown or do not go together."""
    if strategy not in SPLIT_STRATEGIES:
        raise ValueError(f"--split_strategy: expected one of {', '.join(SPLIT_STRATEGIES)}, got {strategy!r}")
    if num_splits < 1:
        raise ValueError(f"--num_splits: expected at least 1, got {num_splits}")
    if suffix_tokens and strategy != "random_token_fixed":
        raise ValueError(
            f"--suffix_tokens is for --split_strategy random_token_fixed; got {suffix_tokens} with {strategy}"
        )
    if suffix_tokens < 0 or 0 < suffix_tokens < MIN_SUFFIX_TOKENS:
        raise ValueError(
            f"--suffix_tokens: expected 0 (to the document's end) or at least {MIN_SUFFIX_TOKENS}, got {suffix_tokens}"
        )


def check_language(language: str) -> None:
    """Raise ValueError unless `language` looks like an ISO 639 code.

    Where the splitter has no rules for a code it uses the English ones, which know most scripts' full stops. A name
    ("english") or a region ("pt-BR") would end there too, unnoticed, so neither is taken.
    """
    if not re.fullmatch("[a-z]{2,3}", language):
        raise ValueError(f"--language: expected an ISO 639 code such as 'en' or 'ja', got {language!r}")


# The splitter panics on some white space of more than one byte ("vitamin B\u00a0."), so it is shown plain white space
# instead: one character for one, so that offsets stay.
_SPACES = [0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000]
_LINE_BREAKS = [0x85, 0x2028, 0x2029]
_PLAIN_SPACE = dict.fromkeys(_SPACES, " ") | dict.fromkeys(_LINE_BREAKS, "\n")


def sentence_spans(text: str, language: str = "en") -> list[tuple[int, int]]:
    """Find each sentence's [start, stop) in characters of `text`, without the white space around it."""
    check_language(language)
    try:
        from sentencex import get_sentence_boundaries
    except ImportError:
        raise ImportError("splitting into sentences needs sentencex: pip install 'disc-kernels[train]'") from None
    spans = []
    # Offsets, not lengths added up: in a long text the pieces leave out some of the paragraph breaks.
    for piece in get_sentence_boundaries(language, text.translate(_PLAIN_SPACE)):
        sentence = piece["text"].strip()
        if sentence:  # most paragraph breaks are a piece of their own
            start = piece["start_index"] + piece["text"].index(sentence)
            spans.append((start, start + len(sentence)))
    return spans


def tokenize_document(
    document: Document,
    tokenizer: PreTrainedTokenizerBase,
    sentence_tokenization: str,
    max_tokens: int | None,
    language: str = "en",
    start_ids: Sequence[int] = (),
) -> TokenizedDocument:
    """Tokenize a document without special tokens and find the token that each sentence begins with.

    "document" tokenizes the text as written, once. A sentence begins at the token that holds its first character that
    is not white space; two sentences that begin in one token are one. "sentence", the way of arXiv 2602.16093,
    tokenizes each sentence on its own and joins the ids: the white space between sentences is lost. The tokens
    `start_ids`, which the document is read after anyway, are dropped from its beginning. At most `max_tokens` tokens
    are kept (None: all).

    Raises ValueError for unknown options, and for "document" with a tokenizer that gives no character offsets.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"--max_document_tokens: expected at least 1, got {max_tokens}")
    spans = sentence_spans(document.text, language)
    if sentence_tokenization == "document":
        ids, starts = _tokenize_whole(document.text, spans, tokenizer)
    elif sentence_tokenization == "sentence":
        ids, starts = _tokenize_sentences([document.text[start:stop] for start, stop in spans], tokenizer)
    else:
        raise ValueError(f"--sentence_tokenization: expected document or sentence, got {sentence_tokenization!r}")
    while start_ids and starts_with(start_ids, np.array(ids[: len(start_ids)])):
        ids = ids[len(start_ids) :]
        starts = sorted({max(0, first - len(start_ids)) for first in starts})
    first_ids = ids[:max_tokens]
    # A sentence may begin beyond all tokens even where none is cut: with characters that the tokenizer drops.
    return TokenizedDocument(
        name=document.name,
        input_ids=np.array(first_ids, dtype=np.int32),
        sentence_starts=tuple(start for start in starts if start < len(first_ids)),
        cut=len(ids) - len(first_ids),
    )


def _tokenize_whole(
    text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    if not getattr(tokenizer, "is_fast", False):  # not every kind of slow tokenizer has the attribute
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer: it gives no character offsets; "
            "use --sentence_tokenization sentence"
        )
    # verbose=False: a text longer than the model's context is no surprise here.
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encoding["input_ids"]
    if not ids:
        return [], []
    # The first token that ends after a character holds it, whether or not its offsets take in the space before. Of
    # several tokens that each hold some bytes of one character, that is the first. (Offsets never go back.)
    ends = [end for _, end in encoding["offset_mapping"]]
    starts = np.searchsorted(ends, [start for start, _ in spans[1:]], side="right")
    # The first sentence also owns the white space before it, so it begins at token 0.
    return ids, np.unique([0, *starts]).tolist()


def _tokenize_sentences(sentences: list[str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    # Tokenizers do not agree on what an empty batch gives.
    each = tokenizer(sentences, add_special_tokens=False, verbose=False)["input_ids"] if sentences else []
    return list(chain(*each)), sorted({0, *accumulate(map(len, each))})


def choose_splits(
    document: TokenizedDocument, strategy: str, num_splits: int, suffix_tokens: int, rng: random.Random
) -> list[Split]:
    """Choose a document's split points; sorted, each once. The draw depends on `rng` alone.

    - sentence_boundary: `num_splits - 1` sentences drawn without replacement from those after the first, and always the
      last one (arXiv 2602.16093); middle_sentence: the middle one; uniform_sentence: `num_splits` evenly spaced ones,
      the last among them. The suffix is that sentence.
    - random_token, uniform_token: `num_splits` distinct token positions, random or evenly spaced; each suffix runs to
      the next split point, the last to the end of the document.
    - random_token_fixed: random positions; suffixes of `suffix_tokens` tokens, or to the end of the document for 0.
      They may overlap.

    Every prefix has at least one token. A suffix below 2 tokens is dropped after the draw, so there may be fewer splits
    than asked for, or none. Raises ValueError as `check_split_options` does.
    """
    check_split_options(strategy, num_splits, suffix_tokens)
    length = len(document.input_ids)
    if strategy in SENTENCE_STRATEGIES:
        bounds = [*document.sentence_starts, length]
        sentences = _choose_sentences(strategy, len(document.sentence_starts), num_splits, rng)
        splits = [Split(bounds[i], bounds[i + 1]) for i in sentences]
    else:
        starts = _choose_tokens(strategy, length, num_splits, rng)
        if strategy == "random_token_fixed":
            stops = [min(start + suffix_tokens, length) if suffix_tokens else length for start in starts]
        else:
            stops = [*starts[1:], length]
        splits = [Split(start, stop) for start, stop in zip(starts, stops, strict=False)]
    return [split for split in splits if split.stop - split.start >= MIN_SUFFIX_TOKENS]


def _choose_sentences(strategy: str, count: int, num_splits: int, rng: random.Random) -> list[int]:
    last = count - 1
    if last < 1:
        return []
    if strategy == "sentence_boundary":
        chosen = [*rng.sample(range(1, count), min(num_splits - 1, last)), last]
    elif strategy == "middle_sentence":
        chosen = [count // 2]
    else:
        chosen = [-(-k * last // num_splits) for k in range(1, num_splits + 1)]  # rounded up: never the first sentence
    return sorted(set(chosen))


def _choose_tokens(strategy: str, length: int, num_splits: int, rng: random.Random) -> list[int]:
    if strategy == "uniform_token":  # num_splits + 1 pieces of equal length, the first of them only ever prefix
        return sorted({k * length // (num_splits + 1) for k in range(1, num_splits + 1)} - {0})
    candidates = range(1, length)
    return sorted(rng.sample(candidates, min(num_splits, len(candidates))))
