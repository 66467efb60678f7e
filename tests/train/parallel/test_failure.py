"""Runs that are killed, terminated and started again: nothing is lost but what came after the last checkpoint."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from disc_train.trainer import DiscTrainer
from tests.train.runs import skip_unless_resumable, weights
from tests.train.world import make_model

# Four steps an epoch, with dropout: a wrong order, split, optimizer or random state would show in the weights.
RUN = ("--num_train_epochs", 3, "--save_steps", 1, "--save_total_limit", 2, "--seed", 7)
TWO_A_STEP = ("--per_device_train_batch_size", 2)
WHOLE = {"model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
RESUMED = ("--resume_from_checkpoint", "true")


@pytest.fixture(autouse=True)
def _dropout(model_folder):
    make_model(attention_dropout=0.2).save_pretrained(model_folder)


@pytest.fixture
def whole(start, tmp_path):
    """whole(*flags, **options): the weights of a run that nothing disturbs."""

    def run(*flags, **options):
        started = start(*RUN, *flags, "--output_dir", tmp_path / "whole", **options)
        assert set(started.wait()) == {0}, started.logs
        return weights(tmp_path / "whole")

    return run


def _wait_until(folder, exists, process, timeout=60):
    """Wait until a folder is there, or gone, or the process has ended."""
    deadline = time.monotonic() + timeout
    while process.is_alive() and folder.exists() != exists:
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def _checkpoints(folder):
    """By step."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def _names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_killed_at_any_time_and_started_again(start, whole, tmp_path):
    """Killed 24 times: a third anywhere in the run, the others while a checkpoint is written or has just been."""
    expected = whole(*TWO_A_STEP)
    rng, kills, while_saving, runs = random.Random(0), 0, 0, 0
    while kills < 24:
        folder, runs, code = tmp_path / f"out{runs}", runs + 1, None
        unfinished = folder / "unfinished"
        while code != 0:
            run = start(*RUN, *TWO_A_STEP, *RESUMED, "--output_dir", folder)
            (process,) = run.processes
            if rng.random() < 1 / 3:
                process.join(rng.uniform(0.1, 0.8))
            else:
                for _ in range(rng.randint(1, 3)):
                    _wait_until(unfinished, False, process)  # one that a run before has left
                    _wait_until(unfinished, True, process)
                time.sleep(rng.uniform(0, 0.02))
            process.kill()
            (code,) = run.wait()
            assert code in (0, -signal.SIGKILL), run.logs
            kills += code != 0
            assert all(_names(last) >= WHOLE for last in _checkpoints(folder)[-1:])
            while_saving += unfinished.exists()
        assert torch.equal(weights(folder), expected)
        assert len(_checkpoints(folder)) <= 3  # killed before the oldest of three was deleted
    assert while_saving >= 3
    print(f"{kills} kills, {while_saving} of them while a checkpoint was written, in {runs} runs")


SHARED = ("--per_device_train_batch_size", 1, "--dataloader_num_workers", 1)
ACCUMULATED = ("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2)


@pytest.mark.parametrize(
    ("flags", "world", "sent"),
    [
        (SHARED, 2, signal.SIGTERM),
        (ACCUMULATED, 1, signal.SIGINT),
        ((*ACCUMULATED, "--num_train_epochs", 6), 2, signal.SIGINT),
    ],
)
def test_stopped_and_resumed(flags, world, sent, start, whole, tmp_path):
    """The signal reaches one process and the workers of its data loader; all stop after one step, and one says so."""
    skip_unless_resumable(world)
    expected = whole(*flags, world=world)
    folder = tmp_path / "out"
    run = start(*RUN, *flags, "--save_steps", 2, "--output_dir", folder, world=world)
    _wait_until(folder / "checkpoint-2", True, run.processes[0])
    os.killpg(run.processes[-1].pid, sent)
    assert run.wait() == [128 + sent] * world, run.logs
    how = "interrupted" if sent == signal.SIGINT else "terminated"
    step = re.search(rf"error: {how} after step (\d+) of 12, which is saved: the same command with", run.logs[0])[1]
    assert sum(log.count(" after step ") for log in run.logs) == 1
    assert 2 < int(step) < 12
    assert (folder / f"checkpoint-{step}").exists()
    run = start(*RUN, *flags, *RESUMED, "--output_dir", folder, world=world)
    assert run.wait() == [0] * world, run.logs
    assert re.search(rf"; {step} are done, in \S*checkpoint-{step}\n", run.logs[0])
    assert (f" in {world} processes; " in run.logs[0]) == (world > 1)
    assert torch.equal(weights(folder), expected)


def take_forever_in_the_second_step():
    real = DiscTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step:
            time.sleep(600)
        return real(self, *args, **kwargs)

    DiscTrainer.training_step = step


def test_interrupted_twice(start, tmp_path):
    """The second time does not wait for the step."""
    run = start(*RUN, *TWO_A_STEP, "--output_dir", tmp_path / "out", prepare=take_forever_in_the_second_step)
    (process,) = run.processes
    _wait_until(tmp_path / "out" / "checkpoint-1", True, process)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    process.join(1)
    assert process.is_alive()
    assert (
        run.logs[0].count(
            "interrupted: the running step and at most one more are finished, then a checkpoint is saved;"
        )
        == 1
    )
    os.kill(process.pid, signal.SIGINT)
    assert run.wait(10) == [-signal.SIGINT]


def test_resumed_in_another_number_of_processes(start, whole, tmp_path, model_folder):
    """The documents of every step are the same, and so are the weights, to rounding; without dropout, that is."""
    make_model().save_pretrained(model_folder)
    same = ("--lr_scheduler_type", "constant", "--optim", "sgd")
    expected = whole(*TWO_A_STEP, *same)
    folder = tmp_path / "out"
    for world, batch, steps in ((1, 2, 6), (2, 1, 12)):
        flags = ("--per_device_train_batch_size", batch, *same, *RESUMED, "--max_steps", steps)
        run = start(*RUN, *flags, "--output_dir", folder, world=world)
        assert run.wait() == [0] * world, run.logs
    assert torch.allclose(weights(folder), expected, rtol=0, atol=1e-6)


def test_a_checkpoint_that_is_written_again_gives_way(start, tmp_path):
    folder = tmp_path / "out"
    assert start(*RUN, *TWO_A_STEP, "--max_steps", 2, "--output_dir", folder).wait() == [0]
    before = weights(folder / "checkpoint-2")
    flags = (*RUN, *TWO_A_STEP, "--temperature", 1, "--max_steps", 3, "--output_dir", folder)
    assert start(*flags, "--resume_from_checkpoint", folder / "checkpoint-1").wait() == [0]
    assert not torch.equal(weights(folder / "checkpoint-2"), before)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.slow
def test_a_killed_rank_ends_the_job(start, tmp_path, model_folder):
    """Under torchrun, which says which; the last checkpoint is whole."""
    folder = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2),
        *("-m", "disc_train.cli", "--model_name_or_path", model_folder),
        *("--train_file", tmp_path / "documents.jsonl", "--output_dir", folder),
        *(*RUN, "--num_train_epochs", 1000, *SHARED),
    ]
    job = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 300
        while not (folder / "checkpoint-2").exists():
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        ranks = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        _, errors = job.communicate(timeout=300)
    finally:
        job.terminate()
    assert job.returncode == 1
    assert re.search(r"exitcode *: -9", errors) and "Signal 9 (SIGKILL) received" in errors
    last = _checkpoints(folder)[-1]
    assert weights(last).isfinite().all()
    assert (WHOLE - {"rng_state.pth"}) | {"rng_state_0.pth", "rng_state_1.pth"} <= {
        path.name for path in last.iterdir()
    }
