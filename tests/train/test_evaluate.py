"""Evaluation during training: what is measured, on the same splits, in any number of processes; the best model."""

import json

import pytest
import torch
from transformers import EarlyStoppingCallback

from disc_train.cli import main
from disc_train.packing.collator import pack
from disc_train.trainer import DiscTrainer
from tests.train.files import write_jsonl
from tests.train.runs import weights
from tests.train.world import SENTENCES, make_model, perturbed, run_arguments


@pytest.fixture
def make_trainer(make_dataset, tmp_path):
    """make_trainer(**arguments): trains on seven documents, and evaluates three of them."""

    def make(callbacks=None, **arguments):
        args = run_arguments(tmp_path / "out", per_device_train_batch_size=4, **arguments)
        model = perturbed(make_model(attention_dropout=0.5))
        options = {"eval_dataset": make_dataset(3, num_splits=2), "callbacks": callbacks}
        return DiscTrainer(model, make_model(), args, make_dataset(), ce_weight=0.5, **options)

    return make


def _metrics(trainer):
    return [
        {name: entry[name] for name in ("eval_loss", "eval_cross_entropy", "eval_kl")}
        for entry in trainer.state.log_history
        if "eval_loss" in entry
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_means_over_the_examples(batch_size, make_trainer, make_dataset):
    trainer = make_trainer(per_device_eval_batch_size=batch_size)
    trainer.model.train()
    metrics = trainer.evaluate()
    assert trainer.model.training
    assert metrics["eval_loss"] == pytest.approx(4 * metrics["eval_kl"] + 0.5 * metrics["eval_cross_entropy"])
    trainer.model.eval()
    dataset = make_dataset(3, num_splits=2)
    losses = [trainer.compute_loss(trainer.model, pack([dataset[i]]), num_items_in_batch=1) for i in range(3)]
    assert metrics["eval_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_every_evaluation_has_the_same_splits_and_the_training_is_as_without(make_trainer):
    evaluated = make_trainer(num_train_epochs=2, eval_strategy="epoch", learning_rate=0.0)
    evaluated.train()
    first, second = _metrics(evaluated)
    assert first == second
    evaluated = make_trainer(max_steps=3, eval_strategy="steps", eval_steps=1)
    evaluated.train()
    plain = make_trainer(max_steps=3)
    plain.train()
    assert all(torch.equal(p, q) for p, q in zip(evaluated.model.parameters(), plain.model.parameters(), strict=True))


def test_the_best_model_is_kept_and_loaded(make_trainer, tmp_path):
    """At such a rate the loss soon rises, and after two evaluations that are worse the training ends."""
    each_step = dict.fromkeys(("eval_strategy", "save_strategy"), "steps") | {"eval_steps": 1, "save_steps": 1}
    trainer = make_trainer(
        *([EarlyStoppingCallback(2)],), **each_step, load_best_model_at_end=True, save_total_limit=2, learning_rate=0.5
    )
    trainer.train()
    losses = [metrics["eval_loss"] for metrics in _metrics(trainer)]
    step = 1 + losses.index(min(losses))
    assert trainer.state.global_step == step + 2 < trainer.state.max_steps
    best = tmp_path / "out" / f"checkpoint-{step}"
    assert trainer.state.best_model_checkpoint == str(best)
    for checkpoint in (best, tmp_path / "out" / f"checkpoint-{step + 2}"):
        assert json.loads((checkpoint / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    trainer.save_model()
    assert torch.equal(weights(tmp_path / "out"), weights(best))
    trainer.restore(str(tmp_path / "out" / f"checkpoint-{step + 2}"))
    trainer.save_model()
    assert torch.equal(weights(tmp_path / "out"), weights(best))


# Dropout would draw other numbers in two processes than in one.
@pytest.mark.parametrize("flags", [(), ("--method", "talr", "--lora_rank", "2", "--lora_dropout", "0")])
def test_processes_measure_together(flags, start, tmp_path, sentences):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", *({"text": " ".join(text)} for text in sentences[:5]))
    facts = write_jsonl(tmp_path / "facts.jsonl", *({"prompt": each, "answer": "Merin."} for each in SENTENCES[:3]))
    flags = (
        *flags,
        "--probes_file",
        facts,
        "--eval_file",
        held_out,
        "--eval_strategy",
        "steps",
        "--eval_steps",
        1,
        "--max_steps",
        1,
    )
    flags += ("--load_best_model_at_end", "true", "--save_steps", 1, "--optim", "sgd")
    logged = []
    for world in (1, 2):
        sizes = ("--per_device_eval_batch_size", 2, "--per_device_train_batch_size", 2 // world)
        run = start(*flags, *sizes, "--output_dir", tmp_path / f"of-{world}", world=world)
        assert set(run.wait()) == {0}, run.logs
        assert "documents     evaluated: 5 read, 5 used;" in run.logs[0]
        state = json.loads((tmp_path / f"of-{world}" / "trainer_state.json").read_text())
        logged.append(next(entry for entry in state["log_history"] if "eval_loss" in entry))
        logged[-1] |= next(entry for entry in reversed(state["log_history"]) if "eval_probes_facts_logprob" in entry)
    one, two = logged
    for name in (
        "eval_loss",
        "eval_cross_entropy",
        "eval_probes_facts_logprob",
        *(() if "talr" in flags else ("eval_kl",)),
    ):
        assert one[name] == pytest.approx(two[name], rel=1e-5)
    assert ("eval_kl" in one) == ("talr" not in flags)


@pytest.mark.parametrize(("given", "other"), [("eval_file", "eval_strategy"), ("eval_strategy", "eval_file")])
def test_a_file_and_when_need_each_other(given, other, capsys):
    value = {"eval_file": "e.jsonl", "eval_strategy": "epoch"}[given]
    flags = ["--model_name_or_path", "m", "--train_file", "f", "--output_dir", "o", "--use_cpu", f"--{given}", value]
    assert main(flags) == 2
    assert f"--{given} needs --{other}, got it without" in capsys.readouterr().err
