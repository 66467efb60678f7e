"""Probes as files have them: their forms, and bad ones named with file and line."""

import pytest

from disc_train.evaluation import Probe, read_documents, read_questions
from tests.train.files import write_jsonl

CHOICES = ["coal", "silk"]
GOOD = {"question": "What?", "choices": CHOICES, "answer": "silk"}


def test_a_question_is_a_chat_message(tmp_path, chat_tokenizer):
    (question,) = read_questions([write_jsonl(tmp_path / "facts.jsonl", GOOD | {"context": "A ship."})], chat_tokenizer)
    assert (question.id, question.group, question.text) == ("facts:1", "facts", "What?")
    replies = ["coal</>\n", "silk</>\n"]
    assert question.closed_book == Probe("<user>What?</>\n<assistant>", replies, 1)
    in_context = question.in_context
    assert in_context == Probe("<user>A ship.\n\nWhat?</>\n<assistant>", replies, 1)


def test_a_question_without_a_chat_template(tmp_path, tokenizer):
    (question,) = read_questions(
        [write_jsonl(tmp_path / "facts.jsonl", GOOD | {"context": "A ship.", "answer": 0})], tokenizer
    )
    assert question.closed_book == Probe("Question: What?\nAnswer:", [" coal", " silk"], 0)
    assert question.in_context.context == "A ship.\n\n"


def test_a_prompt_is_a_text_or_messages(tmp_path, chat_tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    path = write_jsonl(
        tmp_path / "facts.jsonl",
        {"prompt": "It carries", "answer": "silk", "choices": [" coal", "silk"], "group": "new", "id": 7},
        {"prompt": messages, "answer": "silk", "context": "A ship."},
    )
    text, chat = read_questions([path], chat_tokenizer)
    assert (text.id, text.group) == ("7", "new")
    assert text.closed_book == Probe("It carries", [" coal", " silk"], 1)
    assert chat.in_context == Probe("<system>Be brief.</>\n<user>A ship.\n\nWhat?</>\n<assistant>", ["silk</>\n"], 0)


def test_documents_by_id(tmp_path, tokenizer):
    texts = {"id": "a", "text": "A ship."}, {"id": 2, "text": "A town."}
    documents = read_documents(write_jsonl(tmp_path / "docs.jsonl", *texts))
    path = write_jsonl(tmp_path / "facts.jsonl", GOOD | {"document": "a"}, GOOD | {"document": 2}, GOOD)
    probes = [question.in_context for question in read_questions([path], tokenizer, documents)]
    assert [probe and probe.context for probe in probes] == ["A ship.\n\n", "A town.\n\n", None]
    with pytest.raises(ValueError, match=r"docs.jsonl:2: expected an id"):
        read_documents(write_jsonl(tmp_path / "docs.jsonl", texts[0], texts[0]))


def test_a_document_that_is_not_there_is_a_bad_probe(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "facts.jsonl", GOOD, GOOD | {"document": "b"})
    missing = r"facts.jsonl:2: expected a document that the --documents_file has, got 'b' \(1 of 2 probes is bad\)"
    with pytest.raises(ValueError, match=missing):
        read_questions([path], tokenizer, {"a": "A ship."})
    with pytest.raises(ValueError, match=r"facts.jsonl:2: expected --documents_file for a probe .* 'b', got none"):
        read_questions([path], tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "tea"}, r"expected an answer that is among the choices \['coal', 'silk'\], got 'tea'"),
        ({"answer": 2}, "expected an answer that is an index of the 2 choices, got 2"),
        ({"answer": -1}, "expected an answer that is an index of the 2 choices, got -1"),
        ({"answer": True}, "among the choices"),
        ({"answer": None}, "among the choices"),
        ({"choices": None, "answer": 0}, "expected choices, or an answer that is a text and not empty, got 0"),
        ({"choices": None, "answer": " "}, "expected choices, or an answer"),
        ({"choices": ["silk"]}, "expected choices that are a list of at least two texts"),
        ({"choices": "silk"}, "expected choices that are a list"),
        ({"choices": ["silk", ""]}, "expected choices that are not empty"),
        ({"choices": ["silk", 3]}, "'choices' must be a string, got int"),
        ({"choices": ["silk", " silk"]}, "expected choices that differ"),
        ({"question": " "}, "expected a question that is not empty"),
        ({"question": None}, "expected one of question and prompt, got neither"),
        ({"prompt": "It carries"}, "expected one of question and prompt, got both"),
        ({"question": None, "prompt": ""}, "expected a prompt that is not empty"),
        ({"question": None, "prompt": []}, "expected a prompt that ends with a user's message"),
        ({"question": None, "prompt": [{"role": "user"}]}, "messages with role and content"),
        ({"group": ["new"]}, "'group' must be a text"),
        ({"id": ""}, "'id' must be a text that is not empty, or a number"),
        ({"context": 3}, "'context' must be a string"),
    ],
)
def test_bad_probes_are_named(changes, message, tmp_path, chat_tokenizer):
    with pytest.raises(ValueError, match=rf"facts.jsonl:2: .*{message}"):
        read_questions([write_jsonl(tmp_path / "facts.jsonl", GOOD, GOOD | changes)], chat_tokenizer)


def test_the_first_bad_probe_is_named_and_all_are_counted(tmp_path, chat_tokenizer):
    """Whatever is wrong with each: also a missing answer, and messages that the chat template does not take."""
    chat_tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + chat_tokenizer.chat_template
    )
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    kinds = [GOOD | {"answer": "tea"}, {"question": "What?"}, {"prompt": system, "answer": "x"}]
    messages = ["among the choices", "no field 'answer'", "the model's chat template does not take"]
    for first, message in enumerate(messages):
        bad = kinds[first:] + kinds[:first]
        path = write_jsonl(tmp_path / "facts.jsonl", GOOD, bad[0], bad[1], GOOD, bad[2])
        with pytest.raises(ValueError, match=rf"facts.jsonl:2: .*{message}.* \(3 of 5 probes are bad\)"):
            read_questions([path], chat_tokenizer)
    one = write_jsonl(tmp_path / "facts.jsonl", GOOD, kinds[0])
    with pytest.raises(ValueError, match=r"facts.jsonl:2: .* \(1 of 2 probes is bad\)"):
        read_questions([one], chat_tokenizer)


def test_a_folder_of_files(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", GOOD)
    write_jsonl(tmp_path / "b.jsonl", GOOD)
    assert [each.id for each in read_questions([str(tmp_path)], tokenizer)] == ["a:1", "b:1"]


def test_ids_are_one_each(tmp_path, tokenizer):
    files = [
        write_jsonl(tmp_path / "facts.jsonl", GOOD | {"id": "a"}),
        write_jsonl(tmp_path / "more.jsonl", GOOD, GOOD | {"id": "a"}),
    ]
    with pytest.raises(ValueError, match=r"more.jsonl:2: id 'a' is that of .*facts.jsonl:1 too"):
        read_questions(files, tokenizer)


def test_an_answer_is_required_and_a_file_is_not_empty(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"facts.jsonl:1: no field 'answer'"):
        read_questions([write_jsonl(tmp_path / "facts.jsonl", {"question": "What?"})], tokenizer)
    with pytest.raises(ValueError, match="no probes in this file"):
        read_questions([write_jsonl(tmp_path / "facts.jsonl")], tokenizer)


def test_messages_need_a_chat_template(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "facts.jsonl", {"prompt": [{"role": "user", "content": "What?"}], "answer": "x"})
    with pytest.raises(ValueError, match=r"facts.jsonl:1: expected a model with a chat template"):
        read_questions([path], tokenizer)


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.jsonl", "--probes_file: '.*none.jsonl' does not exist"), ("a.txt", "a text cannot hold probes")],
)
def test_files_that_hold_no_probes(name, message, tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("It opened.")
    with pytest.raises(ValueError, match=message):
        read_questions([tmp_path / name], tokenizer)
    with pytest.raises(ValueError, match=r"--documents_file: '.*none\.jsonl' does not exist"):
        read_documents(tmp_path / "none.jsonl")
