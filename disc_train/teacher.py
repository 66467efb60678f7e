"""The teacher: a frozen copy of the model that the student starts from, or another model with the same tokenizer."""

import torch
from transformers import PreTrainedModel, TrainingArguments

from disc_train.causal_lm import load_model


def load_teacher(name_or_path: str, student: PreTrainedModel, args: TrainingArguments) -> PreTrainedModel:
    """Load a teacher in 16 bit where training is in mixed precision, else in the student's dtype, and freeze it."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else student.dtype
    return freeze(load_model(name_or_path, dtype)).to(args.device)  # type: ignore[arg-type]


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """No gradients, no dropout."""
    return model.eval().requires_grad_(False)
