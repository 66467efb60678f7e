"""The demo's model, data and promise: it reads facts in its context, does not know them, and learns them."""

import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from disc_train.evaluation import choice_accuracy, read_documents, read_questions
from disc_train.evaluation.config import parse_arguments

TINY = Path(__file__).parents[3] / "examples" / "tiny"


@pytest.fixture
def tiny(monkeypatch):
    """The folder of the example, with its modules importable as its own scripts import them."""
    monkeypatch.syspath_prepend(str(TINY))
    return TINY


@pytest.fixture
def initial_model():
    model = AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(TINY / "model")


def test_model_is_small_and_safe():
    files = {path.name for path in (TINY / "model").iterdir()}
    assert {"model.safetensors", "tokenizer.json"} <= files
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    assert sum(path.stat().st_size for path in (TINY / "model").iterdir()) <= 4_000_000


def test_data_files_are_what_world_writes(tiny, tmp_path, monkeypatch):
    import world

    monkeypatch.setattr(sys, "argv", ["world.py", "--output_dir", str(tmp_path)])
    world.main()
    for name in ("documents", "new_facts", "old_facts", "skills"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (tiny / f"{name}.jsonl").read_bytes(), name


def test_initial_model_reads_new_facts_but_does_not_know_them(tiny, initial_model):
    from probes import load_probes

    with_document = load_probes(tiny / "new_facts.jsonl", tiny / "documents.jsonl")[::4]
    assert choice_accuracy(*initial_model, with_document) >= 0.95
    without = load_probes(tiny / "new_facts.jsonl")
    assert choice_accuracy(*initial_model, without) <= 0.20  # chance is 0.125
    assert choice_accuracy(*initial_model, load_probes(tiny / "old_facts.jsonl")) >= 0.95
    assert choice_accuracy(*initial_model, load_probes(tiny / "skills.jsonl")) >= 0.90


def test_disc_eval_asks_what_the_example_asks(tiny, initial_model, monkeypatch):
    from probes import load_probes

    monkeypatch.chdir(TINY.parents[1])
    arguments = parse_arguments([str(tiny / "eval.yaml"), "--model_name_or_path=x", "--output_dir=y"])
    questions = read_questions(arguments.probes_file, initial_model[1], read_documents(arguments.documents_file))
    for name in ("new_facts", "old_facts", "skills"):
        asked = [each.closed_book for each in questions if each.group == name]
        assert asked == load_probes(tiny / f"{name}.jsonl")
    assert [bool(each.in_context) for each in questions] == [each.group == "new_facts" for each in questions]


@pytest.mark.slow
def test_demo_teaches_new_facts_and_keeps_the_old(tiny, tmp_path, monkeypatch, capsys):
    """A quarter of the demo's epochs, and a quarter of its probes."""
    import demo

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--num_train_epochs", "10"])
    load_probes = demo.load_probes
    monkeypatch.setattr(demo, "load_probes", lambda *files: load_probes(*files)[::4])
    threads = torch.get_num_threads()
    try:
        assert demo.main() == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"^(new facts|old facts|skills)\b.* ([\d.]+)%\s+\S+$", printed, re.MULTILINE))
    assert float(rows["new facts"]) >= 30
    assert float(rows["old facts"]) >= 85
    assert float(rows["skills"]) >= 85
    assert "KL to the initial model, the documents" in printed
