"""Batches hold every sequence once, within both limits."""

import random

import pytest
import torch

from disc_train.generation.batches import batches_by_length, pad


@pytest.mark.parametrize(("batch_size", "max_batch_tokens"), [(1, 1000), (7, 1000), (64, 200), (64, 1), (100, 10_000)])
def test_every_sequence_once_within_the_limits(batch_size, max_batch_tokens):
    rng = random.Random(0)
    lengths = [rng.randrange(60) for _ in range(100)]
    batches = list(batches_by_length(lengths, batch_size, max_batch_tokens))
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(100))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) <= batch_size
        assert len(batch) == 1 or len(batch) * lengths[batch[0]] <= max_batch_tokens


def test_nothing_makes_no_batch():
    assert list(batches_by_length([], 4, 100)) == []


@pytest.mark.parametrize(("side", "ids", "mask"), [("left", [0, 0, 4], [0, 0, 1]), ("right", [4, 0, 0], [1, 0, 0])])
def test_padding(side, ids, mask):
    padded, seen = pad([[1, 2, 3], [4]], side, torch.device("cpu"))
    assert padded.tolist() == [[1, 2, 3], ids]
    assert seen.tolist() == [[1, 1, 1], mask]
