"""What a dry run says that a step costs, against a step."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import peak_bytes
from disc_train.cost import measure_cost
from disc_train.models.adapters import add_lora
from disc_train.models.frozen_head import freeze_head
from disc_train.trainer import DiscTrainer
from tests.train.world import make_model, run_arguments

SHAPE = {"vocab_size": 2000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}


@pytest.fixture
def make_trainer(make_dataset, tmp_path):
    def make(change=lambda model: model, **arguments):
        student, teacher = change(make_model(**SHAPE)), make_model(**SHAPE)
        args = run_arguments(tmp_path, per_device_train_batch_size=7, max_steps=2, **arguments)
        return DiscTrainer(student, teacher, args, make_dataset(num_splits=3))

    return make


CHANGES = {
    "trained": lambda model: model,
    "frozen head": freeze_head,
    "adapters": lambda model: add_lora(model, 4, 8, 0.0),
    "bfloat16": lambda model: model.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_step_takes_what_was_said(change, make_trainer, make_dataset):
    """Weights, gradients and states to the byte; the peak of two steps 0.6 to 1.1 times."""
    trainer = make_trainer(CHANGES[change])
    before = copy.deepcopy(trainer.student.state_dict())
    cost = measure_cost(trainer, make_dataset(num_splits=3))
    assert all(torch.equal(value, before[name]) for name, value in trainer.student.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.student.parameters())
    gradients = []

    def step(*args, **kwargs):
        gradients.append(sum(p.grad.nbytes for p in trainer.student.parameters() if p.grad is not None))

    trainer.create_optimizer_and_scheduler(2)
    trainer.optimizer.register_step_pre_hook(step)
    peak = peak_bytes(trainer.train, "cpu")
    states = trainer.optimizer.state.values()
    assert cost.optimizer == sum(t.nbytes for state in states for t in state.values() if t.numel() > 1)
    assert gradients == [cost.gradients] * 2
    assert cost.weights >= sum(parameter.nbytes for parameter in trainer.student.parameters())
    expected = cost.gradients + cost.optimizer + cost.activations + cost.workspace
    assert 0.6 < peak / expected < 1.1


@pytest.mark.parametrize(("kl_clip", "products"), [(None, 4), (1.0, 6)])
def test_operations_are_those_of_a_step(kl_clip, products, make_trainer, make_dataset):
    trainer = make_trainer()
    trainer.settings = trainer.settings._replace(kl_clip=kl_clip)
    cost = measure_cost(trainer, make_dataset(num_splits=3))
    batch = trainer.data_collator([trainer._padded_dataset.dataset[i] for i in range(7)])
    with FlopCounterMode(display=False) as counted:
        trainer.training_step(trainer.model, batch, num_items_in_batch=7)
    assert sum(cost.operations.values()) == pytest.approx(counted.get_total_flops(), rel=0.02)
    rows, head = len(batch["student_index"]), trainer.student.lm_head.weight
    assert cost.operations["loss"] == products * 2 * rows * head.numel()
