"""Hundreds and thousands of steps take no more memory and no more files than the first ones."""

import gc
import os

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from disc_kernels import fused_suffix_kl
from disc_train.data.dataset import DocumentDataset
from disc_train.data.splits import TokenizedDocument
from disc_train.trainer import DiscTrainer
from tests.train.world import make_model

pytestmark = pytest.mark.slow


def held():
    """Bytes that this process holds itself, and its open files."""
    gc.collect()
    with open("/proc/self/status") as status:
        anonymous = next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))
    return anonymous, len(os.listdir("/proc/self/fd"))


def test_the_loss():
    """A leak of 2 KB a step is seen; a row's logits are 8."""
    head = torch.randn(2048, 8, requires_grad=True)
    teacher_head = torch.randn(2048, 8)

    def steps(count):
        for step in range(count):
            rows = 1 + step % 7
            hidden, teacher_hidden = torch.randn(rows, 8, requires_grad=True), torch.randn(rows, 8)
            fused_suffix_kl(hidden, head, teacher_hidden, teacher_head).backward()
            head.grad = None

    steps(200)
    memory, files = held()
    steps(2000)
    after, files_after = held()
    assert after - memory < 4 << 20
    assert files_after == files


class Measure(TrainerCallback):
    def __init__(self):
        self.found = {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (100, 400):
            self.found[state.global_step] = held()


def test_training(tmp_path):
    """A leak of 14 KB a step is seen; what a step's graph holds is more."""
    ids = np.arange(12, dtype=np.int32)
    documents = [TokenizedDocument(f"d{number}", ids + number, (0, 4, 8)) for number in range(50)]
    size = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8}
    args = TrainingArguments(
        tmp_path,
        max_steps=400,
        per_device_train_batch_size=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=100,
    )
    measure = Measure()
    dataset = DocumentDataset(documents, num_splits=1)
    DiscTrainer(make_model(**size), make_model(**size), args, dataset, callbacks=[measure]).train()
    (memory, files), (after, files_after) = measure.found.values()
    assert after - memory < 4 << 20
    assert files_after == files
