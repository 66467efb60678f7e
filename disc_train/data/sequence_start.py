"""Decide how a sequence starts: with what the model's tokenizer puts before a text, a BOS token or nothing.

Applied in `templates.py`, `contexts.py`, `dataset.whole_documents`, `splits.tokenize_document`, and by other commands.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from disc_train.data.example import Ids

AddBos = Literal["auto", "true", "false"]

ADD_BOS_HELP = (
    "Start every sequence with a BOS token. auto: with what the tokenizer itself puts before a text; true: with its BOS"
    " token; false: with nothing. A text or chat template that starts so already gets no second one."
)


def bos_prefix(tokenizer: PreTrainedTokenizerBase, add_bos: AddBos = "auto") -> list[int]:
    """Return the token ids that every sequence starts with, in most cases a BOS token or none.

    Args:
        add_bos: "auto": what the tokenizer puts before a text that it encodes with special tokens; "true": its BOS
            token; "false": nothing.

    Raises:
        ValueError: "true" for a tokenizer without a BOS token, or "auto" for one whose start cannot be told.
    """
    if add_bos == "false":
        return []
    if add_bos == "true":
        if tokenizer.bos_token_id is None:
            raise ValueError("--add_bos: expected a tokenizer that has a BOS token for 'true', got one without")
        return [tokenizer.bos_token_id]
    plain, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    raise ValueError(
        f"--add_bos: expected 'true' or 'false' for a tokenizer that encodes 'a' as {whole} with special tokens and as"
        f" {plain} without them: 'auto' cannot tell what it puts before a text"
    )


def start_sequence(prefix: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """Put a prefix before the tokens of a text, unless they start with it already or there are none."""
    there = list(tokens[: len(prefix)]) == list(prefix)
    return list(tokens) if there or not tokens else [*prefix, *tokens]


def start_context(prefix: Sequence[int], tokens: Ids) -> Ids:
    """Put a prefix before the tokens of a context, which may have none, unless they start with it already."""
    return tokens if starts_with(prefix, tokens) else np.concatenate([np.asarray(prefix, dtype=tokens.dtype), tokens])


def starts_with(prefix: Sequence[int], tokens: Ids) -> bool:
    """Return whether the tokens begin with the prefix, as those of a chat template may."""
    return tokens[: len(prefix)].tolist() == list(prefix)


def describe_start(tokenizer: PreTrainedTokenizerBase, add_bos: AddBos, prefix: Sequence[int]) -> str:
    """Say for the summary how sequences start."""
    if prefix:
        reason = "as the tokenizer starts a text" if add_bos == "auto" else "--add_bos true"
        return f"start, for both models, with {tokenizer.decode(list(prefix))!r} ({reason})"
    if add_bos == "auto":
        return "start with nothing added: the tokenizer puts nothing before a text"
    left_out = bos_prefix(tokenizer) if add_bos == "false" else []
    would = f", though the tokenizer starts a text with {tokenizer.decode(left_out)!r}" if left_out else ""
    return f"start with nothing added (--add_bos false){would}"
