"""Turn texts and chat messages into text and tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from disc_train.data.example import Ids
from disc_train.data.records import check_text

Message = dict[str, Any]


def check_messages(name: str, field: str, messages: list[Any]) -> list[Message]:
    """Return `messages` if each has a role and a content that are texts; raise ValueError if not."""
    for message in messages:
        if not (isinstance(message, dict) and {"role", "content"} <= message.keys()):
            raise ValueError(f"{name}: {field!r} must be a string or a list of messages with role and content")
        check_text(name, f"{field}.role", message["role"])
        check_text(name, f"{field}.content", message["content"])
    return messages


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generation_prompt: bool = True) -> str:
    """Write messages by the model's own chat template; by default up to where the assistant's next turn begins.

    Raises:
        ValueError: the tokenizer has no chat template, or its template does not take these messages.
    """
    if not tokenizer.chat_template:
        raise ValueError("expected a model with a chat template for chat messages, got a tokenizer without one")
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation_prompt)  # type: ignore[return-value]
    except Exception as error:  # of whatever kind a template's own expressions raise; many raise on purpose
        raise ValueError(f"the model's chat template does not take these messages: {error}") from error


def reply_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompt: str, reply: Message) -> str:
    """Write what the chat template adds for a reply to messages, with whatever ends a turn.

    Args:
        prompt: `chat_text` of the messages.

    Raises:
        ValueError: the template does not take these messages, or does not continue the prompt with the reply.
    """
    conversation = chat_text(tokenizer, [*messages, reply], generation_prompt=False)
    if not conversation.startswith(prompt):
        raise ValueError("the chat template does not continue the prompt with the reply; give texts, not messages")
    return conversation.removeprefix(prompt)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Ids:
    """Tokenize a text and add no special tokens; those that are written out in it become their ids."""
    # verbose=False: a text longer than the model's context is reported elsewhere.
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)
