"""The summary counts every token of the documents once."""

import numpy as np
import pytest
from transformers import TrainingArguments

from disc_train.data.dataset import ExampleDataset
from disc_train.data.description import count_tokens
from disc_train.data.splits import Split, TokenizedDocument
from disc_train.packing.collator import pack
from disc_train.summary import count_steps, describe_packing
from disc_train.trainer import DiscTrainer
from tests.train.world import make_model


def _document(length):
    return TokenizedDocument("d", np.arange(length, dtype=np.int32), (0,))


def test_counts_by_hand():
    samples = [
        (_document(10), [Split(2, 5), Split(6, 8)]),
        (_document(6), [Split(2, 6), Split(4, 6)]),  # the second begins inside the first
    ]
    counts = count_tokens(samples, first=1)
    assert (counts.trained, counts.first, counts.prefix, counts.unread) == (2 + 1 + 3, 2 + 1, 3 + 2, 2)
    assert counts.total == 16
    assert counts.suffixes == 4
    assert counts.rows == 2 + 1 + 3 + 1
    with_header = count_tokens(samples, first=0)
    assert (with_header.trained, with_header.first, with_header.prefix, with_header.unread) == (3 + 2 + 4, 0, 3 + 2, 2)
    assert with_header.rows == counts.rows + 4


def test_an_epoch_without_a_batch(tmp_path):
    args = TrainingArguments(tmp_path, use_cpu=True, per_device_train_batch_size=8, dataloader_drop_last=True)
    with pytest.raises(ValueError, match=r"--dataloader_drop_last: expected at least 8 examples.*got 7"):
        count_steps(args, 7)


@pytest.mark.parametrize(("batch_size", "batches", "tried"), [(2000, 1, 2000), (100, 2, 200), (1, 256, 256)])
def test_packing_is_tried_on_about_256_examples(batch_size, batches, tried, make_dataset):
    sizes = []

    def collate(examples):
        sizes.append(len(examples))
        return pack(examples[:1])

    example = make_dataset()[0]
    label, text = describe_packing(ExampleDataset([example] * 3000), batch_size, collate)
    assert (label, len(sizes), sum(sizes)) == ("packing", batches, tried)
    assert f"({batches} tried)" in text


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 4, "num_train_epochs": 1.5},
        {"per_device_train_batch_size": 2, "dataloader_drop_last": True},
        {"per_device_train_batch_size": 2, "max_steps": 5},
    ],
)
def test_steps_are_the_trainers(options, tmp_path, make_dataset):
    args = TrainingArguments(tmp_path, use_cpu=True, disable_tqdm=True, save_strategy="no", **options)
    trainer = DiscTrainer(make_model(), make_model(), args, make_dataset())
    trainer.train()
    assert count_steps(args, 7)[0] == trainer.state.global_step
