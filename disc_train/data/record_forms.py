"""Read records in the forms of other libraries as contexts and a target.

- TRL's self-distillation (SDFT): `prompt`, `privileged_context`, `completion`. The student reads the prompt; the
  teacher also an empty line and the privileged context, in the last message if the prompt is a list of them.
- `messages` that end with the assistant's, which is the target. The student reads those before. For the teacher,
  ms-swift's `teacher_prompt` takes the place of the last user message, and a system prompt that of any other.
"""

from typing import Any

from disc_train.data.chat import Message, check_messages
from disc_train.data.records import check_text

SDFT = ("prompt", "privileged_context", "completion")
Content = str | list[Message]


def contexts_and_target(name: str, record: dict[str, Any], teacher_system_prompt: str | None) -> dict[str, Content]:
    """Return a record's teacher_context, student_context and target.

    Raises:
        ValueError: naming the record: fields of wrong types, messages that do not end as they should, or nothing that
            the teacher reads beyond the student.
    """
    native = {"teacher_context", "target"} <= record.keys()
    sdft = not native and set(SDFT) <= record.keys()
    if not native and not sdft:
        return _from_messages(name, record, teacher_system_prompt)
    if teacher_system_prompt is not None:
        raise ValueError(f"{name}: --teacher_system_prompt is for records with messages, got {', '.join(record)}")
    fields = {field: check_content(name, field, value) for field, value in record.items()}
    if native:
        return {field: fields.get(field, "") for field in ("teacher_context", "student_context", "target")}
    prompt, privileged, completion = (fields[field] for field in SDFT)
    if isinstance(privileged, list):
        privileged = "\n".join(message["content"] for message in privileged if message["content"])  # as TRL has it
    if not privileged.strip():
        raise ValueError(f"{name}: expected a privileged_context that is not empty")
    if isinstance(prompt, str):
        return {"teacher_context": f"{prompt}\n\n{privileged}", "student_context": prompt, "target": completion}
    *before, last = prompt
    if last["role"] != "user":
        raise ValueError(f"{name}: expected a prompt that ends with the user's message, got the {last['role']}'s")
    teacher = [*before, last | {"content": f"{last['content']}\n\n{privileged}"}]
    return {"teacher_context": teacher, "student_context": prompt, "target": completion}


def _from_messages(name: str, record: dict[str, Any], teacher_system_prompt: str | None) -> dict[str, Content]:
    value, teacher_prompt = record["messages"], record.get("teacher_prompt")
    messages = check_messages(name, "messages", value if isinstance(value, list) else [value])
    roles = [message["role"] for message in messages]
    if roles[-1:] != ["assistant"] or "user" not in roles:
        raise ValueError(f"{name}: expected messages, a user's among them, that end with the assistant's, got {roles}")
    *context, answer = messages
    teacher = list(context)
    if teacher_prompt is not None:
        last_user = max(place for place, role in enumerate(roles) if role == "user")
        teacher[last_user] = {"role": "user", "content": check_text(name, "teacher_prompt", teacher_prompt)}
    if teacher_system_prompt is not None:
        others = [message for message in teacher if message["role"] != "system"]
        teacher = [{"role": "system", "content": teacher_system_prompt}, *others]
    if teacher == context:
        neither = teacher_prompt is None and teacher_system_prompt is None
        raise ValueError(
            f"{name}: expected a teacher_prompt or --teacher_system_prompt beside messages, got"
            f" {'neither' if neither else 'one that is equal to what the student reads'}"
        )
    return {"teacher_context": teacher, "student_context": context, "target": [answer]}


def check_content(name: str, field: str, value: Any) -> Content:
    """Return a value that is a text or messages, the empty text for nothing; raise ValueError for others."""
    if value is None or value == []:
        return ""
    if isinstance(value, str):
        return check_text(name, field, value)
    if not isinstance(value, list):
        raise ValueError(f"{name}: {field!r} must be a string or a list of messages, got {type(value).__name__}")
    return check_messages(name, field, value)
