"""What is minimised: one function a method, from the rows of a packed batch to a scalar.

A row is a prediction of one token of a target. Its weight carries the averages over a target's tokens and an example's
targets, so a weighted sum over rows is the sum of the examples' losses; the trainer divides by their number.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from disc_kernels import fused_suffix_kl
from disc_train.models.causal_lm import Head, common_vocabulary, head_of, hidden_states
from disc_train.models.teacher import reading_as_teacher
from disc_train.objectives.cross_entropy import linear_cross_entropy
from disc_train.packing.collator import PackedBatch

MIN_TALR_WEIGHT = 0.01


@dataclass(frozen=True)
class Side:
    """What one model says of M rows."""

    hidden: Tensor  # [rows, L, D]
    head: Head
    index: np.ndarray  # [M] int64, of the flattened hidden states


@dataclass(frozen=True)
class Rows:
    """M predictions of a batch's examples, one example after another."""

    student: Side
    teacher: Side | None  # where there is one to compare with
    targets: Tensor  # [M] int64
    weight: Tensor  # [M] float32
    lengths: list[int]  # rows of each example

    def split(self, last: int) -> tuple["Rows", "Rows"]:
        """The rows of all but the last so many examples, and theirs."""
        rows = sum(self.lengths[len(self.lengths) - last :])

        def cut(values: Any, count: int) -> tuple[Any, Any]:
            middle = len(values) - count
            return values[:middle], values[middle:]

        def cut_side(side: Side | None) -> list[Side | None]:  # a teacher may have read the last examples only
            return [None, None] if side is None else [replace(side, index=part) for part in cut(side.index, rows)]

        of_rows = [cut(values, rows) for values in (self.targets, self.weight)]
        parts = zip(cut_side(self.student), cut_side(self.teacher), *of_rows, cut(self.lengths, last), strict=True)
        own, others = (Rows(*part) for part in parts)
        return own, others


class Settings(NamedTuple):
    """What the methods can be told.

    Args:
        temperature: T of disc and cd: both models' logits are divided by it. The others have none.
        ce_weight: disc and cd: of the cross-entropy on the same tokens.
        kl_weight: ft_kl: of the KL from the initial model.
        tau: talr: the median over a step's sequences of their mean loss, where they are more than the rows at hand.
    """

    temperature: float = 2.0
    ce_weight: float = 0.0
    kl_weight: float = 0.1
    tau: Tensor | None = None


def distill(rows: Rows, settings: Settings) -> Tensor:
    """Context distillation, of documents (disc) and of records (cd): T^2 KL(teacher behind its context || student).

    T^2 keeps the gradients as large as at T = 1 (Hinton et al., arXiv 1503.02531). disc is arXiv 2602.16093, equation
    3; cd the general form (Snell et al., arXiv 2209.15189). `ce_weight` adds cross-entropy: it teaches what no context
    tells, such as what a document says once.
    """
    loss = settings.temperature**2 * divergence(rows, settings.temperature)
    return loss + settings.ce_weight * cross_entropy(rows) if settings.ce_weight else loss


def finetune(rows: Rows, settings: Settings) -> Tensor:
    """Cross-entropy."""
    return cross_entropy(rows)


def finetune_with_kl(rows: Rows, settings: Settings) -> Tensor:
    """Cross-entropy + kl_weight * KL(initial model || student) on the same tokens."""
    return cross_entropy(rows) + settings.kl_weight * divergence(rows, temperature=1.0)


def talr(rows: Rows, settings: Settings) -> Tensor:
    """Token-adaptive loss reweighting (Lin et al., arXiv 2509.20758): cross-entropy, less of it on unlikely tokens.

    A token of probability p weighs max(p^(1 / tau), 0.01), a constant to the gradient. tau is the median over the
    step's sequences of their mean loss, so weights change as the model learns.
    """
    with torch.no_grad():
        losses = cross_entropy(rows, reduction="none")
        tau = median(sequence_means(losses, rows)) if settings.tau is None else settings.tau
        # p = exp(-loss). Where everything is certain the loss is 0, and so is tau.
        adaptive = (-losses / tau.clamp(min=torch.finfo(losses.dtype).tiny)).exp().clamp(min=MIN_TALR_WEIGHT)
    return cross_entropy(replace(rows, weight=rows.weight * adaptive))


OBJECTIVES: dict[str, Callable[[Rows, Settings], Tensor]] = {
    "disc": distill,
    "cd": distill,
    "ft": finetune,
    "ft_kl": finetune_with_kl,
    "talr": talr,
}
AT_TEMPERATURE = ("disc", "cd")  # the methods with a temperature, and a context to learn from
WITH_TEACHER = ("disc", "cd", "ft_kl")


def batch_loss(
    method: str, student: PreTrainedModel, teacher: PreTrainedModel | None, batch: PackedBatch, settings: Settings
) -> Tensor:
    """The sum of the losses of a batch's examples: the method's, or the KL from the teacher where they are replayed.

    Args:
        student, teacher: as for `batch_rows`; gradients flow to the student alone.
    """
    own, replayed = batch_rows(student, teacher, batch).split(batch["replayed"])
    losses = []
    if own.lengths:
        losses.append(OBJECTIVES[method](own, settings))
    if replayed.lengths:
        temperature = settings.temperature if method in AT_TEMPERATURE else 1.0
        losses.append(temperature**2 * divergence(replayed, temperature))
    return torch.stack(losses).sum()


def batch_sequence_means(student: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """What TALR's tau is the median of: the mean cross-entropy of each example that counts and is not replayed."""
    rows = Rows(student_side(student, batch), None, batch["targets"], batch["row_weight"], batch["lengths"])
    own, _ = rows.split(batch["replayed"])
    means = sequence_means(cross_entropy(own, reduction="none"), own)
    return means if batch["num_examples"] else means[:0]


def batch_rows(student: PreTrainedModel, teacher: PreTrainedModel | None, batch: PackedBatch) -> Rows:
    """What both models say of a batch's targets.

    Args:
        student, teacher: causal language models on the batch's device, prepared by
            `disc_train.models.causal_lm.use_attention`; no teacher: the student with its adapters switched off.
    """
    # The teacher first: its adapters are the student's, which a backward pass runs again where it checkpoints.
    compared = None if batch["teacher_input_ids"] is None else teacher_side(student, teacher, batch)
    return Rows(student_side(student, batch), compared, batch["targets"], batch["row_weight"], batch["lengths"])


def teacher_side(student: PreTrainedModel, teacher: PreTrainedModel | None, batch: PackedBatch) -> Side:
    """What the teacher says; without gradients."""
    # It gives what its own dtype gives, whatever mixed precision the student is trained in.
    with (
        torch.no_grad(),
        torch.autocast(batch["input_ids"].device.type, enabled=False),
        reading_as_teacher(teacher, student) as reader,
    ):
        assert batch["teacher_input_ids"] is not None and batch["teacher_layout"] is not None
        hidden = hidden_states(reader, batch["teacher_input_ids"], batch["teacher_layout"])
    return Side(hidden, head_of(reader), batch["teacher_index"])


def student_side(student: PreTrainedModel, batch: PackedBatch) -> Side:
    """What the student says."""
    hidden = hidden_states(student, batch["input_ids"], batch["layout"])
    return Side(hidden, head_of(student), batch["student_index"])


def cross_entropy(rows: Rows, reduction: str = "sum") -> Tensor:
    """-log p(target) of the student in nats: the weighted sum, or [M]."""
    student, index = rows.student, torch.from_numpy(rows.student.index)
    return linear_cross_entropy(
        student.hidden, student.head, rows.targets, index=index, weight=rows.weight, reduction=reduction
    )


def divergence(rows: Rows, temperature: float, reduction: str = "sum") -> Tensor:
    """KL(teacher || student) in nats: the weighted sum, or [M]."""
    student, teacher = rows.student, rows.teacher
    assert teacher is not None
    return fused_suffix_kl(  # type: ignore[return-value]
        student.hidden,
        student.head.weight,
        teacher.hidden,
        teacher.head.weight,
        student_index=torch.from_numpy(student.index),
        teacher_index=torch.from_numpy(teacher.index),
        row_weight=rows.weight,
        temperature=temperature,
        reduction=reduction,
        student_bias=student.head.bias,
        teacher_bias=teacher.head.bias,
        student_transform=student.head.transform,
        teacher_transform=teacher.head.transform,
        vocab_size=common_vocabulary(student.head, teacher.head),
    )


def sequence_means(values: Tensor, rows: Rows) -> Tensor:
    """The mean over each example's tokens of `values` [M]: [examples]."""
    means = [sequence.sum() for sequence in (values * rows.weight).split(rows.lengths)]
    return torch.stack(means) if means else values


def median(values: Tensor) -> Tensor:
    """The mean of the middle two where their number is even; `torch.median` gives the smaller."""
    return values.quantile(0.5)
