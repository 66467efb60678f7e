"""disc-eval: what it writes and prints."""

import math
import re
import sys
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM

from disc_train.evaluation import Probe, choice_scores, kl_to_reference, perplexity
from tests.train.evaluation.runs import CHOICES, QUESTIONS, read_run, read_values
from tests.train.files import write_jsonl


def test_probes_are_asked_without_and_with_their_context(disc_eval, facts, tmp_path, make_model, tokenizer, capsys):
    assert disc_eval("--probes_file", facts) == 0
    out = capsys.readouterr().out
    items = read_run(tmp_path / "out")["probes"]
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
    values = read_values(tmp_path / "out")
    assert values["facts, closed book", "likeliest choice"] == pytest.approx(sum((right[0], *right[2:4])) / 3)
    assert values["read, in context", "likeliest choice"] == right[4]
    assert ("facts, in context", "likeliest choice") not in values
    assert "| facts, closed book | " in out
    assert (tmp_path / "out" / "evaluation.md").read_text() == out.removesuffix("\n")


def test_texts_and_a_reference(disc_eval, tmp_path, make_model, perturbed, tokenizer, sentences, capsys):
    reference = make_model().eval()
    model = perturbed(reference)
    model.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    texts = [" ".join(document) for document in sentences[:2]]
    too_long = " ".join(map(" ".join, sentences))
    news = write_jsonl(tmp_path / "news.jsonl", *({"text": text} for text in [*texts, "", too_long]))
    flags = ("--texts_file", news, "--reference_name_or_path", tmp_path / "model", "--batch_size", 2)
    assert disc_eval(*flags, model=tmp_path / "trained") == 0
    *read, empty, long = read_run(tmp_path / "out")["texts"]

    def mean(part, whole):
        return sum(text[part] for text in read) / sum(text[whole] for text in read)

    assert mean("loss", "predicted") == pytest.approx(math.log(perplexity(model, tokenizer, texts)), rel=1e-4)
    assert mean("kl", "tokens") == pytest.approx(kl_to_reference(model, reference, tokenizer, texts), rel=1e-4)
    assert empty["tokens"] == empty["predicted"] == 0
    assert (long["tokens"], long["cut"] > 0) == (256, True)
    tokens = sum(text["tokens"] for text in read) + 256
    counts = f"4 texts, {tokens} tokens read; 1 cut ({long['cut']} tokens dropped); 1 too short"
    assert counts in capsys.readouterr().out


def test_a_probe_longer_than_the_context_is_left_out_and_shown(disc_eval, facts, tmp_path, capsys):
    long = {"question": "Where? " * 150, "choices": CHOICES, "answer": 0, "id": "long", "group": "facts"}
    generated = {"question": "Why?", "answer": "no", "group": "facts"}
    assert disc_eval("--probes_file", facts, write_jsonl(tmp_path / "more.jsonl", long, generated)) == 0
    out = capsys.readouterr().out
    item = next(item for item in read_run(tmp_path / "out")["probes"] if item["id"] == "long")
    assert "the model reads 256" in item["excluded"]
    assert item["right_choice"] is item["exact"] is None
    assert f"- left out: long, closed book: {item['excluded']}" in out
    row = next(line for line in out.splitlines() if line.startswith("| facts, closed book"))
    assert row.count("(n 3, 1 left out)") == 1  # of the likeliest choice
    assert row.count("(n 4, 1 left out)") == 2  # what was generated, for the probe without choices too


def test_a_choice_longer_than_the_context_is_too(disc_eval, tmp_path):
    probe = {"question": "Where?", "choices": ["Merin.", "Merin. " * 100], "answer": 0}
    assert disc_eval("--probes_file", write_jsonl(tmp_path / "facts.jsonl", probe | {"choices": CHOICES}, probe)) == 0
    first, second = read_run(tmp_path / "out")["probes"]
    assert first["excluded"] is None
    assert "the model reads 256" in second["excluded"]


def test_runs_side_by_side(disc_eval, facts, tmp_path, make_model, perturbed, tokenizer, sentences, capsys):
    perturbed(make_model(), scale=0.3).save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    news = write_jsonl(tmp_path / "news.jsonl", *({"text": " ".join(text)} for text in sentences))
    flags = ("--probes_file", facts, "--texts_file", news)
    assert disc_eval(*flags, output="before") == 0
    assert disc_eval(*flags, output="after", model=tmp_path / "trained") == 0
    runs = tmp_path / "before", tmp_path / "after"
    assert disc_eval("--compare", runs[0], runs[1] / "evaluation.json", model=None) == 0
    lines = capsys.readouterr().out.splitlines()

    outcomes = [[item["right_choice"] for item in read_run(run)["probes"] if item["group"] == "facts"] for run in runs]
    pairs = list(zip(*outcomes, strict=True))
    row = next(line for line in lines if line.startswith("| facts, closed book: likeliest choice"))
    assert f"; +{pairs.count((False, True))} -{pairs.count((True, False))})" in row
    losses = [read_values(run)["news", "loss"] for run in runs]
    row = next(line for line in lines if line.startswith("| news: loss"))
    assert f"({losses[1] - losses[0]:+.4f} ± " in row
    assert (tmp_path / "out" / "comparison.md").is_file()


def test_a_group_stays_in_its_row(disc_eval, tmp_path, capsys):
    record = {"question": "Where?", "choices": CHOICES, "answer": 0, "group": "one\n|two"}
    assert disc_eval("--probes_file", write_jsonl(tmp_path / "facts.jsonl", record)) == 0
    assert "| one /two, closed book | " in capsys.readouterr().out


def test_progress_says_how_probes_are_asked(disc_eval, facts, monkeypatch, capsys):
    monkeypatch.setattr("disc_train.progress.DELAY", 0.0)
    assert disc_eval("--probes_file", facts) == 0
    lines = re.findall("(.*): [0-9]+ of [0-9]+ in ", capsys.readouterr().err)
    done = ("choices scored", "answers generated")
    assert lines == [f"probes asked {how}, {what}" for how in ("closed book", "in context") for what in done]


def test_there_is_no_chart_without_matplotlib(disc_eval, facts, tmp_path, capsys, monkeypatch):
    loaded = [name for name in sys.modules if name.startswith("matplotlib.")]  # would be found without matplotlib
    for name in ("matplotlib", *loaded):
        monkeypatch.setitem(sys.modules, name, None)
    assert disc_eval("--probes_file", facts) == 0
    assert "No chart was drawn" in capsys.readouterr().out
    assert not (tmp_path / "out" / "evaluation.png").exists()


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
    scores = {output: read_run(tmp_path / output)["probes"][0]["scores"] for output in ("base", "adapted")}
    assert scores["base"] != pytest.approx(scores["adapted"], rel=1e-3)
    tokenizer.save_pretrained(tmp_path / "adapter")  # may be in the folder or not
    assert disc_eval("--probes_file", facts, output="again", model=tmp_path / "adapter") == 0
    assert read_run(tmp_path / "again")["probes"] == read_run(tmp_path / "adapted")["probes"]  # nothing is dropped out


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

    lm_eval = SimpleNamespace(simple_evaluate=simple_evaluate, __spec__="there is one")
    monkeypatch.setitem(sys.modules, "lm_eval", lm_eval)
    monkeypatch.setitem(sys.modules, "lm_eval.models", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", SimpleNamespace(HFLM=lambda **options: options))
    assert disc_eval("--tasks", "one, two") == 0
    assert "| two | 0.5000 ± 0.3536 (n 2) | 0.5000 ± 0.0000 (n 2) |" in capsys.readouterr().out
    assert read_run(tmp_path / "out")["tasks"]["items"]["one"]["inst,none"] == {"0": [1.0, 2.0], "1": [1.0, 2.0]}
    assert "lm-eval failed: KeyError: 'unknown'" in fails("--tasks", "unknown", output="x")[1]


def test_there_are_no_bars_where_output_is_piped(disc_eval, facts, capsys):
    assert disc_eval("--probes_file", facts) == 0
    assert "\r" not in capsys.readouterr().err
