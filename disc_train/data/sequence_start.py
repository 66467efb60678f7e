"""How a sequence starts: with the tokens that the model's tokenizer puts before a text, mostly a BOS token or none."""

from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

ADD_BOS_HELP = (
    "Start every sequence with a BOS token. auto: with what the tokenizer itself puts before a text; true: with its BOS"
    " token; false: with nothing. A text or chat template that starts so already gets no second one."
)


def bos_prefix(tokenizer: PreTrainedTokenizerBase, add_bos: Literal["auto", "true", "false"] = "auto") -> list[int]:
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
