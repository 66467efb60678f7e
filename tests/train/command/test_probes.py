"""Probes that are asked as the student trains."""

import json

import pytest
import torch

from disc_train.evaluation.config import EvalArguments
from disc_train.evaluation.run import evaluate
from tests.train.bos_tokenizer import with_bos
from tests.train.evaluation.runs import CHOICES, QUESTIONS
from tests.train.files import write_jsonl
from tests.train.runs import weights
from tests.train.world import make_model


@pytest.fixture
def facts(tmp_path):
    """Three probes of one group and one without choices of another, which names a document that nobody needs."""
    records = [
        {"question": each, "choices": CHOICES, "answer": CHOICES[number]} for number, each in enumerate(QUESTIONS[:3])
    ]
    said = {"question": QUESTIONS[3], "answer": "Never.", "group": "said"}
    return write_jsonl(tmp_path / "facts.jsonl", *records, said)


def _logged(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry for entry in history if "eval_probes_facts_accuracy" in entry}


def test_they_leave_the_training_alone_and_say_what_disc_eval_says(
    disc_train, facts, model_folder, tokenizer, tmp_path, capsys
):
    make_model(attention_dropout=0.5, vocab_size=301).save_pretrained(model_folder)
    with_bos(tokenizer).save_pretrained(model_folder)
    flags = ("--max_steps", 3, "--save_steps", 2, "--learning_rate", "1e-2")
    asked, plain = tmp_path / "asked", tmp_path / "plain"
    assert disc_train(*flags, "--probes_file", facts, "--probe_steps", 2, "--output_dir", asked) == 0
    out = capsys.readouterr().out
    assert disc_train(*flags, "--output_dir", plain) == 0
    assert torch.equal(weights(asked), weights(plain))
    losses = [
        [
            entry["loss"]
            for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"]
            if "loss" in entry
        ]
        for folder in (asked, plain)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    logged = _logged(asked)
    assert sorted(logged) == [0, 2, 3]
    assert "probes        4 (facts, said), asked before the first step, every 2 steps and after the last\n" in out
    first, last = (logged[step]["eval_probes_said_logprob"] for step in (0, 3))
    assert f"said_logprob {first:.3f} -> {last:.3f}" in out
    assert first != last
    logged, folder, out = logged[2], str(asked / "checkpoint-2"), str(tmp_path / "eval")
    measured = EvalArguments(folder, probes_file=[str(facts)], output_dir=out, max_new_tokens=0, use_cpu=True)
    found = evaluate(measured).probes[:3]
    assert logged["eval_probes_facts_accuracy"] == sum(each.right_choice for each in found) / 3
    logprob = sum(each.scores[number] for number, each in enumerate(found)) / 3
    assert logged["eval_probes_facts_logprob"] == pytest.approx(logprob, rel=1e-5)


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(disc_train, facts, tmp_path, capsys):
    flags = ("--probes_file", facts, "--probe_steps", 1, "--max_steps", 2, "--save_steps", 1)
    assert disc_train(*flags) == 0
    whole = _logged(tmp_path / "out")
    came_of_it = capsys.readouterr().out.partition("What came of it")[2]
    (tmp_path / "out").rename(tmp_path / "whole")
    assert disc_train(*flags, "--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-1") == 0
    resumed = _logged(tmp_path / "out")
    assert resumed == whole
    line = next(line for line in came_of_it.splitlines() if line.startswith("  probes"))
    assert line in capsys.readouterr().out


def test_probes_that_cannot_be_asked(disc_train, facts, tmp_path, capsys):
    long = write_jsonl(tmp_path / "long.jsonl", {"prompt": "Where? " * 150, "answer": "Merin.", "document": "a"})
    assert disc_train("--probes_file", long) == 1
    assert "--probes_file: none of 1 probes could be asked" in capsys.readouterr().err
    assert disc_train("--probes_file", facts, long, "--dry_run") == 0
    assert "; 1 left out (the first: " in capsys.readouterr().out
    bad = write_jsonl(tmp_path / "bad.jsonl", {"question": "Where?"})
    assert disc_train("--probes_file", bad) == 1
    assert "bad.jsonl:1: no field 'answer'" in capsys.readouterr().err
    assert disc_train("--probe_steps", 2) == 2
    assert "--probe_steps needs --probes_file" in capsys.readouterr().err
