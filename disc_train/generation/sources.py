"""Read what texts are generated from: documents, each in a request to write about it, or questions to answer.

Questions are records as `disc-train --method cd` reads them, without an answer; or, as `disc-eval`'s probes have them,
a `question`, which is a user's message, with a `context` that the teacher reads before it in that message.
"""

from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from disc_train.data.chat import chat_text, check_messages
from disc_train.data.documents import load_documents
from disc_train.data.record_forms import Content, contexts_and_target
from disc_train.data.records import Fields, check_text, read_records
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


QUESTIONS = Fields(
    required=("teacher_context",),
    optional=("student_context", "teacher_prompt", "context"),
    forms=(("prompt", "privileged_context"), ("messages",), ("question",)),
    records="questions",
)


class Source(NamedTuple):
    """Hold what texts are generated from."""

    name: str
    prompt: str  # what the model reads; empty for an empty document
    contexts: dict[str, Content]  # of the teacher and the student, for a record that cd reads


def read_sources(arguments: GenerateArguments, tokenizer: PreTrainedTokenizerBase) -> list[Source]:
    """Read the documents or the questions that the arguments name.

    Raises:
        ValueError: naming the record or the flag: a template that does not write the document, fields of wrong types,
            messages that the chat template does not take, a question without anything that the teacher alone reads.
    """
    if arguments.mode == "answers":
        records = read_records(arguments.train_file, arguments.dataset_name, QUESTIONS)
        return [_question(name, record, arguments.teacher_system_prompt, tokenizer) for name, record in records]
    defaults = CHAT_TEMPLATES if tokenizer.chat_template else PLAIN_TEMPLATES
    template = arguments.prompt_template or defaults[arguments.mode]
    sources = []
    for document in load_documents(arguments.train_file, arguments.dataset_name, arguments.text_column):
        text = document.text
        prompt = render("--prompt_template", template, tokenizer, document=text) if text.strip() else ""
        if text.strip() not in prompt:
            raise ValueError("--prompt_template: expected a template that writes {{ document }}, unchanged")
        contexts: dict[str, Content] = {"teacher_context": f"{text}\n\n", "student_context": ""}
        sources.append(Source(document.name, prompt, contexts if arguments.mode == "cd" else {}))
    return sources


def _question(
    name: str, record: dict[str, Any], system_prompt: str | None, tokenizer: PreTrainedTokenizerBase
) -> Source:
    if "question" in record:
        record = _as_messages(name, record, system_prompt)
    if "messages" in record:
        messages = check_messages(name, "messages", record["messages"])
        if not messages or messages[-1]["role"] != "user":
            raise ValueError(f"{name}: expected messages that end with the user's, got {messages}")
        record = record | {"messages": [*messages, {"role": "assistant", "content": ""}]}
    # What it is read for is an answer, which these do not have yet.
    contexts = contexts_and_target(name, {"target": "", "completion": ""} | record, system_prompt)
    del contexts["target"]
    teacher = contexts["teacher_context"]
    try:
        prompt = teacher if isinstance(teacher, str) else chat_text(tokenizer, teacher)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not prompt.strip():
        raise ValueError(f"{name}: expected a teacher_context that is not empty")
    return Source(name, prompt, contexts)


def _as_messages(name: str, record: dict[str, Any], system_prompt: str | None) -> dict[str, Any]:
    question, context = check_text(name, "question", record["question"]), record.get("context")
    if not question.strip():
        raise ValueError(f"{name}: expected a question that is not empty")
    messages = {"messages": [{"role": "user", "content": question}]}
    if context is None and system_prompt is None:
        raise ValueError(f"{name}: expected a context beside a question, or --teacher_system_prompt, got neither")
    if context is None:
        return messages
    return messages | {"teacher_prompt": f"{check_text(name, 'context', context)}\n\n{question}"}
