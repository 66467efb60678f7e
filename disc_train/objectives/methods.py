"""Compute what each method minimises: one function a method, from predictions to a scalar.

Each gives the sum of the examples' losses; the trainer divides by the number of examples of a step.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from disc_train.objectives.predictions import (
    Predictions,
    cross_entropy,
    divergence,
    predict,
    predict_as_student,
    sequence_means,
)
from disc_train.packing.collator import PackedBatch
from disc_train.teacher_cache.cached_teacher import Teacher

MIN_TALR_WEIGHT = 0.01


class Settings(NamedTuple):
    """Hold the numbers that the methods take.

    Args:
        temperature: T of disc and cd: both models' logits are divided by it. The others have none.
        ce_weight: disc and cd: weight of the cross-entropy on the same tokens.
        kl_weight: ft_kl: weight of the KL from the initial model.
        divergence, beta: disc and cd: what is minimised, as `disc_kernels.fused_suffix_kl` names it.
        kl_clip: disc, cd and ft_kl: the most nats that a token's divergence counts; None: there is no bound.
        tau: talr: the median over a step's sequences of their mean loss; None: over those of the batch.
    """

    temperature: float = 2.0
    ce_weight: float = 0.0
    kl_weight: float = 0.1
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: float = 0.5
    kl_clip: float | None = None
    tau: Tensor | None = None


def distill(predictions: Predictions, settings: Settings) -> Tensor:
    """Compute the loss of disc and cd: T^2 KL(teacher after its context || student), or another divergence of the two.

    T^2 keeps the gradients as large as at T = 1 (Hinton et al., arXiv 1503.02531). disc is arXiv 2602.16093, equation
    3; cd the general form (Snell et al., arXiv 2209.15189). `ce_weight` adds cross-entropy: it teaches what no context
    tells, such as what a document says once.

    `kl_clip` C puts min(KL, C) in the place of a token's KL, before T^2, so tokens beyond C teach nothing. It is what
    verl's `loss_max_clamp` does; a teacher in another style disagrees most about words that say little.
    """
    of_both = divergence(
        predictions, settings.temperature, kind=settings.divergence, beta=settings.beta, clip=settings.kl_clip
    )
    loss = settings.temperature**2 * of_both
    return loss + settings.ce_weight * cross_entropy(predictions) if settings.ce_weight else loss


def finetune(predictions: Predictions, settings: Settings) -> Tensor:
    """Compute the loss of ft, on whole documents, and of split_ft, on suffixes read alone: cross-entropy."""
    return cross_entropy(predictions)


def finetune_with_kl(predictions: Predictions, settings: Settings) -> Tensor:
    """Compute the loss of ft_kl: cross-entropy + kl_weight * KL(initial model || student) on the same tokens."""
    of_both = divergence(predictions, temperature=1.0, clip=settings.kl_clip)
    return cross_entropy(predictions) + settings.kl_weight * of_both


def talr(predictions: Predictions, settings: Settings) -> Tensor:
    """Compute the loss of talr: cross-entropy that counts less on unlikely tokens (Lin et al., arXiv 2509.20758).

    A token of probability p weighs max(p^(1 / tau), 0.01), a constant to the gradient. tau is the median over the
    step's sequences of their mean loss, so weights change as the model learns.
    """
    with torch.no_grad():
        losses = cross_entropy(predictions, reduction="none")
        tau = median(sequence_means(losses, predictions)) if settings.tau is None else settings.tau
        # p = exp(-loss). Where all probabilities are 1 the loss is 0, and so is tau.
        adaptive = (-losses / tau.clamp(min=torch.finfo(losses.dtype).tiny)).exp().clamp(min=MIN_TALR_WEIGHT)
    return cross_entropy(replace(predictions, weight=predictions.weight * adaptive))


OBJECTIVES: dict[str, Callable[[Predictions, Settings], Tensor]] = {
    "disc": distill,
    "cd": distill,
    "ft": finetune,
    "split_ft": finetune,
    "ft_kl": finetune_with_kl,
    "talr": talr,
}
AT_TEMPERATURE = ("disc", "cd")  # the methods with a temperature, and a context to learn from
WITH_TEACHER = ("disc", "cd", "ft_kl")
OF_SUFFIXES = ("disc", "split_ft")  # the methods that split documents, and whose student reads suffixes alone


def batch_loss(
    method: str, student: PreTrainedModel, teacher: Teacher, batch: PackedBatch, settings: Settings
) -> Tensor:
    """Sum the losses of a batch's examples: the method's, or the KL from the teacher where they are replayed.

    Args:
        student, teacher: as for `disc_train.objectives.predictions.predict`; gradients flow to the student alone.
    """
    trained, replayed = predict(student, teacher, batch).split(batch["replayed"])
    losses = []
    if trained.lengths:
        losses.append(OBJECTIVES[method](trained, settings))
    if replayed.lengths:
        temperature = settings.temperature if method in AT_TEMPERATURE else 1.0
        losses.append(temperature**2 * divergence(replayed, temperature))
    return torch.stack(losses).sum()


def batch_sequence_means(student: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Compute what TALR's tau is the median of: each example's mean cross-entropy, replayed ones left out."""
    student_predictions = predict_as_student(student, batch)
    trained, _ = Predictions(student_predictions, None, batch["targets"], batch["row_weight"], batch["lengths"]).split(
        batch["replayed"]
    )
    means = sequence_means(cross_entropy(trained, reduction="none"), trained)
    return means if batch["num_examples"] else means[:0]


def median(values: Tensor) -> Tensor:
    """Return the median; the mean of the middle two of an even number, where `torch.median` gives the smaller."""
    return values.quantile(0.5)
