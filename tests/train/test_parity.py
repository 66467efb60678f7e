"""A packed step equals the authors' procedure: forwards for every split point, full softmaxes, means of means."""

import copy
import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from disc_train.cli import main
from disc_train.objectives import predictions
from disc_train.packing.collator import pack
from disc_train.trainer import DiscTrainer
from tests.train.loop import gradient_error, loop_loss
from tests.train.world import make_model, perturbed

TEMPERATURE = 2.0
# Measured: at most 1.2e-6. float32 rounding, 6e-8 an operation, through two layers and sums over some hundred tokens.
TOLERANCE = 5e-6


def mean_loss(student, teacher, samples):
    """Mean over documents of the mean over split points; samples are (token ids, [(start, stop), ...])."""
    examples = [[(ids[:start], [], ids[start:stop]) for start, stop in splits] for ids, splits in samples]
    return loop_loss(student, teacher, examples, TEMPERATURE) / len(samples)


def packed_step(student, teacher, dataset, batch, folder):
    """Loss and gradients (in `student`) of one step, by the trainer."""
    trainer = DiscTrainer(student, teacher, TrainingArguments(folder, use_cpu=True), dataset, temperature=TEMPERATURE)
    return trainer.training_step(student, batch, num_items_in_batch=batch["num_examples"])


@pytest.fixture
def step(make_dataset, tmp_path):
    """step(architecture, mutate): (loss, the loop's loss, largest gradient error) of a batch of 7 ragged documents."""

    def run(architecture, mutate=lambda batch: None):
        teacher = make_model(architecture)
        student = perturbed(teacher)
        expected = copy.deepcopy(student)
        dataset = make_dataset(num_splits=3)
        samples = [(document.input_ids.tolist(), dataset.splits(i)) for i, document in enumerate(dataset.documents)]
        loss = mean_loss(expected, teacher, samples)
        loss.backward()
        batch = pack([dataset[i] for i in range(len(dataset))])
        mutate(batch)
        got = packed_step(student, teacher, dataset, batch, tmp_path)
        return float(got), float(loss.detach()), gradient_error(student, expected)

    return run


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2"])
def test_loss_and_every_gradient_equal_the_loop(architecture, step):
    got, expected, error = step(architecture)
    assert expected > 0.1
    assert got == pytest.approx(expected, rel=TOLERANCE)
    assert error < TOLERANCE


def _shift_teacher(batch):
    batch["teacher_index"] -= 1


def _shift_student(batch):
    batch["student_index"] = np.roll(batch["student_index"], 1)


def _equal_row_weights(batch):
    batch["row_weight"][:] = batch["num_examples"] / len(batch["row_weight"])


def _one_text(batch):
    """Every suffix sees the one before it."""
    length = len(batch["layout"])
    batch["layout"] = type(batch["layout"]).from_trees([(length, [])])


@pytest.mark.parametrize("mutate", [_shift_teacher, _shift_student, _equal_row_weights, _one_text])
def test_a_wrong_batch_fails(mutate, step):
    _, _, error = step("llama", mutate)
    assert error > 1000 * TOLERANCE


@pytest.mark.parametrize(
    "change",
    [{"temperature": 1.0}, {"divergence": "reverse_kl"}, {"reduction": "mean"}],
    ids=lambda change: next(iter(change)),
)
def test_a_wrong_loss_fails(change, step, monkeypatch):
    real = predictions.fused_suffix_kl
    monkeypatch.setattr(predictions, "fused_suffix_kl", lambda *a, **k: real(*a, **{**k, **change}))
    _, _, error = step("llama")
    assert error > 1000 * TOLERANCE


def test_the_missing_square_of_the_temperature_fails(step, monkeypatch):
    real = predictions.fused_suffix_kl
    monkeypatch.setattr(predictions, "fused_suffix_kl", lambda *a, **k: real(*a, **k) / TEMPERATURE**2)
    _, _, error = step("llama")
    assert error == pytest.approx(0.75, abs=0.01)


def test_the_sliding_window_is_shorter_than_every_document(make_dataset):
    window = make_model("gemma2").config.sliding_window
    assert window < min(len(document.input_ids) for document in make_dataset().documents)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_the_command_line_takes_the_loops_step(architecture, tmp_path, tokenizer, sentences, write_documents, capsys):
    model = make_model(architecture)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    learning_rate = 0.5
    status = main(
        [
            *("--model_name_or_path", str(tmp_path / "model")),
            *("--train_file", str(write_documents(" ".join(text) for text in sentences))),
            *("--output_dir", str(tmp_path / "out")),
            *("--sentence_tokenization", "sentence"),
            *("--num_splits", "9"),  # every sentence after the first, so nothing is left to chance
            *("--per_device_train_batch_size", "7"),
            *("--optim", "sgd"),
            *("--learning_rate", str(learning_rate)),
            *("--max_grad_norm", "0"),
            *("--max_steps", "1"),
            "--use_cpu",
        ]
    )
    assert status == 0, capsys.readouterr().err

    samples = []
    for text in sentences:
        pieces = [tokenizer.encode(sentence, add_special_tokens=False) for sentence in text]
        ends = list(itertools.accumulate(map(len, pieces)))
        samples.append((list(itertools.chain(*pieces)), list(itertools.pairwise(ends))))
    mean_loss(model, make_model(architecture), samples).backward()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for (name, parameter), got in zip(model.named_parameters(), saved.parameters(), strict=True):
        step_taken, expected = got - parameter, -learning_rate * parameter.grad
        # The weights are stored with an error of half a unit in the last place, larger than that of a small step.
        rounding = torch.finfo(torch.float32).eps * parameter.norm()
        assert (step_taken - expected).norm() < TOLERANCE * expected.norm() + rounding, name
        assert expected.norm() > 100 * rounding, name
