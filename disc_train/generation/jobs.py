"""Which texts are to be written, and which of them are there already."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from disc_train.data.chat import encode
from disc_train.data.context_length import ContextLength
from disc_train.data.documents import Document
from disc_train.data.templates import render
from disc_train.generation.config import GenerateArguments

# For models with a chat template; then for others, where Jinja drops one newline at the end.
CHAT_TEMPLATES = {
    "rephrase": '{{ chat("Write the following text again in other words. Keep every fact and add none. Answer with the'
    ' text alone.\\n\\n" ~ document) }}',
    "cd": '{{ chat("Here is a text:\\n\\n" ~ document ~ "\\n\\nGo on from it, or write what follows from it, in a few'
    ' sentences that say what they are about. Answer with these alone.") }}',
}
PLAIN_TEMPLATES = {
    "rephrase": "{{ document }}\n\nThe same in other words:\n\n\n",
    "cd": "{{ document }}\n\n\n",
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
    defaults = CHAT_TEMPLATES if tokenizer.chat_template else PLAIN_TEMPLATES
    template = arguments.prompt_template or defaults[arguments.mode]
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
    """How many of the texts, counted along `ids`, are behind the last one in a file; half a line at its end is dropped.

    Raises:
        ValueError: naming the line, one that is none of these, or out of order. The file is then left as it is.
    """
    if not path.exists():
        return 0
    content = path.read_bytes()
    *lines, rest = content.split(b"\n")
    places = {id: place for place, id in enumerate(ids)}
    done = 0
    for number, line in enumerate(lines, start=1):
        try:
            place = places[json.loads(line)["id"]]
        except (ValueError, KeyError, TypeError):
            place = -1
        if place < done:
            raise _of_another_run(path, number)
        done = place + 1
    if rest:
        beginnings = (json.dumps({"id": id}, ensure_ascii=False)[:-1].encode() for id in ids[done:])
        if not any(rest.startswith(begin) or begin.startswith(rest) for begin in beginnings):
            raise _of_another_run(path, len(lines) + 1)
        with path.open("r+b") as file:
            file.truncate(len(content) - len(rest))
    return done


def _of_another_run(path: Path, line: int) -> ValueError:
    return ValueError(
        f"--output_file: {path}:{line} is no text of this run: the documents, the model, or settings are others; choose"
        " another file"
    )
