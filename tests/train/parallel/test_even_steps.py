"""Every example once an epoch, in one process's order; what fills up its end is read only where nothing else is."""

import torch
from accelerate.data_loader import SeedableRandomSampler

from disc_train.packing.collator import pack
from disc_train.parallel.even_steps import PaddedDataset, PaddedSampler


def test_the_order_is_that_of_one_process(make_dataset):
    data = PaddedDataset(make_dataset())
    sampler, alone = PaddedSampler(data, 4, seed=3), SeedableRandomSampler(range(7), data_seed=3)
    orders = []
    for epoch in (0, 1, 5):
        data.set_epoch(epoch)
        alone.set_epoch(epoch)
        orders.append(list(sampler))
        assert orders[-1] == [*alone, 7]
    assert len(sampler) == 8 and len({tuple(order) for order in orders}) == 3
    assert len(PaddedSampler(data, 7, seed=3)) == 7


def test_the_epoch_reaches_the_examples(make_dataset):
    dataset = make_dataset(num_splits=2)
    data = PaddedDataset(dataset)
    data.set_epoch(3)
    later = [dataset.splits(i) for i in range(7)]
    data.set_epoch(0)
    assert [dataset.splits(i) for i in range(7)] != later


def test_what_does_not_count_is_left_out_or_has_no_weight(make_dataset):
    data = PaddedDataset(make_dataset())
    mixed, without, alone = pack([data[7], data[1], data[9]]), pack([data[1]]), pack([data[7], data[8]])
    assert torch.equal(mixed["input_ids"], without["input_ids"])
    assert torch.equal(mixed["row_weight"], without["row_weight"])
    assert (mixed["num_examples"], mixed["names"]) == (1, ["doc1"])
    assert (alone["num_examples"], alone["names"]) == (0, ["doc0"])
    assert len(alone["targets"]) > 0 == float(alone["row_weight"].abs().sum())
