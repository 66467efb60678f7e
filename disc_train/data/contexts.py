"""Read records for context distillation: what the teacher reads, what the student reads, and the target.

Each is a text, or chat messages (a list of {"role": ..., "content": ...}) that the model's chat template writes: a
context's up to where the assistant's answer begins, a target's from there on, with whatever ends a turn. Contexts and
target are tokenised each on its own and joined, so that both models read the same target. Records in the forms of other
libraries are read as they are, see `record_forms.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from disc_train.data.chat import Message, chat_text, encode, reply_text
from disc_train.data.example import Branch, Context, Example, Ids
from disc_train.data.record_forms import SDFT, Content, contexts_and_target
from disc_train.data.records import Fields, Record, read_records
from disc_train.data.sequence_start import start_context, starts_with

FIELDS = Fields(
    required=("teacher_context", "target"),
    optional=("student_context", "teacher_prompt"),
    forms=(SDFT, ("messages",)),
    meant={"text": "--method disc"},
)


def load_records(
    train_file: str | Path | Sequence[str] | None,
    dataset_name: str | None,
    tokenizer: PreTrainedTokenizerBase,
    start: Sequence[int] = (),
    flag: str = "--train_file",
    teacher_system_prompt: str | None = None,
) -> list[Example]:
    """Read the records of files, folders and patterns, or of a Hub dataset, as examples.

    Args:
        start: the tokens that every context starts with.
        flag: the one that named the file, for messages.
        teacher_system_prompt: what the teacher's messages begin with, where records have `messages`.

    Raises:
        ValueError: naming the record: a field that is missing (student_context may be) or neither text nor messages; a
            teacher_context or target that is empty or white space; messages that the chat template does not take.
    """
    records = read_records(train_file, dataset_name, FIELDS._replace(flag=flag))
    return make_examples(records, tokenizer, start, flag if train_file else "--dataset_name", teacher_system_prompt)


def make_examples(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    start: Sequence[int],
    flag: str,
    teacher_system_prompt: str | None,
) -> list[Example]:
    """Make examples of records that are read already; arguments and errors are those of `load_records`."""
    encode_context = cache(lambda text: start_context(start, encode(tokenizer, text)))  # many records may share one
    try:
        return [
            _example(name, contexts_and_target(name, record, teacher_system_prompt), tokenizer, encode_context, start)
            for name, record in records
        ]
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error


def _example(
    name: str,
    fields: dict[str, Content],
    tokenizer: PreTrainedTokenizerBase,
    encode_context: Callable[[str], Ids],
    start: Sequence[int],
) -> Example:
    try:
        texts = _texts(fields, tokenizer)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    teacher, student = encode_context(texts["teacher_context"]), encode_context(texts["student_context"])
    target = encode(tokenizer, texts["target"])
    if start and starts_with(start, target):
        target = target[len(start) :]
    for field, ids in (("teacher_context", teacher), ("target", target)):
        if ids.tolist() in ([], list(start)) or not texts[field].strip():  # a start alone is not a context
            raise ValueError(f"{name}: expected a {field} that is not empty")
    return Example(name, teacher, student, [Branch(target, Context(len(teacher)), Context(len(student)))])


def _texts(fields: dict[str, Content], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Write the fields as text."""
    # Chat messages of a target are written after their context's alone: many templates want the user to begin.
    target = fields["target"]
    texts = {
        field: value if isinstance(value, str) else chat_text(tokenizer, value)
        for field, value in fields.items()
        if field != "target"
    }
    if isinstance(target, str):
        return texts | {"target": target}
    if len(target) != 1 or target[0]["role"] != "assistant":
        raise ValueError(f"expected a target of one message, the assistant's, got {[turn['role'] for turn in target]}")
    if not target[0]["content"].strip():
        raise ValueError("expected a target that is not empty")
    answers = {_answer(text, fields[field], target, tokenizer) for field, text in texts.items() if fields[field]}
    if len(answers) > 1:
        raise ValueError("the chat template writes the target differently after teacher_context and student_context")
    return texts | {"target": answers.pop() if answers else ""}


def _answer(prompt: str, context: Content, target: list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """Write what the chat template adds for the target after the prompt of its context."""
    if isinstance(context, str):
        raise ValueError("a target of chat messages needs contexts of chat messages (an empty student_context apart)")
    return reply_text(tokenizer, context, prompt, target[0])
