"""Provide the teacher: a frozen copy of the initial student, another model, or the student with its adapters off."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel, TrainingArguments

from disc_train.models.causal_lm import load_model


def load_teacher(name_or_path: str, student: PreTrainedModel, args: TrainingArguments) -> PreTrainedModel:
    """Load a teacher, and freeze it."""
    return freeze(load_model(name_or_path, teacher_dtype(student, args)))


def teacher_dtype(student: PreTrainedModel, args: TrainingArguments) -> torch.dtype:
    """Return the dtype of a teacher: 16 bit where training is in mixed precision, else the student's."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else student.dtype


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
