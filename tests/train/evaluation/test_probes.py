"""Probes as files have them: their forms, and bad ones named with file and line."""

import json

import pytest

from disc_train.evaluation import Probe, read_documents, read_questions


@pytest.fixture
def write(tmp_path):
    """write(*records, name="facts.jsonl"): the path of a file of them."""

    def make(*records, name="facts.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return str(path)

    return make


CHOICES = ["coal", "silk"]
GOOD = {"question": "What?", "choices": CHOICES, "answer": "silk"}


def test_a_question_is_a_chat_message(write, chat_tokenizer):
    (question,) = read_questions([write(GOOD | {"context": "A ship."})], chat_tokenizer)
    assert (question.id, question.group, question.text) == ("facts:1", "facts", "What?")
    replies = ["coal</>\n", "silk</>\n"]
    assert question.probe(chat_tokenizer) == Probe("<user>What?</>\n<assistant>", replies, 1)
    in_context = question.probe(chat_tokenizer, with_context=True)
    assert in_context == Probe("<user>A ship.\n\nWhat?</>\n<assistant>", replies, 1)


def test_a_question_without_a_chat_template(write, tokenizer):
    (question,) = read_questions([write(GOOD | {"context": "A ship.", "answer": 0})], tokenizer)
    assert question.probe(tokenizer) == Probe("Question: What?\nAnswer:", [" coal", " silk"], 0)
    assert question.probe(tokenizer, with_context=True).context == "A ship.\n\n"


def test_a_prompt_is_a_text_or_messages(write, chat_tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    path = write(
        {"prompt": "It carries", "answer": "silk", "choices": [" coal", "silk"], "group": "new", "id": 7},
        {"prompt": messages, "answer": "silk", "context": "A ship."},
    )
    text, chat = read_questions([path], chat_tokenizer)
    assert (text.id, text.group) == ("7", "new")
    assert text.probe(chat_tokenizer) == Probe("It carries", [" coal", " silk"], 1)
    assert chat.probe(chat_tokenizer, with_context=True) == Probe(
        "<system>Be brief.</>\n<user>A ship.\n\nWhat?</>\n<assistant>", ["silk</>\n"], 0
    )


def test_documents_by_id(write, tokenizer):
    documents = read_documents(write({"id": "a", "text": "A ship."}, {"id": 2, "text": "A town."}, name="docs.jsonl"))
    path = write(GOOD | {"document": "a"}, GOOD | {"document": 2}, GOOD)
    assert [each.context for each in read_questions([path], tokenizer, documents)] == ["A ship.", "A town.", ""]
    assert {each.context for each in read_questions([path], tokenizer)} == {""}
    with pytest.raises(ValueError, match=r"facts.jsonl:1: expected a document that the --documents_file has, got 'b'"):
        read_questions([write(GOOD | {"document": "b"})], tokenizer, documents)
    with pytest.raises(ValueError, match=r"docs.jsonl:2: expected an id"):
        read_documents(write({"id": "a", "text": "x"}, {"id": "a", "text": "y"}, name="docs.jsonl"))


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
def test_bad_probes_are_named(changes, message, write, chat_tokenizer):
    with pytest.raises(ValueError, match=rf"facts.jsonl:2: .*{message}"):
        read_questions([write(GOOD, GOOD | changes)], chat_tokenizer)


def test_bad_probes_are_counted(write, tokenizer):
    bad = GOOD | {"answer": "tea"}
    with pytest.raises(ValueError, match=r"facts.jsonl:2: .* \(3 of 5 probes are bad\)"):
        read_questions([write(GOOD, bad, bad, GOOD, bad)], tokenizer)


def test_a_folder_of_files(write, tokenizer, tmp_path):
    write(GOOD, name="a.jsonl")
    write(GOOD, name="b.jsonl")
    assert [each.id for each in read_questions([str(tmp_path)], tokenizer)] == ["a:1", "b:1"]


def test_ids_are_one_each(write, tokenizer):
    files = [write(GOOD | {"id": "a"}), write(GOOD, GOOD | {"id": "a"}, name="more.jsonl")]
    with pytest.raises(ValueError, match=r"more.jsonl:2: id 'a' is that of .*facts.jsonl:1 too"):
        read_questions(files, tokenizer)


def test_an_answer_is_required_and_a_file_is_not_empty(write, tokenizer):
    with pytest.raises(ValueError, match=r"facts.jsonl:1: no field 'answer'"):
        read_questions([write({"question": "What?"})], tokenizer)
    with pytest.raises(ValueError, match="no probes in this file"):
        read_questions([write()], tokenizer)


def test_messages_need_a_chat_template(write, tokenizer):
    (question,) = read_questions([write({"prompt": [{"role": "user", "content": "What?"}], "answer": "x"})], tokenizer)
    with pytest.raises(ValueError, match=r"facts.jsonl:1: expected a model with a chat template"):
        question.probe(tokenizer)
