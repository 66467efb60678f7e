"""Provide the teacher: a frozen copy of the initial student, another model, or the student with its adapters off.

A copy may follow the student as it trains.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from disc_train.models.causal_lm import load_model


def load_teacher(name_or_path: str, student: PreTrainedModel, args: TrainingArguments) -> PreTrainedModel:
    """Load a teacher, and freeze it."""
    return freeze(load_model(name_or_path, teacher_dtype(student, args)))


def teacher_dtype(student: PreTrainedModel, args: TrainingArguments) -> torch.dtype:
    """Return the dtype of a teacher: 16 bit where training is in mixed precision, else the student's."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else student.dtype


def copy_to_follow(student: PreTrainedModel) -> PreTrainedModel:
    """Copy a student as a teacher that is to follow it, and freeze it; weights that are not trained the two share."""
    shared = {id(parameter): parameter for parameter in student.parameters() if not parameter.requires_grad}
    return freeze(copy.deepcopy(student, shared))


class FollowStudent(TrainerCallback):
    """Move a teacher's weights towards the student's as it trains.

    Args:
        teacher: a copy of the student, such as `copy_to_follow` makes.
        student: of its weights those that are trained are followed.
        decay: an update is teacher = decay * teacher + (1 - decay) * student; 0: the teacher becomes a copy again.
        steps: optimizer steps from one update to the next.

    Raises:
        ValueError: a decay with weights of 16 bits, or numbers out of range.
    """

    FILE = "teacher.safetensors"  # in a checkpoint

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, decay: float, steps: int = 1) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"--teacher_ema_decay: expected a number from 0 to 1, less than 1, got {decay}")
        if steps < 1:
            raise ValueError(f"--teacher_sync_steps: expected at least 1, got {steps}")
        self.student = {name: value for name, value in student.named_parameters() if value.requires_grad}
        narrow = {value.dtype for value in self.student.values() if value.itemsize < 4}
        if decay and narrow:
            raise ValueError(
                f"--teacher_ema_decay: expected weights of 32 bits, got {narrow.pop()}, in which most of an average's"
                " small changes are rounded away: --student_dtype float32, or --teacher_sync_steps"
            )
        of_teacher = dict(teacher.named_parameters())
        self.teacher = {name: of_teacher[name] for name in self.student}
        self.decay, self.steps = decay, steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.steps == 0:
            get_ema_multi_avg_fn(self.decay)([*self.teacher.values()], [*self.student.values()], None)

    def save(self, checkpoint: str) -> None:
        """Write the teacher's weights, as far as they differ from the student's, into a checkpoint."""
        save_file({name: value.detach() for name, value in self.teacher.items()}, Path(checkpoint, self.FILE))

    def load(self, checkpoint: str) -> None:
        """Read them again.

        Raises:
            ValueError: the checkpoint was saved without them.
        """
        path = Path(checkpoint, self.FILE)
        if not path.is_file():
            raise ValueError(f"--teacher ema: expected {self.FILE} in {checkpoint}, got a run with another --teacher")
        with torch.no_grad():
            for name, value in load_file(path).items():
                self.teacher[name].copy_(value)

    def describe(self) -> str:
        """Say how the teacher follows the student."""
        how = (
            f"{self.decay:g} of itself and {1 - self.decay:g} of the student" if self.decay else "a copy of the student"
        )
        return f"becomes {how} " + ("after every step" if self.steps == 1 else f"every {self.steps:,} steps")


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Switch off a model's gradients and dropout."""
    return model.eval().requires_grad_(False)


@contextmanager
def teacher_or_base_model(teacher: PreTrainedModel | None, student: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Yield the teacher; for None the student, with its adapters and dropout switched off meanwhile."""
    if teacher is not None:
        yield teacher
        return
    from peft.utils.other import AuxiliaryTrainingWrapper

    training = student.training
    whole = [module for module in student.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    student.eval()
    student.disable_adapters()
    for module in whole:  # of `modules_to_save` and `trainable_token_indices`: transformers leaves some as they are
        module.enable_adapters(False)
    try:
        yield student
    finally:
        student.enable_adapters()
        for module in whole:
            module.enable_adapters(True)
        student.train(training)
