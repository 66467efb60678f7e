"""A run that stops when evaluations get no better."""

import re

import torch

from tests.train.files import write_jsonl
from tests.train.runs import weights


def test_a_run_stops_early_and_is_finished_then(disc_train, tmp_path, sentences, capsys):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", {"text": " ".join(sentences[2])})
    flags = ("--eval_file", held_out, "--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1)
    flags += ("--learning_rate", 1, "--max_steps", 9, "--early_stopping_patience", 2)
    assert disc_train(*flags) == 2
    assert "--early_stopping_patience needs --load_best_model_at_end true" in capsys.readouterr().err
    flags += ("--load_best_model_at_end", "true")
    assert disc_train(*flags) == 0
    steps = re.search(r"steps +(\d); .*; stopped early, of 9: evaluations got no better", capsys.readouterr().out)[1]
    best = weights(tmp_path / "out")
    assert torch.equal(best, weights(tmp_path / "out" / f"checkpoint-{int(steps) - 2}"))
    assert disc_train(*flags, "--resume_from_checkpoint", "true") == 0
    assert f"after {steps} of 9 steps, stopped early" in capsys.readouterr().out
    assert torch.equal(best, weights(tmp_path / "out"))
