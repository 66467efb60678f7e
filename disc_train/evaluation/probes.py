"""Probes: what a model is asked. As their files have them, and in the words of a model.

A file is JSON Lines, or another kind of `disc_train.data.records`. A record has a `question`, or a `prompt`: a text to
go on from, or chat messages. `choices` are texts, `answer` is one of them or its index; without choices `answer` is a
text, and only what the model generates is compared with it. `context` is what the answer can be read in; `document` in
its place names a document by its `id`. `group` is what results are averaged over, by default the file's name; `id` is
the probe's name in results, by default its file and line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from disc_train.data.chat import Message, chat_text, check_messages, reply_text
from disc_train.data.records import Fields, check_text, read_records

FIELDS = Fields(
    required=("answer",),
    optional=("question", "prompt", "choices", "context", "document", "group", "id"),
    records="probes",
)


@dataclass(frozen=True)
class Probe:
    """A text to go on from, and the continuations to choose among; a continuation brings its own leading space."""

    prompt: str
    choices: Sequence[str]
    answer: int  # index of the right choice
    context: str = ""  # put before the prompt, as it is

    def __post_init__(self) -> None:
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"answer: expected an index of the {len(self.choices)} choices, got {self.answer}")


@dataclass(frozen=True)
class Question:
    """A probe as its file has it."""

    name: str  # where it came from: "facts.jsonl:3"
    id: str
    group: str
    prompt: str | list[Message]
    choices: list[str]  # one, the answer: there is nothing to choose among
    answer: int  # index of the right choice
    context: str = field(default="", repr=False)

    @property
    def text(self) -> str:
        """What is asked, without a context or a model's chat form."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]

    def probe(self, tokenizer: PreTrainedTokenizerBase, with_context: bool = False) -> Probe:
        """In the model's words: messages as its chat template writes them, the choices as the assistant's reply. The
        context is put before a text, or before the last message within it, with an empty line between.

        Raises:
            ValueError: naming the probe, what the chat template does not take.
        """
        context = f"{self.context}\n\n" if with_context else ""
        if isinstance(self.prompt, str):
            space = "" if self.prompt[-1:].isspace() else " "
            choices = [choice if choice[:1].isspace() else space + choice for choice in self.choices]
            return Probe(self.prompt, choices, self.answer, context)
        *before, last = self.prompt
        messages = [*before, last | {"content": context + last["content"]}]
        try:
            prompt = chat_text(tokenizer, messages)
            choices = [
                reply_text(tokenizer, messages, prompt, {"role": "assistant", "content": choice})
                for choice in self.choices
            ]
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        return Probe(prompt, choices, self.answer)


def read_questions(
    paths: Sequence[str], tokenizer: PreTrainedTokenizerBase, documents: Mapping[str, str] | None = None
) -> list[Question]:
    """Read every probe of some files.

    Args:
        tokenizer: where it has a chat template a `question` is a user's message, else "Question: ...", "Answer:".
        documents: by id; None: a probe's `document` is not looked up, and it has no context.

    Raises:
        ValueError: naming the file and line of the first bad probe, and the number of all of them.
    """
    questions: list[Question] = []
    bad: list[str] = []
    seen: dict[str, str] = {}  # id -> name
    for path in paths:
        for name, record in read_records(path, None, FIELDS):
            try:
                question = _question(name, record, tokenizer, documents)
                if question.id in seen:
                    raise ValueError(f"{name}: id {question.id!r} is that of {seen[question.id]} too")
            except ValueError as error:
                bad.append(str(error))
                continue
            seen[question.id] = name
            questions.append(question)
    if bad:
        others = f" ({len(bad):,} of {len(bad) + len(questions):,} probes are bad)" if len(bad) > 1 else ""
        raise ValueError(f"{bad[0]}{others}")
    return questions


def read_documents(path: str) -> dict[str, str]:
    """The texts of a file of documents by their `id`.

    Raises:
        ValueError: a record without an id or a text, or an id that another has.
    """
    documents: dict[str, str] = {}
    for name, record in read_records(path, None, Fields(required=("id", "text"), records="documents")):
        if not isinstance(record["id"], (str, int)) or str(record["id"]) in documents:
            raise ValueError(f"{name}: expected an id, a text or a number, that no other document has")
        documents[str(record["id"])] = check_text(name, "text", record["text"])
    return documents


def _question(
    name: str,
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    documents: Mapping[str, str] | None,
) -> Question:
    choices, answer = _choices(name, record)
    file, _, line = name.rpartition(":")
    stem = Path(file).stem
    return Question(
        name=name,
        id=_label(name, record, "id", f"{stem}:{line}"),
        group=_label(name, record, "group", stem),
        prompt=_prompt(name, record, tokenizer),
        choices=choices,
        answer=answer,
        context=_context(name, record, documents),
    )


def _choices(name: str, record: dict[str, Any]) -> tuple[list[str], int]:
    choices, answer = record.get("choices"), record["answer"]
    if choices is None:
        if not (isinstance(answer, str) and answer.strip()):
            raise ValueError(f"{name}: expected choices, or an answer that is a text and not empty, got {answer!r}")
        return [check_text(name, "answer", answer)], 0
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"{name}: expected choices that are a list of at least two texts, got {choices!r}")
    for choice in choices:
        if not check_text(name, "choices", choice).strip():
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
        got = "neither" if prompt is None else "both"
        raise ValueError(f"{name}: expected one of question and prompt, got {got}")
    if question is not None:
        if not check_text(name, "question", question).strip():
            raise ValueError(f"{name}: expected a question that is not empty")
        if tokenizer.chat_template:
            return [{"role": "user", "content": question}]
        return f"Question: {question}\nAnswer:"
    if not isinstance(prompt, list):
        if not check_text(name, "prompt", prompt).strip():
            raise ValueError(f"{name}: expected a prompt that is not empty")
        return prompt  # type: ignore[return-value]
    messages = check_messages(name, "prompt", prompt)
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise ValueError(f"{name}: expected a prompt that ends with a user's message, not empty; got {prompt!r}")
    return messages


def _context(name: str, record: dict[str, Any], documents: Mapping[str, str] | None) -> str:
    context, document = record.get("context"), record.get("document")
    if context is not None:
        return check_text(name, "context", context)
    if document is None or documents is None:
        return ""
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
