"""Several processes take the steps of one, whoever starts them."""

import subprocess
import sys

import pytest
import torch

from tests.train.runs import losses, weights
from tests.train.world import make_model

# Plain gradient descent shows differences as they are; Adam makes of a gradient's rounding a step of full size.
STEPS = ("--optim", "sgd", "--learning_rate", "0.1", "--max_grad_norm", "0", "--num_train_epochs", "2")
LOGS = ("--logging_steps", "1", "--save_strategy", "no")


@pytest.fixture
def train(start, tmp_path):
    """train(name, *flags, world=1, **options): a run in a folder of that name, which is returned."""

    def run(name, *flags, **options):
        started = start(*STEPS, *LOGS, *flags, "--output_dir", tmp_path / name, **options)
        assert set(started.wait()) == {0}, started.logs
        assert "find_unused_parameters" not in "".join(started.logs)  # PyTorch warns of it where all are used
        return tmp_path / name

    return run


def _flags(batch, accumulated=1):
    return "--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulated


def test_one_process_of_eight_documents_is_two_of_four_and_four_of_two(train, model_folder):
    whole = train("whole", *_flags(8))
    assert (weights(whole) - weights(model_folder)).abs().max() > 1e-3
    assert len(losses(whole)) == 2
    for name, flags, world in (
        ("two", (*_flags(4), "--use_cpu", "false"), 2),  # there is nothing else to use
        ("four", _flags(2), 4),
        ("four accumulated", _flags(1, 2), 4),
    ):
        parts = train(name, *flags, world=world)
        assert torch.allclose(weights(parts), weights(whole), rtol=0, atol=1e-6), name
        assert losses(parts) == pytest.approx(losses(whole), rel=1e-5), name


def test_a_weight_that_depends_on_the_whole_step(train):
    """TALR's median is over all the step's documents, wherever they are."""
    whole = train("whole", *_flags(4), "--method", "talr")
    parts = train("parts", *_flags(1, 2), "--method", "talr", world=2)
    assert torch.allclose(weights(parts), weights(whole), rtol=0, atol=1e-6)


def test_a_teacher_that_follows_the_student_is_the_same_everywhere(train):
    flags = ("--teacher", "ema", "--teacher_ema_decay", 0.5)
    whole = train("whole", *_flags(4), *flags)
    parts = train("parts", *_flags(2), *flags, world=2)
    assert torch.allclose(weights(parts), weights(whole), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["disc", "talr"])
def test_a_last_step_with_fewer_documents_than_there_are_places(method, train):
    """8 documents, 6 a step: in the last one of an epoch, a process has none of the two; nor, of three, another."""
    whole = train("whole", *_flags(6), "--method", method)
    for name, flags, world in (("two", _flags(3), 2), ("three", _flags(1, 2), 3)):
        parts = train(name, *flags, "--method", method, world=world)
        assert torch.allclose(weights(parts), weights(whole), rtol=0, atol=1e-6), name
        assert losses(parts) == pytest.approx(losses(whole), rel=1e-5), name


def test_every_process_has_workers_of_its_own(train):
    whole = train("whole", *_flags(4))
    parts = train("parts", *_flags(2), "--dataloader_num_workers", 1, world=2)
    assert torch.allclose(weights(parts), weights(whole), rtol=0, atol=1e-6)


def test_tied_embeddings_and_gradient_checkpointing(train, model_folder):
    make_model(tie_word_embeddings=True).save_pretrained(model_folder)
    whole = train("whole", *_flags(4, 2))
    parts = train("parts", *_flags(2, 2), "--gradient_checkpointing", "true", world=2)
    assert (weights(whole) - weights(model_folder)).abs().max() > 1e-3
    assert torch.allclose(weights(parts), weights(whole), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_accelerate_starts_them(train, model_folder, tmp_path):
    whole = train("whole", *_flags(8))
    # On the CPU accelerate starts several processes only if it takes them for those of GPUs.
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "-m", "disc_train.cli"),
        *("--model_name_or_path", model_folder, "--train_file", tmp_path / "documents.jsonl"),
        *("--output_dir", tmp_path / "launched", *STEPS, *LOGS, *_flags(4)),
    ]
    launched = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert launched.returncode == 0, launched.stderr
    assert "of up to 8 documents" in launched.stdout
    assert torch.allclose(weights(tmp_path / "launched"), weights(whole), rtol=0, atol=1e-6)
