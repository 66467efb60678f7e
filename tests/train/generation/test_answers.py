"""disc-generate --mode answers: targets for questions behind a context that the teacher alone reads."""

import pytest

from disc_train.cli import generate, main
from disc_train.data.contexts import load_records
from tests.train.commands import error_line
from tests.train.files import read_jsonl, write_jsonl

SYSTEM = "Answer in one word."
CAPITAL = {"question": "Where is the quarry?"}
LATER = {"messages": [{"role": "system", "content": "Hi."}, {"role": "user", "content": "When did it open?"}]}


@pytest.fixture
def answer(tmp_path, model_folder, chat_tokenizer):
    """answer(*questions, flags=()): the exit code of a run that writes two answers to each."""
    chat_tokenizer.save_pretrained(model_folder)

    def run(*questions, flags=(), output="answers.jsonl"):
        return generate(
            [
                *("--mode", "answers", "--model_name_or_path", str(model_folder), "--max_new_tokens", "8"),
                *("--train_file", str(write_jsonl(tmp_path / "questions.jsonl", *questions))),
                *("--output_file", str(tmp_path / output), "--num_generations", "2", "--use_cpu", "true"),
                *map(str, flags),
            ]
        )

    return run


def test_answers_behind_a_system_prompt_are_trained_on(answer, tmp_path, model_folder, chat_tokenizer, capsys):
    assert answer(CAPITAL, LATER, flags=("--teacher_system_prompt", SYSTEM)) == 0
    path = tmp_path / "answers.jsonl"
    assert f"next          disc-train --method cd --temperature 1 --train_file {path}\n" in capsys.readouterr().out
    records = read_jsonl(path)
    assert len(records) == 4
    for record in records:
        first = record["source"].endswith(":1")
        user = {"role": "user", "content": CAPITAL["question"] if first else LATER["messages"][1]["content"]}
        assert record["teacher_context"] == [{"role": "system", "content": SYSTEM}, user]
        assert record["student_context"] == ([user] if first else LATER["messages"])
        (target,) = record["target"]
        assert (target["role"], bool(target["content"].strip())) == ("assistant", True)
    for example, record in zip(load_records(path, None, chat_tokenizer), records, strict=True):
        question = record["student_context"][-1]["content"]
        read = f"<system>{SYSTEM}</>\n<user>{question}</>\n<assistant>"
        assert chat_tokenizer.decode(example.teacher_trunk) == read

    flags = ("--model_name_or_path", str(model_folder), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true")
    assert main(["--method", "cd", "--temperature", "1", "--train_file", str(path), *flags, "--max_steps", "1"]) == 0
    assert "4 read, all used" in capsys.readouterr().out


def test_what_the_model_reads_and_what_the_student_reads(answer, tmp_path, chat_tokenizer, prompts):
    """Of every form that questions have."""
    in_a_word = "<user>Where, in a word?</>\n<assistant>"
    behind_document = "<user>It is at Merin.\n\nWhere is the quarry?</>\n<assistant>"
    user = [{"role": "user", "content": CAPITAL["question"]}]
    for number, (question, read, student) in enumerate(
        [
            (CAPITAL | {"context": "It is at Merin."}, behind_document, user),
            ({"teacher_context": "At Merin. Where?", "student_context": "Where?"}, "At Merin. Where?", "Where?"),
            ({"prompt": "Where?", "privileged_context": "At Merin."}, "Where?\n\nAt Merin.", "Where?"),
            ({"messages": user, "teacher_prompt": "Where, in a word?"}, in_a_word, user),
        ]
    ):
        prompts.clear()
        assert answer(question, output=f"{number}.jsonl") == 0
        assert list(map(chat_tokenizer.decode, prompts)) == [read, read]
        for record in read_jsonl(tmp_path / f"{number}.jsonl"):
            assert record["student_context"] == student
            assert isinstance(record["target"], type(student))


def test_other_questions_do_not_go_on_with_a_file(answer, capsys):
    question = {"teacher_context": "At Merin. Where?", "student_context": "Where?"}
    assert answer(question) == 0
    assert answer(question) == 0  # nothing is left to do
    assert answer(question | {"student_context": "Who?"}) == 1
    assert "is no text of this run" in error_line(capsys, 1)


@pytest.mark.parametrize(
    ("question", "flags", "message"),
    [
        (CAPITAL, (), "questions.jsonl:1: expected a context beside a question, or --teacher_system_prompt"),
        ({"question": " "}, (), "questions.jsonl:1: expected a question that is not empty"),
        ({"teacher_context": ""}, (), "questions.jsonl:1: expected a teacher_context that is not empty"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, (), "expected messages that end with the user's"),
        ({"text": "x"}, (), "questions.jsonl:1: "),
        (CAPITAL, ("--prompt_template", "{{ document }}"), "--prompt_template: expected none with --mode answers"),
        (CAPITAL, ("--mode", "cd", "--teacher_system_prompt", "x"), "--teacher_system_prompt: expected --mode answers"),
    ],
)
def test_bad_questions_are_named(question, flags, message, answer, capsys):
    assert message in error_line(capsys, answer(question, flags=flags))
