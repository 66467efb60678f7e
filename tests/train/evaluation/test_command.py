"""disc-eval: what it writes and prints, its exit codes, and bad input in one clear line."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM

from disc_train.cli import evaluate
from disc_train.evaluation import Probe, choice_scores, kl_to_reference, perplexity

CHOICES = ["Merin.", "the spring.", "red stone."]
QUESTIONS = ["Where is the quarry?", "When did it open?", "What are the towers built of?", "Was it ever closed?"]


@pytest.fixture
def write(tmp_path):
    """write(name, *records): the path of a file of them."""

    def make(name, *records):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return make


@pytest.fixture
def facts(write):
    """Four probes, one of them in a group of its own and with a context."""
    records = [{"question": question, "choices": CHOICES, "answer": CHOICES[0]} for question in QUESTIONS]
    records[1] |= {"context": "It opened in the spring.", "group": "read"}
    return write("facts.jsonl", *records)


@pytest.fixture
def disc_eval(tmp_path, model_folder):
    """disc_eval(*flags, output="out", model=folder): the exit code."""

    def run(*flags, output="out", model=model_folder):
        named = () if model is None else ("--model_name_or_path", model)
        settings = ("--max_new_tokens", 4, "--use_cpu", "true", "--output_dir", tmp_path / output)
        return evaluate([str(flag) for flag in (*named, *settings, *flags)])

    return run


@pytest.fixture
def fails(disc_eval, capsys):
    """fails(*flags): the exit code and the one line on stderr."""

    def run(*flags, **options):
        code = disc_eval(*flags, **options)
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if "disc-eval: error" in line]
        assert code != 0
        assert len(errors) == 1
        assert "Traceback" not in captured.err
        return code, errors[0]

    return run


def _read(folder):
    return json.loads((folder / "evaluation.json").read_text())


def _values(folder):
    return {(each["row"], each["measure"]): each["value"] for each in _read(folder)["summary"]}


def test_probes_are_asked_without_and_with_their_context(
    disc_eval, facts, tmp_path, make_model, tokenizer, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    assert disc_eval("--probes_file", facts) == 0
    out = capsys.readouterr().out
    items = _read(tmp_path / "out")["probes"]
    assert [(item["id"], item["condition"]) for item in items] == [
        *((f"facts:{number}", "closed book") for number in (1, 2, 3, 4)),
        ("facts:2", "in context"),
    ]
    contexts = ["", "", "", "", "It opened in the spring.\n\n"]
    prompts = [f"Question: {question}\nAnswer:" for question in [*QUESTIONS, QUESTIONS[1]]]
    choices = [f" {choice}" for choice in CHOICES]
    probes = [Probe(prompt, choices, 0, context) for prompt, context in zip(prompts, contexts, strict=True)]
    expected = choice_scores(make_model().eval(), tokenizer, probes)
    assert [item["scores"] for item in items] == [pytest.approx(scores, rel=1e-4) for scores in expected]
    right = [max(scores) == scores[0] for scores in expected]
    assert [item["right_choice"] for item in items] == right
    values = _values(tmp_path / "out")
    assert values["facts, closed book", "likeliest choice"] == pytest.approx(sum((right[0], *right[2:4])) / 3)
    assert values["read, in context", "likeliest choice"] == right[4]
    assert ("facts, in context", "likeliest choice") not in values
    assert "| facts, closed book | " in out
    assert "No chart was drawn" in out
    assert (tmp_path / "out" / "evaluation.md").read_text() == out.removesuffix("\n")
    assert not (tmp_path / "out" / "evaluation.png").exists()


def test_texts_and_a_reference(disc_eval, write, tmp_path, make_model, perturbed, tokenizer, sentences, capsys):
    reference = make_model().eval()
    model = perturbed(reference)
    model.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    texts = [" ".join(document) for document in sentences[:2]]
    too_long = " ".join(map(" ".join, sentences))
    news = write("news.jsonl", *({"text": text} for text in [*texts, "", too_long]))
    flags = ("--texts_file", news, "--reference_name_or_path", tmp_path / "model", "--batch_size", 2)
    assert disc_eval(*flags, model=tmp_path / "trained") == 0
    *read, empty, long = _read(tmp_path / "out")["texts"]

    def mean(part, whole):
        return sum(text[part] for text in read) / sum(text[whole] for text in read)

    assert mean("loss", "predicted") == pytest.approx(math.log(perplexity(model, tokenizer, texts)), rel=1e-4)
    assert mean("kl", "tokens") == pytest.approx(kl_to_reference(model, reference, tokenizer, texts), rel=1e-4)
    assert empty["tokens"] == empty["predicted"] == 0
    assert (long["tokens"], long["cut"] > 0) == (256, True)
    tokens = sum(text["tokens"] for text in read) + 256
    counts = f"4 texts, {tokens} tokens read; 1 cut ({long['cut']} tokens dropped); 1 too short"
    assert counts in capsys.readouterr().out


def test_a_probe_longer_than_the_context_is_left_out_and_shown(disc_eval, facts, write, tmp_path, capsys):
    long = {"question": "Where? " * 150, "choices": CHOICES, "answer": 0, "id": "long", "group": "facts"}
    generated = {"question": "Why?", "answer": "no", "group": "facts"}
    assert disc_eval("--probes_file", facts, write("more.jsonl", long, generated)) == 0
    out = capsys.readouterr().out
    item = next(item for item in _read(tmp_path / "out")["probes"] if item["id"] == "long")
    assert "the model reads 256" in item["excluded"]
    assert item["right_choice"] is item["exact"] is None
    assert f"- left out: long, closed book: {item['excluded']}" in out
    row = next(line for line in out.splitlines() if line.startswith("| facts, closed book"))
    assert row.count("(n 3, 1 left out)") == 1  # of the likeliest choice
    assert row.count("(n 4, 1 left out)") == 2  # what was generated, for the probe without choices too


def test_a_choice_longer_than_the_context_is_too(disc_eval, write, tmp_path):
    probe = {"question": "Where?", "choices": ["Merin.", "Merin. " * 100], "answer": 0}
    assert disc_eval("--probes_file", write("facts.jsonl", probe | {"choices": CHOICES}, probe)) == 0
    first, second = _read(tmp_path / "out")["probes"]
    assert first["excluded"] is None
    assert "the model reads 256" in second["excluded"]


def test_runs_side_by_side(disc_eval, facts, write, tmp_path, make_model, perturbed, tokenizer, sentences, capsys):
    perturbed(make_model(), scale=0.3).save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    news = write("news.jsonl", *({"text": " ".join(text)} for text in sentences))
    flags = ("--probes_file", facts, "--texts_file", news)
    assert disc_eval(*flags, output="before") == 0
    assert disc_eval(*flags, output="after", model=tmp_path / "trained") == 0
    runs = tmp_path / "before", tmp_path / "after"
    assert disc_eval("--compare", runs[0], runs[1] / "evaluation.json", model=None) == 0
    lines = capsys.readouterr().out.splitlines()

    outcomes = [[item["right_choice"] for item in _read(run)["probes"] if item["group"] == "facts"] for run in runs]
    pairs = list(zip(*outcomes, strict=True))
    row = next(line for line in lines if line.startswith("| facts, closed book: likeliest choice"))
    assert f"; +{pairs.count((False, True))} -{pairs.count((True, False))})" in row
    losses = [_values(run)["news", "loss"] for run in runs]
    row = next(line for line in lines if line.startswith("| news: loss"))
    assert f"({losses[1] - losses[0]:+.4f} ± " in row
    assert (tmp_path / "out" / "comparison.md").is_file()


@pytest.fixture
def damaged(tmp_path, make_model, tokenizer):
    """A model whose logits are NaN."""
    model = make_model()
    model.lm_head.weight.data.fill_(math.nan)
    model.save_pretrained(tmp_path / "damaged")
    tokenizer.save_pretrained(tmp_path / "damaged")
    return tmp_path / "damaged"


def test_a_model_that_gives_nan_is_not_measured(fails, facts, write, damaged, tmp_path):
    news = write("news.jsonl", {"text": "It opened."})
    answers = write("answers.jsonl", {"question": "Where?", "answer": "Merin."})
    for flags in (("--probes_file", facts), ("--texts_file", news), ("--probes_file", answers)):
        assert "from the model, got NaN: its weights are damaged" in fails(*flags, model=damaged)[1]
    line = fails("--texts_file", news, "--reference_name_or_path", damaged)[1]
    assert "texts[0] beside the reference: expected numbers" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("probe", [{"choices": CHOICES, "answer": 0}, {"answer": "Merin."}])
def test_tokens_that_are_none_of_the_models(probe, fails, write, make_model, tokenizer, tmp_path):
    make_model(vocab_size=260).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    probes = write("probes.jsonl", {"question": "Where is the quarry?"} | probe)
    line = fails("--probes_file", probes, model=tmp_path / "small")[1]
    assert "got a vocabulary of 260: the tokenizer is another model's" in line


def test_texts_of_one_name(fails, write, tmp_path):
    (tmp_path / "other").mkdir()
    news, other = write("news.jsonl", {"text": "It opened."}), write("other/news.jsonl", {"text": "It closed."})
    line = fails("--texts_file", news, other)[1]
    assert "--texts_file: expected files with names of their own" in line
    assert "got several 'news'" in line


def test_a_group_stays_in_its_row(disc_eval, write, capsys):
    record = {"question": "Where?", "choices": CHOICES, "answer": 0, "group": "one\n|two"}
    assert disc_eval("--probes_file", write("facts.jsonl", record)) == 0
    assert "| one /two, closed book | " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"base_model_name_or_path": null}'])
def test_an_adapter_without_a_base(text, fails, facts, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(text)
    line = fails("--probes_file", facts, model=tmp_path / "adapter")[1]
    assert "adapter_config.json: expected JSON with a base_model_name_or_path" in line


def test_a_chart_is_drawn(disc_eval, facts, tmp_path):
    pytest.importorskip("matplotlib")
    for output in ("a", "b"):
        assert disc_eval("--probes_file", facts, output=output) == 0
        assert (tmp_path / output / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert disc_eval("--compare", tmp_path / "a", tmp_path / "b", model=None) == 0
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_an_adapter_is_measured_on_its_base(disc_eval, facts, tmp_path, model_folder, tokenizer):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.add_adapter(peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5))
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    assert disc_eval("--probes_file", facts, output="base") == 0
    assert disc_eval("--probes_file", facts, output="adapted", model=tmp_path / "adapter") == 0
    scores = {output: _read(tmp_path / output)["probes"][0]["scores"] for output in ("base", "adapted")}
    assert scores["base"] != pytest.approx(scores["adapted"], rel=1e-3)
    tokenizer.save_pretrained(tmp_path / "adapter")  # may be in the folder or not
    assert disc_eval("--probes_file", facts, output="again", model=tmp_path / "adapter") == 0
    assert _read(tmp_path / "again")["probes"] == _read(tmp_path / "adapted")["probes"]  # nothing is dropped out


def test_tasks_need_lm_eval(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, line = fails("--tasks", "ifeval")
    assert (code, "--tasks needs lm-eval: pip install lm-eval" in line) == (1, True)


def test_tasks_are_run_by_lm_eval(disc_eval, fails, tmp_path, monkeypatch, capsys):
    def simple_evaluate(model, tasks, **options):
        assert not options["apply_chat_template"]
        if "unknown" in tasks:
            raise KeyError("unknown")
        samples = [
            {"doc_id": n, "filter": "none", "metrics": ["acc", "inst"], "acc": float(n), "inst": [True, False]}
            for n in range(2)
        ]
        results = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "inst,none": 0.5}
        return {"results": dict.fromkeys(tasks, results), "samples": dict.fromkeys(tasks, samples)}

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    monkeypatch.setitem(sys.modules, "lm_eval.models", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", SimpleNamespace(HFLM=lambda **options: options))
    assert disc_eval("--tasks", "one, two") == 0
    assert "| two | 0.5000 ± 0.3536 (n 2) | 0.5000 ± 0.0000 (n 2) |" in capsys.readouterr().out
    assert _read(tmp_path / "out")["tasks"]["items"]["one"]["inst,none"] == {"0": [1.0, 2.0], "1": [1.0, 2.0]}
    assert "lm-eval failed: KeyError: 'unknown'" in fails("--tasks", "unknown")[1]


def test_an_empty_evaluation(fails, write, facts, tmp_path):
    code, line = fails()
    assert (code, "nothing to evaluate: expected --probes_file, --texts_file or --tasks" in line) == (2, True)
    assert "no probes in this file" in fails("--probes_file", write("none.jsonl"))[1]
    code, line = fails("--probes_file", facts, "--max_new_tokens", 1000)
    assert (code, "none of 4 probes could be asked: 10" in line) == (1, True)
    assert "no text in any of its 1 documents" in fails("--texts_file", write("empty.jsonl", {"text": ""}))[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--probes", "x"), "unknown argument --probes; did you mean probes_file?"),
        (("--compare", "a", "b"), "--compare: expected finished runs alone"),
        (("--texts_file", "x", "--batch_size", "0"), "--batch_size: expected at least 1, got 0"),
        (("--tasks", "x", "--reference_name_or_path", "m"), "expected --texts_file with it"),
        (("--tasks", "x", "--documents_file", "d"), "expected --probes_file with it"),
    ],
)
def test_wrong_usage_is_code_2(flags, message, fails):
    code, line = fails(*flags)
    assert (code, message in line) == (2, True)


def test_runs_that_cannot_be_compared(disc_eval, fails, facts, write, tmp_path):
    assert fails("--compare", tmp_path / "a", model=None)[0] == 2
    code, line = fails("--compare", tmp_path / "a", tmp_path / "b", model=None)
    assert (code, "expected what disc-eval writes" in line) == (1, True)
    assert disc_eval("--probes_file", facts, output="a") == 0
    assert disc_eval("--texts_file", write("news.jsonl", {"text": "It opened."}), output="b") == 0
    assert "has measured nothing that" in fails("--compare", tmp_path / "a", tmp_path / "b", model=None)[1]


def test_a_reference_with_another_tokenizer(fails, write, make_model, chat_tokenizer, tmp_path):
    make_model(vocab_size=301).save_pretrained(tmp_path / "other")
    chat_tokenizer.add_tokens(["bridge"])
    chat_tokenizer.save_pretrained(tmp_path / "other")
    news = write("news.jsonl", {"text": "A bridge."})
    line = fails("--texts_file", news, "--reference_name_or_path", tmp_path / "other")[1]
    assert "expected a model with the same tokenizer" in line
