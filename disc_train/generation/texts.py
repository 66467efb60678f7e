"""Say which texts are to be generated, and which of them a file has already."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from disc_train.data.chat import encode
from disc_train.data.context_length import ContextLength
from disc_train.data.sequence_start import bos_prefix, start_sequence
from disc_train.generation.config import GenerateArguments
from disc_train.generation.sources import Source


class TextToGenerate(NamedTuple):
    id: str  # the source, the text's number, and a digest of all that decides what is generated
    source: Source
    prompt: list[int]
    seed: int


def list_texts(
    arguments: GenerateArguments,
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    limit: ContextLength | None,
) -> tuple[list[TextToGenerate], list[str]]:
    """List all texts to generate in the order of the file, and the sources that are left out with the reason.

    Raises:
        ValueError: no source is left.
    """
    prefix = bos_prefix(tokenizer, arguments.add_bos)
    texts: list[TextToGenerate] = []
    left_out: list[str] = []
    for index, source in enumerate(sources):
        if not source.prompt.strip():
            left_out.append(f"{source.name} (empty)")
            continue
        plain = encode(tokenizer, source.prompt).tolist()
        prompt = start_sequence(prefix, plain)
        tokens = len(prompt) + arguments.max_new_tokens
        if limit is not None and tokens > limit.tokens:
            left_out.append(f"{source.name} ({tokens:,} tokens with its text, the model reads {limit.tokens:,})")
            continue
        # What starts the prompt comes last, and may be nothing: then files of earlier versions can be gone on with.
        how: list[Any] = [arguments.temperature, arguments.top_p, *prompt[: len(prompt) - len(plain)]]
        if arguments.mode == "answers":
            how.append(source.contexts)  # a document's prompt has all of it
        for number in range(arguments.num_generations):
            drawn = arguments.seed, index, number
            decided = (*drawn, arguments.model_name_or_path, arguments.mode, source.prompt, arguments.max_new_tokens)
            id = f"{source.name}#{number}-{_digest(*decided, *how)[:12]}"
            texts.append(TextToGenerate(id, source, prompt, int(_digest(*drawn)[:15], 16)))
    if not texts:
        raise ValueError(f"none of {len(sources):,} {arguments.noun}s can be used: {first_of(left_out)}")
    return sorted(texts, key=lambda text: -len(text.prompt)), left_out


def first_of(names: Sequence[str], count: int = 5) -> str:
    """Join names, the first of them where they are many."""
    return ", ".join([*names[:count], *(["..."] if len(names) > count else [])])


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def count_done(path: Path, ids: Sequence[str]) -> int:
    """Count the texts, in the order of `ids`, up to the last one in a file; drop an unfinished line at its end.

    Raises:
        ValueError: naming a line that is none of these texts, or out of order. The file is then left as it is.
    """
    if not path.exists():
        return 0
    *lines, rest = path.read_bytes().split(b"\n")
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
            file.truncate(path.stat().st_size - len(rest))
    return done


def _of_another_run(path: Path, line: int) -> ValueError:
    return ValueError(
        f"--output_file: {path}:{line} is no text of this run: the documents, the model, or settings are others; choose"
        " another file"
    )
