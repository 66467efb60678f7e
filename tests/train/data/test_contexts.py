"""Records for context distillation: texts and messages as tokens, and what is refused, naming file and line."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from disc_train.config import parse_arguments
from disc_train.data.context_length import ContextLength, check_lengths
from disc_train.data.contexts import load_records
from disc_train.data.dataset import ExampleDataset
from disc_train.data.training_data import load_training_data
from tests.train.files import write_jsonl
from tests.train.world import COMMON


@pytest.fixture
def load(tmp_path, chat_tokenizer):
    """load(records, max_tokens, tokenizer, **options): the examples of a .jsonl file of these records."""

    def run(*records, max_tokens=None, tokenizer=chat_tokenizer, **options):
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        examples = load_records(str(path), None, tokenizer, **options)
        check_lengths(ExampleDataset(examples), max_tokens and ContextLength(max_tokens, "model"))
        return examples

    return run


def _texts(example, tokenizer):
    (branch,) = example.branches
    assert branch.teacher.attach == len(example.teacher_trunk)
    assert branch.student.attach == len(example.student_trunk)
    assert len(branch.teacher.lead) == len(branch.student.lead) == 0
    return tuple(tokenizer.decode(ids) for ids in (example.teacher_trunk, example.student_trunk, branch.target))


def _user(content):
    return {"role": "user", "content": content}


def _assistant(content):
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"teacher_context": "T ", "student_context": "S ", "target": " x y"}, ("T ", "S ", " x y")),
        ({"teacher_context": "T", "student_context": "", "target": "x y"}, ("T", "", "x y")),
        ({"teacher_context": "T", "student_context": None, "target": "x y", "id": 7}, ("T", "", "x y")),
        ({"teacher_context": "T", "target": "x y"}, ("T", "", "x y")),
        ({"teacher_context": [_user("T")], "target": "x y"}, ("<user>T</>\n<assistant>", "", "x y")),
        (
            {"teacher_context": [_user("T")], "student_context": [_user("S")], "target": [_assistant("x")]},
            ("<user>T</>\n<assistant>", "<user>S</>\n<assistant>", "x</>\n"),
        ),
        (
            {"teacher_context": [_user("T")], "student_context": [], "target": [_assistant("x")]},
            ("<user>T</>\n<assistant>", "", "x</>\n"),
        ),
    ],
)
def test_records(record, expected, load, chat_tokenizer):
    (example,) = load(record)
    assert _texts(example, chat_tokenizer) == expected
    assert example.name.endswith("records.jsonl:1")


CHAT = [_user("A"), _assistant("a"), _user("B")]
CHAT_TEXT = "<user>A</>\n<assistant>a</>\n<user>{}</>\n<assistant>"
SYSTEM = {"role": "system", "content": "Y"}


@pytest.mark.parametrize(
    ("record", "system", "expected"),
    [
        ({"prompt": "P", "privileged_context": "H", "completion": " x"}, None, ("P\n\nH", "P", " x")),
        (
            {"prompt": CHAT, "privileged_context": "H", "completion": [_assistant("x")]},
            None,
            (CHAT_TEXT.format("B\n\nH"), CHAT_TEXT.format("B"), "x</>\n"),
        ),
        (
            {
                "prompt": CHAT,
                "privileged_context": [_user("H"), _user(""), _assistant("I")],
                "completion": [_assistant("x")],
            },
            None,
            (CHAT_TEXT.format("B\n\nH\nI"), CHAT_TEXT.format("B"), "x</>\n"),
        ),
        (
            {"messages": [*CHAT, _assistant("x")], "teacher_prompt": "H B"},
            None,
            (CHAT_TEXT.format("H B"), CHAT_TEXT.format("B"), "x</>\n"),
        ),
        (
            {"messages": [*CHAT, _assistant("x")]},
            "S",
            ("<system>S</>\n" + CHAT_TEXT.format("B"), CHAT_TEXT.format("B"), "x</>\n"),
        ),
        (
            {"messages": [SYSTEM, *CHAT, _assistant("x")], "teacher_prompt": "H"},
            "S",
            ("<system>S</>\n" + CHAT_TEXT.format("H"), "<system>Y</>\n" + CHAT_TEXT.format("B"), "x</>\n"),
        ),
    ],
)
def test_records_in_the_forms_of_other_libraries(record, system, expected, load, chat_tokenizer):
    (example,) = load(record | {"id": 1}, teacher_system_prompt=system)
    assert _texts(example, chat_tokenizer) == expected
    (plain,) = load(dict(zip(("teacher_context", "student_context", "target"), expected, strict=True)))
    for name in ("teacher_trunk", "student_trunk"):
        assert np.array_equal(getattr(example, name), getattr(plain, name))
    assert np.array_equal(example.branches[0].target, plain.branches[0].target)


def test_the_flag_of_the_teachers_system_prompt(tmp_path, chat_tokenizer):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **COMMON}))
    path = write_jsonl(tmp_path / "records.jsonl", {"messages": [*CHAT, _assistant("x")]})
    flags = {"model_name_or_path": tmp_path, "train_file": path, "output_dir": tmp_path, "use_cpu": "true"}
    flags |= {"method": "cd", "teacher_system_prompt": "S"}
    data = load_training_data(*parse_arguments([f"--{flag}={value}" for flag, value in flags.items()]), chat_tokenizer)
    assert chat_tokenizer.decode(data.own[0].teacher_trunk).startswith("<system>S</>")


@pytest.mark.parametrize(
    ("record", "system", "message"),
    [
        ({"prompt": "P", "privileged_context": None, "completion": "x"}, None, "expected a privileged_context that is"),
        (
            {"prompt": [*CHAT, _assistant("b")], "privileged_context": "H", "completion": "x"},
            None,
            "expected a prompt that ends with the user's message, got the assistant's",
        ),
        ({"messages": CHAT}, "S", "end with the assistant's, got .'user', 'assistant', 'user'."),
        ({"messages": [_assistant("x")]}, "S", "a user's among them"),
        ({"messages": []}, "S", "a user's among them"),
        ({"messages": None}, "S", "'messages' must be a string or a list of messages"),
        ({"messages": [*CHAT, _assistant("")]}, "S", "expected a target that is not empty"),
        ({"messages": [*CHAT, _assistant("x")]}, None, "expected a teacher_prompt or --teacher_system_prompt beside"),
        (
            {"messages": [*CHAT, _assistant("x")], "teacher_prompt": CHAT[-1]["content"]},
            None,
            "got one that is equal to what the student reads",
        ),
        (
            {"messages": [SYSTEM, *CHAT, _assistant("x")]},
            SYSTEM["content"],
            "got one that is equal to what",
        ),
        ({"messages": [*CHAT, _assistant("x")], "teacher_prompt": 5}, None, "'teacher_prompt' must be a string"),
        ({"teacher_context": "T", "target": "x"}, "S", "--teacher_system_prompt is for records with messages, got"),
    ],
)
def test_what_is_wrong_in_these_forms_is_named(record, system, message, load):
    with pytest.raises(ValueError, match=r"^--train_file: .*records\.jsonl:1: .*" + message):
        load(record, teacher_system_prompt=system)


def test_equal_contexts_are_tokenised_once(load):
    first, second = load(*[{"teacher_context": "Some instruction", "target": f"x{i} y"} for i in range(2)])
    assert first.teacher_trunk is second.teacher_trunk


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_other_files(suffix, tmp_path, chat_tokenizer):
    path = tmp_path / f"records{suffix}"
    record = {"target": "x y", "teacher_context": "T", "other": "z"}
    if suffix == ".json":
        path.write_text(json.dumps([record]))
    elif suffix == ".csv":
        path.write_text("prompt,other,privileged_context,completion\n,z,T,x y\n")
    else:
        record |= {"teacher_context": [_user("T")], "target": [_assistant("x y")], "student_context": None}
        pq.write_table(pa.Table.from_pylist([record]), path)
    (example,) = load_records(str(path), None, chat_tokenizer)
    assert example.name == f"{path}:1"
    context, target = {
        ".json": ("T", "x y"),
        ".csv": ("\n\nT", "x y"),
        ".parquet": ("<user>T</>\n<assistant>", "x y</>\n"),
    }[suffix]
    assert _texts(example, chat_tokenizer) == (context, "", target)


GOOD = {"teacher_context": "T", "student_context": "S", "target": "x y"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": ""}, "expected a target that is not empty"),
        ({"target": " \n"}, "expected a target that is not empty"),
        ({"teacher_context": " \n"}, "expected a teacher_context that is not empty"),
        ({"target": []}, "expected a target that is not empty"),
        ({"target": None}, "expected a target that is not empty"),
        ({"target": 5}, "'target' must be a string or a list of messages, got int"),
        ({"teacher_context": ""}, "expected a teacher_context that is not empty"),
        ({"teacher_context": [{"role": "user"}]}, "'teacher_context' must be a string or a list of messages"),
        ({"teacher_context": [_user(["T"])]}, "'teacher_context.content' must be a string, got list"),
        ({"student_context": {"role": "user"}}, "'student_context' must be a string or a list of messages, got dict"),
        ({"student_context": "\ud800"}, "'student_context' holds a lone surrogate"),
        ({"target": [_assistant("x")]}, "a target of chat messages needs contexts of chat messages"),
        ({"target": [_user("x")], "teacher_context": [_user("T")]}, "the assistant's, got .'user'."),
        ({"target": [_assistant("x")] * 2, "teacher_context": [_user("T")]}, "expected a target of one message"),
        (
            {"target": [_assistant(" ")], "teacher_context": [_user("T")], "student_context": ""},
            "expected a target that is not empty",
        ),
        ({"student_context": "", "target": "x"}, "target 1: expected at least 2 tokens after an empty context"),
        ({"teacher_context": "T" * 100}, "at most 50 tokens together, which is what the model can read, got 10[0-9]"),
        ({"student_context": "S" * 100}, "at most 50 tokens together"),
    ],
)
def test_what_is_wrong_is_named(change, message, load):
    with pytest.raises(ValueError, match=r"records\.jsonl:2: .*" + message):
        load(GOOD, GOOD | change, max_tokens=50)


def test_the_last_token_of_a_target_is_not_read(load):
    context, tokens = GOOD["teacher_context"], 30
    assert len(load(GOOD | {"target": "~" * tokens}, max_tokens=len(context) + tokens - 1)) == 1
    with pytest.raises(ValueError, match="at most 29 tokens together"):
        load(GOOD | {"target": "~" * tokens}, max_tokens=len(context) + tokens - 2)


def test_missing_fields(load):
    with pytest.raises(ValueError, match=r"records\.jsonl:2: no field 'target'; there is: teacher_context"):
        load(GOOD, {"teacher_context": "T"})
    with pytest.raises(ValueError, match=r"records\.jsonl:1: no field 'teacher_context'; there is: text"):
        load({"text": "T"})


def test_a_text_file(tmp_path, chat_tokenizer):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"a\.txt: a text cannot hold records with the fields teacher_context, target"):
        load_records(str(tmp_path / "a.txt"), None, chat_tokenizer)


def test_a_chat_template_that_wants_turns_to_alternate(load, chat_tokenizer):
    """As those of Gemma, Mistral and Llama 2 do: the user begins, so the target is never written alone."""
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
    ) + chat_tokenizer.chat_template
    record = {"teacher_context": [_user("T")], "student_context": [_user("S")], "target": [_assistant("x")]}
    (example,) = load(record)
    assert _texts(example, chat_tokenizer)[2] == "x</>\n"
    (example,) = load(record | {"student_context": ""})
    assert _texts(example, chat_tokenizer)[2] == "x</>\n"


def test_chat_templates_that_cannot_give_a_target(load, tokenizer, chat_tokenizer):
    record, regular = {"teacher_context": [_user("T")], "target": [_assistant("x")]}, chat_tokenizer.chat_template
    with pytest.raises(ValueError, match=r"records\.jsonl:1: expected a model with a chat template"):
        load(record, tokenizer=tokenizer)
    chat_tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(
        ValueError, match=r"records\.jsonl:1: the model's chat template does not take these messages: no"
    ):
        load(record)
    chat_tokenizer.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(ValueError, match=r"records\.jsonl:1: the model's chat template .*: division by zero"):
        load(record)
    chat_tokenizer.chat_template = "{{ messages | length }}{{ messages[-1].content }}"
    with pytest.raises(ValueError, match=r"records\.jsonl:1: the chat template does not continue the prompt"):
        load(record)
    chat_tokenizer.chat_template = regular + "{% if messages[0].content == 'S' and messages[1:] %}!{% endif %}"
    with pytest.raises(ValueError, match=r"records\.jsonl:1: the chat template writes the target differently"):
        load(record | {"student_context": [_user("S")]})
