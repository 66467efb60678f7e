"""disc-eval reads with each model as it is meant to be read: its attention, and how its sequences start."""

import math

import pytest

from disc_train.evaluation import Probe, choice_scores, greedy_answers, perplexity
from disc_train.evaluation.config import parse_arguments
from tests.train.bos_tokenizer import with_bos
from tests.train.evaluation.runs import CHOICES, QUESTIONS, read_run
from tests.train.files import write_jsonl


def _probes(start=""):
    choices = [f" {choice}" for choice in CHOICES]
    return [Probe(f"{start}Question: {question}\nAnswer:", choices, 0) for question in QUESTIONS]


def test_a_model_that_sdpa_would_run_wrongly_runs_eagerly(disc_eval, fails, facts, tmp_path, make_model, tokenizer):
    """Gemma 2 softcaps its attention logits, which sdpa leaves out."""
    model = make_model("gemma2").eval()
    model.save_pretrained(tmp_path / "gemma2")
    tokenizer.save_pretrained(tmp_path / "gemma2")
    expected = choice_scores(model, tokenizer, _probes())
    for attention in ("auto", "eager"):
        flags = ("--probes_file", facts, "--attention", attention)
        assert disc_eval(*flags, model=tmp_path / "gemma2", output=attention) == 0
        items = read_run(tmp_path / attention)["probes"][:4]
        assert [item["scores"] for item in items] == [pytest.approx(scores, rel=1e-4) for scores in expected]
    line = fails("--probes_file", facts, "--attention", "sdpa", model=tmp_path / "gemma2", output="sdpa")[1]
    assert "'sdpa' leaves out the softcap of attention logits" in line


@pytest.mark.parametrize(("add_bos", "starts"), [("auto", True), ("true", True), ("false", False)])
def test_sequences_start_as_the_tokenizer_starts_them(
    add_bos, starts, disc_eval, facts, tmp_path, model_folder, make_model, tokenizer
):
    make_model(vocab_size=301).save_pretrained(model_folder)
    starting = with_bos(tokenizer)
    starting.save_pretrained(model_folder)
    news = write_jsonl(tmp_path / "news.jsonl", {"text": "It opened in the spring."}, {"text": ""})
    assert disc_eval("--probes_file", facts, "--texts_file", news, "--add_bos", add_bos) == 0

    start = "<s>" if starts else ""  # written out, it becomes the same token
    model = make_model(vocab_size=301).eval()
    items = read_run(tmp_path / "out")["probes"][:4]
    expected = choice_scores(model, starting, _probes(start))
    assert [item["scores"] for item in items] == [pytest.approx(scores, rel=1e-4) for scores in expected]
    assert [item["generated"] for item in items] == greedy_answers(model, starting, _probes(start), 4)
    text, empty = read_run(tmp_path / "out")["texts"]
    plain = len(starting.encode("It opened in the spring.", add_special_tokens=False))
    assert (text["tokens"], text["predicted"]) == (plain + starts, plain + starts - 1)
    loss = math.log(perplexity(model, starting, [f"{start}It opened in the spring."]))
    assert text["loss"] / text["predicted"] == pytest.approx(loss, rel=1e-4)
    assert empty["tokens"] == 0


def test_no_sequence_starts_twice(disc_eval, facts, tmp_path, model_folder, make_model, chat_tokenizer):
    """Where the chat template writes the BOS token, as those of Llama 3 and Gemma do."""
    make_model(vocab_size=301).save_pretrained(model_folder)
    starting = with_bos(chat_tokenizer)
    starting.save_pretrained(model_folder)
    assert disc_eval("--probes_file", facts, output="added") == 0
    starting.chat_template = "<s>" + starting.chat_template
    starting.save_pretrained(model_folder)
    for add_bos in ("auto", "true", "false"):
        assert disc_eval("--probes_file", facts, "--add_bos", add_bos, output=add_bos) == 0
        assert read_run(tmp_path / add_bos)["probes"] == read_run(tmp_path / "added")["probes"]


def test_a_bos_token_that_there_is_not(fails, facts):
    code, line = fails("--probes_file", facts, "--add_bos", "true")
    assert (code, "--add_bos: expected a tokenizer that has a BOS token for 'true'" in line) == (1, True)


def test_yaml_may_write_it_as_a_boolean(tmp_path):
    (tmp_path / "eval.yaml").write_text("add_bos: true\nmodel_name_or_path: x\ntexts_file: x\noutput_dir: x\n")
    assert parse_arguments([str(tmp_path / "eval.yaml")]).add_bos == "true"
