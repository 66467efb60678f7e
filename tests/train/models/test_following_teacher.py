"""A teacher that follows the student is the average, or the copy, that a plain loop keeps."""

import copy

import pytest
import torch
from transformers import TrainingArguments

from disc_train.cost import measure_cost
from disc_train.models.adapters import add_lora
from disc_train.models.live_teacher import copy_to_follow
from disc_train.trainer import DiscTrainer
from tests.train.objectives.test_methods import plain_disc
from tests.train.world import make_model

RATE = 0.05


@pytest.fixture
def make_trainer(make_dataset, tmp_path):
    """make_trainer(student, decay, every): three steps of all seven documents, by plain gradient descent."""

    def make(student, decay, every=1, **options):
        args = TrainingArguments(
            *(tmp_path,),
            **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "optim": "sgd"},
            **{"learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "num_train_epochs": 3},
            per_device_train_batch_size=7,
        )
        dataset, teacher = make_dataset(num_splits=3), copy_to_follow(student)
        return DiscTrainer(
            *(student, teacher, args, dataset), teacher_ema_decay=decay, teacher_sync_steps=every, **options
        )

    return make


def plain_steps(student, dataset, decay, every):
    """Take the steps in a loop; return the teacher that follows."""
    teacher = copy.deepcopy(student)
    for step in range(3):
        dataset.set_epoch(step)
        data = [(document.input_ids, dataset.splits(i)) for i, document in enumerate(dataset.documents)]
        student.zero_grad()
        plain_disc(teacher, student, data, ce_weight=0.3).backward()
        with torch.no_grad():
            for of_student, of_teacher in zip(student.parameters(), teacher.parameters(), strict=True):
                of_student -= RATE * of_student.grad
                if (step + 1) % every == 0:
                    of_teacher.copy_(decay * of_teacher + (1 - decay) * of_student)
    return teacher


def distance(model, other):
    return max(float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("decay", "every"), [(0.5, 1), (0.0, 2)])
def test_an_average_and_a_copy_every_two_steps(decay, every, make_trainer, make_dataset):
    expected = make_model().double()
    trainer = make_trainer(copy.deepcopy(expected), decay, every, ce_weight=0.3)
    trainer.train()
    teacher = plain_steps(expected, make_dataset(num_splits=3), decay, every)
    moved = distance(teacher, make_model().double())
    assert moved > 1e-3 and distance(teacher, expected) > 1e-4
    assert distance(trainer.teacher, teacher) < 1e-5 * moved
    assert distance(trainer.student, expected) < 1e-5 * moved


def test_adapters_are_followed_and_the_rest_is_shared(make_trainer, make_dataset):
    torch.manual_seed(0)
    student = add_lora(make_model(), 2, 4, 0.0)
    before = {name: value.clone() for name, value in student.named_parameters()}
    trainer = make_trainer(student, 0.75)
    followed = dict(trainer.teacher.named_parameters())
    added = sum(followed[name].nbytes for name in before if "lora_" in name)
    buffers = sum(buffer.nbytes for buffer in trainer.teacher.buffers())
    assert measure_cost(trainer, make_dataset(num_splits=3)).teacher == added + buffers
    for step in range(1, 3):
        trainer.args.max_steps = step
        trainer.train()
    changed = 0
    for name, value in student.named_parameters():
        assert (followed[name] is value) == ("lora_" not in name), name
        changed += not torch.equal(followed[name], before[name])
    assert changed == len(trainer.follow.teacher)


def test_divided_models_are_not_followed(make_trainer, monkeypatch):
    monkeypatch.setattr(DiscTrainer, "_move_to_device", lambda self, *_, **__: setattr(self, "is_fsdp_enabled", True))
    with pytest.raises(ValueError, match="--teacher ema: expected a model that is whole in every process, got --fsdp"):
        make_trainer(make_model(), 0.5)


def test_what_cannot_be_followed(make_trainer, make_dataset, tmp_path):
    with pytest.raises(ValueError, match=r"--teacher_ema_decay: expected weights of 32 bits, got torch.bfloat16, in"):
        make_trainer(make_model().bfloat16(), 0.5)
    make_trainer(make_model().bfloat16(), 0.0)
    for decay, steps, message in ((1.0, 1, "--teacher_ema_decay: .* got 1.0"), (0.5, 0, "--teacher_sync_steps: .* 0")):
        with pytest.raises(ValueError, match=message):
            make_trainer(make_model(), decay, steps)
    args = TrainingArguments(tmp_path, use_cpu=True)
    student = add_lora(make_model(), 2, 4, 0.0)
    with pytest.raises(
        ValueError, match="--teacher ema: expected a model that is whole in every process, got NoneType"
    ):
        DiscTrainer(student, None, args, make_dataset(), teacher_ema_decay=0.5)
