"""disc-eval: bad input and wrong usage in one clear line, and nothing lost."""

import math
import sys

import pytest

from tests.train.evaluation.runs import CHOICES
from tests.train.files import write_jsonl


@pytest.fixture
def damaged(tmp_path, make_model, tokenizer):
    """A model whose logits are NaN."""
    model = make_model()
    model.lm_head.weight.data.fill_(math.nan)
    model.save_pretrained(tmp_path / "damaged")
    tokenizer.save_pretrained(tmp_path / "damaged")
    return tmp_path / "damaged"


def test_a_model_that_gives_nan_is_not_measured(fails, facts, tmp_path, damaged):
    news = write_jsonl(tmp_path / "news.jsonl", {"text": "It opened."})
    answers = write_jsonl(tmp_path / "answers.jsonl", {"question": "Where?", "answer": "Merin."})
    for flags in (("--probes_file", facts), ("--texts_file", news), ("--probes_file", answers)):
        assert "from the model, got NaN: its weights are damaged" in fails(*flags, model=damaged)[1]
    line = fails("--texts_file", news, "--reference_name_or_path", damaged)[1]
    assert "texts[0] beside the reference: expected numbers" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("probe", [{"choices": CHOICES, "answer": 0}, {"answer": "Merin."}])
def test_tokens_that_are_none_of_the_models(probe, fails, tmp_path, make_model, tokenizer):
    make_model(vocab_size=260).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    probes = write_jsonl(tmp_path / "probes.jsonl", {"question": "Where is the quarry?"} | probe)
    line = fails("--probes_file", probes, model=tmp_path / "small")[1]
    assert "got a vocabulary of 260: the tokenizer is another model's" in line


def test_texts_of_one_name(fails, tmp_path):
    (tmp_path / "other").mkdir()
    news = write_jsonl(tmp_path / "news.jsonl", {"text": "It opened."})
    other = write_jsonl(tmp_path / "other" / "news.jsonl", {"text": "It closed."})
    line = fails("--texts_file", news, other)[1]
    assert "--texts_file: expected files with names of their own" in line
    assert "got several 'news'" in line


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"base_model_name_or_path": null}'])
def test_an_adapter_without_a_base(text, fails, facts, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(text)
    line = fails("--probes_file", facts, model=tmp_path / "adapter")[1]
    assert "adapter_config.json: expected JSON with a base_model_name_or_path" in line


def test_an_output_that_is_no_folder_ends_the_run_before_the_model_is_loaded(fails, facts, model_folder, tmp_path):
    (model_folder / "model.safetensors").write_text("damaged")
    for output in ("file", "file/out"):
        (tmp_path / "file").touch()
        line = fails("--probes_file", facts, output=output)[1]
        assert f"--output_dir: expected a folder that can be written to, got {tmp_path / output}" in line


def test_tasks_need_lm_eval(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, line = fails("--tasks", "ifeval")
    assert (code, "--tasks needs lm_eval: pip install lm-eval" in line) == (2, True)


@pytest.mark.parametrize("flag", ["--documents_file", "--reference_name_or_path", "--tasks", "--compare"])
def test_an_empty_name(flag, fails, facts):
    code, line = fails("--probes_file", facts, flag, "")
    assert (code, f"{flag}: expected a name or a path, got an empty text" in line) == (2, True)


def test_an_empty_evaluation(fails, tmp_path, facts):
    code, line = fails()
    assert (code, "nothing to evaluate: expected --probes_file, --texts_file or --tasks" in line) == (2, True)
    assert "no probes in this file" in fails("--probes_file", write_jsonl(tmp_path / "none.jsonl"))[1]
    code, line = fails("--probes_file", facts, "--max_new_tokens", 1000)
    assert (code, "none of 4 probes could be asked: 10" in line) == (1, True)
    assert (
        "no text in any of its 1 documents"
        in fails("--texts_file", write_jsonl(tmp_path / "empty.jsonl", {"text": ""}))[1]
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--probes", "x"), "unknown argument --probes; did you mean --probes_file?"),
        (("--compare", "a", "b"), "--compare: expected finished runs alone"),
        (("--texts_file", "x", "--batch_size", "0"), "--batch_size: expected at least 1, got 0"),
        (("--tasks", "x", "--reference_name_or_path", "m"), "expected --texts_file with it"),
        (("--tasks", "x", "--documents_file", "d"), "expected --probes_file with it"),
    ],
)
def test_wrong_usage_is_code_2(flags, message, fails):
    code, line = fails(*flags)
    assert (code, message in line) == (2, True)


def test_runs_that_cannot_be_compared(disc_eval, fails, facts, tmp_path):
    assert fails("--compare", tmp_path / "a", model=None)[0] == 2
    code, line = fails("--compare", tmp_path / "a", tmp_path / "b", model=None)
    assert (code, "expected what disc-eval writes" in line) == (1, True)
    assert disc_eval("--probes_file", facts, output="a") == 0
    assert disc_eval("--texts_file", write_jsonl(tmp_path / "news.jsonl", {"text": "It opened."}), output="b") == 0
    assert "has measured nothing that" in fails("--compare", tmp_path / "a", tmp_path / "b", model=None)[1]


def test_a_reference_with_another_tokenizer(fails, tmp_path, make_model, chat_tokenizer):
    make_model(vocab_size=301).save_pretrained(tmp_path / "other")
    chat_tokenizer.add_tokens(["bridge"])
    chat_tokenizer.save_pretrained(tmp_path / "other")
    news = write_jsonl(tmp_path / "news.jsonl", {"text": "A bridge."})
    line = fails("--texts_file", news, "--reference_name_or_path", tmp_path / "other")[1]
    assert "expected a model with the same tokenizer" in line


def test_earlier_results_are_kept(disc_eval, fails, facts, tmp_path):
    for output in ("a", "b"):
        assert disc_eval("--probes_file", facts, output=output) == 0
    earlier = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    code, line = fails("--probes_file", facts, "--batch_size", 1, output="a")
    assert (code, "--output_dir: expected a folder without results" in line) == (1, True)
    compare = ("--compare", tmp_path / "a", tmp_path / "b")
    assert disc_eval(*compare, model=None) == 0
    assert "comparison.md of an earlier run" in fails(*compare, model=None)[1]
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == earlier


def test_bad_probes_end_the_run_before_the_model_is_loaded(fails, facts, model_folder, tmp_path):
    (model_folder / "model.safetensors").write_text("damaged")
    record = {"question": "When?", "choices": CHOICES, "answer": 0, "document": "news-1"}
    line = fails("--probes_file", facts, write_jsonl(tmp_path / "more.jsonl", record))[1]
    missing = "expected --documents_file for a probe that names a document, 'news-1', got none"
    assert f"--probes_file: {tmp_path}/more.jsonl:1: {missing}" in line
    assert "(1 of 5 probes is bad)" in line
    documents = write_jsonl(tmp_path / "documents.jsonl", {"id": "news-2", "text": "It opened in the spring."})
    line = fails("--probes_file", tmp_path / "more.jsonl", "--documents_file", documents)[1]
    assert "more.jsonl:1: expected a document that the --documents_file has, got 'news-1'" in line


def test_what_is_missing_is_named_by_its_flag(fails, facts, tmp_path):
    none, probes = tmp_path / "none", ("--probes_file", facts)
    texts = ("--texts_file", write_jsonl(tmp_path / "news.jsonl", {"text": "It opened."}))
    for flags in (
        ("--probes_file", none),
        (*probes, "--documents_file", none),
        ("--texts_file", none),
        (*texts, "--reference_name_or_path", none),
    ):
        assert f"disc-eval: error: {flags[-2]}: " in fails(*flags)[1]
    assert "disc-eval: error: --model_name_or_path: " in fails(*probes, model=none)[1]
    assert "disc-eval: error: --compare: " in fails("--compare", none, none, model=None)[1]
