"""Read what a model is asked: files of probes, into the model's own prompts and choices.

A file is JSON Lines, or another kind of `disc_train.data.records`. A record has a `question`, or a `prompt`: a text to
go on from, or chat messages. `choices` are texts, `answer` is one of them or its index; without choices `answer` is a
text, and only what the model generates is compared with it. `context` is what the answer can be read in; `document` in
its place names a document by its `id`. `group` is what results are averaged over, by default the file's name; `id` is
the probe's name in results, by default its file and line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from disc_train.data.chat import Message, chat_text, check_messages, encode, reply_text
from disc_train.data.context_length import length_of
from disc_train.data.example import Ids
from disc_train.data.records import Fields, check_text, read_records
from disc_train.data.sequence_start import start_context
from disc_train.models.causal_lm import check_vocabulary

FIELDS = Fields(
    required=(),  # each is looked for here, so that one probe without an answer does not hide the others
    optional=("answer", "question", "prompt", "choices", "context", "document", "group", "id"),
    records="probes",
    flag="--probes_file",
)


@dataclass(frozen=True)
class Probe:
    """Hold a text to go on from, and the continuations to choose among; a continuation brings its own leading space."""

    prompt: str
    choices: Sequence[str]
    answer: int  # index of the right choice
    context: str = ""  # put before the prompt, as it is

    def __post_init__(self) -> None:
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"answer: expected an index of the {len(self.choices)} choices, got {self.answer}")


@dataclass(frozen=True)
class Question:
    """Hold a record of a file of probes, as prompts and choices in a model's own format."""

    id: str
    group: str
    text: str  # what is asked, without a context or the model's chat template
    closed_book: Probe
    in_context: Probe | None  # behind its context, if it has one


def encode_probes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe], prefix: Sequence[int]
) -> list[tuple[Ids, list[Ids]]]:
    """Encode what comes before each probe's choices, after the `prefix` of every sequence, and the choices.

    Raises:
        ValueError: naming a probe in which one of them has no tokens, or a token that is none of the model's.
    """
    encoded = []
    for number, probe in enumerate(probes):
        prompt, *choices = (encode(tokenizer, text) for text in (probe.context + probe.prompt, *probe.choices))
        if not all(map(len, (prompt, *choices))):
            raise ValueError(f"probes[{number}]: expected tokens in the prompt and in every choice, got {probe}")
        encoded.append((start_context(prefix, prompt), choices))
        check_vocabulary(model, max(int(ids.max()) for ids in (encoded[-1][0], *choices)))
    return encoded


def too_long(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefix: Sequence[int],
    probe: Probe,
    max_new_tokens: int = 0,
) -> str | None:
    """Say why the model cannot read a probe with what follows it; None if it can. Raise as `encode_probes` does."""
    ((prompt, choices),) = encode_probes(model, tokenizer, [probe], prefix)
    limit = length_of(model.config, "model")
    tokens = len(prompt) + max(max_new_tokens, *map(len, choices))
    if limit is None or tokens <= limit.tokens:
        return None
    return f"{tokens} tokens with what follows the prompt, the model reads {limit.tokens}{limit.note}"


def read_questions(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    documents: Mapping[str, str] | None = None,
    closed_book: bool = False,
) -> list[Question]:
    """Read every probe of some files.

    Args:
        tokenizer: where it has a chat template a `question` is a user's message, else "Question: ...", "Answer:".
        documents: by id, for probes that name a `document`.
        closed_book: leave out what the answers can be read in.

    Raises:
        ValueError: naming the file and line of the first bad probe, and the number of all of them.
    """
    questions: list[Question] = []
    bad: list[str] = []
    names: dict[str, str] = {}  # of the record that has an id
    for path in paths:
        for name, record in read_records(path, None, FIELDS):
            if closed_book:
                record = record | {name: None for name in ("context", "document") if name in record}
            try:
                question = _question(name, record, tokenizer, documents)
                if question.id in names:
                    raise ValueError(f"{name}: id {question.id!r} is that of {names[question.id]} too")
            except ValueError as error:
                bad.append(str(error))
                continue
            names[question.id] = name
            questions.append(question)
    if bad:
        verb = "is" if len(bad) == 1 else "are"
        raise ValueError(f"--probes_file: {bad[0]} ({len(bad):,} of {len(bad) + len(questions):,} probes {verb} bad)")
    return questions


def list_groups(paths: Sequence[str]) -> list[str]:
    """List the groups of the probes of some files, in the order in which they come."""
    names = ((name, record) for path in paths for name, record in read_records(path, None, FIELDS))
    return list(dict.fromkeys(_group(name, record) for name, record in names))


def read_documents(path: str) -> dict[str, str]:
    """Read the texts of a file of documents by their `id`.

    Raises:
        ValueError: a record without an id or a text, or an id that another has.
    """
    documents: dict[str, str] = {}
    fields = Fields(required=("id", "text"), records="documents", flag="--documents_file")
    for name, record in read_records(path, None, fields):
        if not isinstance(record["id"], (str, int)) or str(record["id"]) in documents:
            raise ValueError(f"{name}: expected an id, a text or a number, that no other document has")
        documents[str(record["id"])] = check_text(name, "text", record["text"])
    return documents


def _question(
    name: str, record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, documents: Mapping[str, str] | None
) -> Question:
    file, _, line = name.rpartition(":")
    stem = Path(file).stem
    choices, answer = _choices(name, record)
    prompt = _prompt(name, record, tokenizer)
    context = _context(name, record, documents)
    return Question(
        id=_label(name, record, "id", f"{stem}:{line}"),
        group=_group(name, record),
        text=prompt if isinstance(prompt, str) else prompt[-1]["content"],
        closed_book=_probe(name, tokenizer, prompt, choices, answer, ""),
        in_context=_probe(name, tokenizer, prompt, choices, answer, f"{context}\n\n") if context else None,
    )


def _group(name: str, record: dict[str, Any]) -> str:
    return _label(name, record, "group", Path(name.rpartition(":")[0]).stem)


def _probe(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[Message],
    choices: list[str],
    answer: int,
    context: str,
) -> Probe:
    """Write messages as the chat template does, with the choices as the assistant's reply and the context within the
    last message; put the context before a text."""
    if isinstance(prompt, str):
        space = "" if prompt[-1:].isspace() else " "
        return Probe(prompt, [each if each[:1].isspace() else space + each for each in choices], answer, context)
    messages = [*prompt[:-1], prompt[-1] | {"content": context + prompt[-1]["content"]}]
    try:
        text = chat_text(tokenizer, messages)
        replies = [reply_text(tokenizer, messages, text, {"role": "assistant", "content": each}) for each in choices]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return Probe(text, replies, answer)


def _choices(name: str, record: dict[str, Any]) -> tuple[list[str], int]:
    """Return the choices and the index of the right one; the answer alone where there is nothing to choose among."""
    if "answer" not in record:
        raise ValueError(f"{name}: no field 'answer'; there is: {', '.join(record) or 'none at all'}")
    choices, answer = record.get("choices"), record["answer"]
    if choices is None:
        if not (isinstance(answer, str) and answer.strip()):
            raise ValueError(f"{name}: expected choices, or an answer that is a text and not empty, got {answer!r}")
        return [check_text(name, "answer", answer)], 0
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"{name}: expected choices that are a list of at least two texts, got {choices!r}")
    if not all(check_text(name, "choices", choice).strip() for choice in choices):
        raise ValueError(f"{name}: expected choices that are not empty, got {choices!r}")
    if len({choice.strip() for choice in choices}) < len(choices):
        raise ValueError(f"{name}: expected choices that differ, got {choices!r}")
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(choices):
            raise ValueError(f"{name}: expected an answer that is an index of the {len(choices)} choices, got {answer}")
        return choices, answer
    if answer not in choices:
        raise ValueError(f"{name}: expected an answer that is among the choices {choices!r}, got {answer!r}")
    return choices, choices.index(answer)


def _prompt(name: str, record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str | list[Message]:
    question, prompt = record.get("question"), record.get("prompt")
    if (question is None) == (prompt is None):
        raise ValueError(f"{name}: expected one of question and prompt, got {'neither' if prompt is None else 'both'}")
    if isinstance(prompt, list):
        messages = check_messages(name, "prompt", prompt)
        if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
            raise ValueError(f"{name}: expected a prompt that ends with a user's message, not empty; got {prompt!r}")
        return messages
    field, text = ("question", question) if prompt is None else ("prompt", prompt)
    if not check_text(name, field, text).strip():
        raise ValueError(f"{name}: expected a {field} that is not empty")
    if prompt is not None:
        return prompt
    return [{"role": "user", "content": text}] if tokenizer.chat_template else f"Question: {text}\nAnswer:"


def _context(name: str, record: dict[str, Any], documents: Mapping[str, str] | None) -> str:
    context, document = record.get("context"), record.get("document")
    if context is not None:
        return check_text(name, "context", context)
    if document is None:
        return ""
    if documents is None:
        raise ValueError(f"{name}: expected --documents_file for a probe that names a document, {document!r}, got none")
    if str(document) not in documents:
        raise ValueError(f"{name}: expected a document that the --documents_file has, got {document!r}")
    return documents[str(document)]


def _label(name: str, record: dict[str, Any], field: str, default: str) -> str:
    value = record.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise ValueError(f"{name}: {field!r} must be a text that is not empty, or a number, got {value!r}")
    return str(value)
