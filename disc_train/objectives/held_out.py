"""Measure a method on examples that it is not trained on."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from disc_train.objectives.methods import AT_TEMPERATURE, OBJECTIVES, WITH_TEACHER, Settings
from disc_train.objectives.predictions import cross_entropy, divergence, predict
from disc_train.packing.collator import PackedBatch
from disc_train.teacher_cache.cached_teacher import Teacher


@torch.no_grad()
def held_out_sums(
    method: str, student: PreTrainedModel, teacher: Teacher, batch: PackedBatch, settings: Settings
) -> dict[str, Tensor]:
    """Sum what is measured over a batch's examples, in nats a token but for the loss.

    Returns:
        loss: the method's; of talr the cross-entropy, since its weights are those of a step.
        cross_entropy: -log p(target) of the student.
        kl: KL(teacher || student) at the method's temperature, where it has a teacher.
    """
    predictions = predict(student, teacher, batch)
    sums = {"cross_entropy": cross_entropy(predictions)}
    if method in WITH_TEACHER:
        sums["kl"] = divergence(predictions, settings.temperature if method in AT_TEMPERATURE else 1.0)
    sums["loss"] = sums["cross_entropy"] if method == "talr" else OBJECTIVES[method](predictions, settings)
    return sums
