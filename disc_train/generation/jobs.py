"""Which texts are to be written, and which of them are there already."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from disc_train.chat import encode
from disc_train.context_length import ContextLength
from disc_train.documents import Document
from disc_train.generation.config import GenerateArguments
from disc_train.templates import render

# For models with a chat template, and for others.
DEFAULT_TEMPLATES: dict[tuple[str, bool], str] = {
    ("rephrase", True): '{{ chat("Write the following text again in other words. Keep every fact and add none. Answer'
    ' with the text alone.\\n\\n" ~ document) }}',
    ("rephrase", False): "{{ document }}\n\nThe same in other words:\n\n\n",  # Jinja drops one newline at the end
    (
        "cd",
        True,
    ): '{{ chat("Here is a text:\\n\\n" ~ document ~ "\\n\\nGo on from it, or write what follows from it, in a'
    ' few sentences that say what they are about. Answer with these alone.") }}',
    ("cd", False): "{{ document }}\n\n\n",
}


class Job(NamedTuple):
    """One text to write."""

    id: str  # the document, the text's number, and a digest of all that decides what is written
    document: Document
    prompt: list[int]
    seed: int


def plan(
    arguments: GenerateArguments,
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    limit: ContextLength | None,
) -> tuple[list[Job], list[str]]:
    """All texts to write, in the order of the file, and which documents are left out and why.

    Raises:
        ValueError: a template that does not write the document, or no document is left.
    """
    template = arguments.prompt_template or DEFAULT_TEMPLATES[arguments.mode, bool(tokenizer.chat_template)]
    jobs: list[Job] = []
    left_out: list[str] = []
    for index, document in enumerate(documents):
        if not document.text.strip():
            left_out.append(f"{document.name} (empty)")
            continue
        text = render("--prompt_template", template, tokenizer, document=document.text)
        if document.text.strip() not in text:
            raise ValueError("--prompt_template: expected a template that writes {{ document }}, unchanged")
        prompt = encode(tokenizer, text).tolist()
        tokens = len(prompt) + arguments.max_new_tokens
        if limit is not None and tokens > limit.tokens:
            left_out.append(f"{document.name} ({tokens:,} tokens with its text, the model reads {limit.tokens:,})")
            continue
        for number in range(arguments.num_generations):
            drawn = arguments.seed, index, number
            decided = (*drawn, arguments.model_name_or_path, arguments.mode, text, arguments.max_new_tokens)
            id = f"{document.name}#{number}-{_digest(*decided, arguments.temperature, arguments.top_p)[:12]}"
            jobs.append(Job(id, document, prompt, int(_digest(*drawn)[:15], 16)))
    if not jobs:
        raise ValueError(f"none of {len(documents):,} documents can be used: {'; '.join(left_out)}")
    return sorted(jobs, key=lambda job: -len(job.prompt)), left_out


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def resume(path: Path, ids: Sequence[str]) -> int:
    """How many of the texts, counted along `ids`, are behind the last one in a file; half a line at its end goes.

    Raises:
        ValueError: naming the line, a record that is none of these, or out of order.
    """
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    places = {id: place for place, id in enumerate(ids)}
    done = 0
    for number, line in enumerate(whole.decode("utf-8", errors="replace").split("\n")[:-1], start=1):
        try:
            place = places[json.loads(line)["id"]]
        except (ValueError, KeyError, TypeError):
            place = -1
        if place < done:
            raise ValueError(
                f"--output_file: {path}:{number} is no text of this run: the documents, the model, or settings are"
                " others; choose another file"
            )
        done = place + 1
    return done
