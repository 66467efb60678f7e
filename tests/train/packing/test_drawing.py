"""Examples that share a context are drawn together, at random otherwise, and as before where none is shared."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import RandomSampler

from disc_train.data.dataset import ExampleDataset, ReplayDataset
from disc_train.data.example import NO_IDS, Branch, Context, Example
from disc_train.packing.collator import pack
from disc_train.packing.drawing import draw_together, group_contexts, sample_batches
from disc_train.parallel.even_steps import PaddedDataset, PaddedSampler
from disc_train.trainer import DiscTrainer
from tests.train.world import make_model, run_arguments


def _records(contexts, each, context_tokens=36, target_tokens=26, seed=0):
    """Records of some contexts, shuffled; sizes of tokens as a transfer set of definitions has them."""
    rng = np.random.default_rng(seed)
    definitions = rng.integers(0, 290, (contexts, context_tokens), dtype=np.int32)
    numbers = rng.permutation(np.repeat(np.arange(contexts), each))
    targets = rng.integers(0, 290, (len(numbers), target_tokens), dtype=np.int32)
    return [
        Example(f"r{i}", definitions[number], NO_IDS, [Branch(target, Context(context_tokens), Context(0))])
        for i, (number, target) in enumerate(zip(numbers, targets, strict=True))
    ]


def test_contexts_that_begin_alike_are_one_group():
    instruction, other = list(range(100, 140)), list(range(200, 240))
    contexts = [[*instruction, 1], other, [*instruction, 2, 3], [], [*instruction[:19], *other], other[:15], other]
    groups = group_contexts([np.array(context, dtype=np.int32) for context in contexts])
    assert groups[0] == groups[2]
    assert groups[1] == groups[6]
    assert len(set(groups)) == 5


drawn_and_groups = st.lists(st.integers(0, 5), min_size=1, max_size=40).flatmap(
    lambda groups: st.tuples(st.permutations(range(len(groups))), st.just(groups))
)


@settings(deadline=None, max_examples=200)
@given(drawn_and_groups, st.integers(1, 6))
def test_every_example_is_drawn_once_and_groups_are_in_few_steps(drawn_and_groups, step):
    drawn, groups = drawn_and_groups
    order = draw_together(drawn, groups, step)
    assert sorted(order) == sorted(drawn)
    steps = [order[first : first + step] for first in range(0, len(order), step)]
    for group, size in Counter(groups).items():
        # Full steps of its own, and what is left in one step, or across the end of one.
        assert sum(any(groups[i] == group for i in members) for members in steps) <= size // step + 2 * (
            size % step > 0
        )


@given(st.permutations(range(23)), st.integers(1, 8), st.booleans())
def test_the_order_is_as_drawn_where_nothing_or_everything_is_shared(drawn, step, everything):
    assert draw_together(drawn, [0] * 23 if everything else range(23), step) == drawn


def test_large_groups_come_no_earlier():
    groups = [0] * 12 + list(range(1, 37))
    rng = random.Random(0)
    orders = [draw_together(rng.sample(range(48), 48), groups, 16) for _ in range(400)]
    means = np.mean([[order.index(index) for index in (0, 20)] for order in orders], axis=0)
    assert np.abs(means - 23.5).max() < 4  # of the first steps only, it would be 5.5


def test_a_definition_is_read_about_once_a_step():
    """850 records of 85 definitions in steps of 16, as a transfer set has them."""
    records = _records(85, 10)
    dataset = PaddedDataset(ExampleDataset(records))

    def teacher_tokens(order):
        batches = [pack([records[i] for i in order[first : first + 16]]) for first in range(0, 850, 16)]
        return sum(batch["teacher_input_ids"].numel() for batch in batches)

    targets = sum(len(record.branches[0].target) - 1 for record in records)
    each = 850 * 36
    at_random = teacher_tokens(torch.randperm(850, generator=torch.Generator().manual_seed(0)).tolist()) - targets
    together = teacher_tokens(list(PaddedSampler(dataset, 1, seed=0, step=16))) - targets
    assert 1.0 < each / at_random < 1.1
    assert each / together > 6  # a definition's ten records are in 1 or 2 steps
    assert (each + targets) / (together + targets) > 2


def test_replayed_records_are_drawn_together_too():
    data = ReplayDataset(ExampleDataset(_records(3, 4)), ExampleDataset(_records(2, 6, seed=1)), share=0.4, seed=0)
    groups = group_contexts(data.contexts())
    assert (len(groups), len(set(groups))) == (len(data), 5)
    for index in range(len(data)):
        assert np.array_equal(data.contexts()[index], data[index].teacher_trunk)


def test_packing_is_tried_on_batches_as_they_are_drawn():
    batches = sample_batches(ExampleDataset(_records(85, 10)), 10)
    assert [len(batch) for batch in batches] == [10] * 25
    assert max(len({example.teacher_trunk.tobytes() for example in batch}) for batch in batches) == 1


@pytest.fixture
def make_trainer(tmp_path):
    """make_trainer(records, **arguments): a trainer of these records by context distillation, with steps of 4."""

    def make(records, **arguments):
        arguments = {"per_device_train_batch_size": 4, "num_train_epochs": 1} | arguments
        args = run_arguments(tmp_path / "out", learning_rate=1e-2, **arguments)
        dataset = records if isinstance(records, ExampleDataset) else ExampleDataset(records)
        return DiscTrainer(make_model(), make_model(), args, dataset, method="cd")

    return make


def test_a_run_that_is_resumed_draws_what_it_would_have_drawn(make_trainer, tmp_path):
    def train(resume=None):
        arguments = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
        trainer = make_trainer(_records(2, 6, target_tokens=5), **arguments)  # 3 steps an epoch
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / "out" / f"checkpoint-{resume}"))
        return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])

    weights = train()
    assert torch.equal(train(resume=2), weights)
    assert torch.equal(train(resume=4), weights)


@pytest.mark.parametrize("arguments", [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}])
def test_records_are_drawn_together_in_a_step_however_it_is_divided(make_trainer, arguments):
    sampler = make_trainer(_records(4, 4, target_tokens=5), **arguments)._get_train_sampler()
    trunks = [sampler.dataset[index].teacher_trunk.tobytes() for index in sampler]
    assert [len(set(trunks[first : first + 4])) for first in range(0, 16, 4)] == [1] * 4


def test_the_order_does_not_hang_on_what_the_first_epoch_replays(make_trainer, monkeypatch):
    """Two replayed records share a context, and the first epoch draws others; several processes look anew each time."""
    alone, (one, other) = _records(8, 1, target_tokens=5), _records(1, 2, target_tokens=5, seed=1)
    data = ReplayDataset(ExampleDataset(alone[:4]), ExampleDataset([*alone[4:], one, other]), share=1 / 3, seed=0)
    monkeypatch.setattr(data, "_draw", lambda: [[0, 1], [4, 5]][data.epoch])
    sampler = make_trainer(data, per_device_train_batch_size=2)._get_train_sampler()
    data.set_epoch(1)
    order = list(sampler)
    assert order.index(4) // 2 == order.index(5) // 2


def test_records_that_share_nothing_are_drawn_as_transformers_does(make_trainer):
    assert type(make_trainer(_records(8, 1))._get_train_sampler()) is RandomSampler
