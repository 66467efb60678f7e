"""Run both models on a packed batch, and compare what they predict for its target tokens."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from disc_kernels import TeacherSummary, expected_embedding_kl, fused_suffix_kl
from disc_kernels.hf import OutputHead, output_head
from disc_train.models.causal_lm import hidden_states
from disc_train.models.live_teacher import teacher_or_base_model
from disc_train.objectives.cross_entropy import linear_cross_entropy
from disc_train.packing.collator import PackedBatch
from disc_train.teacher_cache.cached_teacher import CachedTeacher, Teacher


@dataclass(frozen=True)
class ModelPredictions:
    """Hold what one model predicts for M tokens, as hidden states and the head that makes logits of them."""

    hidden: Tensor  # [rows, L, D]
    head: OutputHead
    index: np.ndarray  # [M] int64, of the flattened hidden states


@dataclass(frozen=True)
class SummarisedPredictions:
    """Hold what a teacher predicts, summarised for a frozen head at one temperature."""

    summary: TeacherSummary  # of U rows
    index: np.ndarray  # [M] int64, of those rows
    temperature: float
    vocab_size: int | None


@dataclass(frozen=True)
class Predictions:
    """Hold what both models predict for the M target tokens of a batch's examples, one example after another.

    The weights carry the averages over a target's tokens and an example's targets, so a sum by weight is the sum of the
    examples' losses.
    """

    student: ModelPredictions
    teacher: ModelPredictions | SummarisedPredictions | None  # where there is one to compare with
    targets: Tensor  # [M] int64
    weight: Tensor  # [M] float32
    lengths: list[int]  # how many of the M belong to each example

    def split(self, last: int) -> tuple["Predictions", "Predictions"]:
        """Separate the predictions of the last `last` examples from those of all others, which come first."""
        count = sum(self.lengths[len(self.lengths) - last :])

        def part(chosen: bool) -> "Predictions":
            def cut(values: Any, count: int) -> Any:
                middle = len(values) - count
                return values[middle:] if chosen else values[:middle]

            def cut_model(model: Any) -> Any:
                return replace(model, index=cut(model.index, count))

            return Predictions(
                student=cut_model(self.student),
                teacher=self.teacher and cut_model(self.teacher),  # it may have read the last examples only
                targets=cut(self.targets, count),
                weight=cut(self.weight, count),
                lengths=cut(self.lengths, last),
            )

        return part(False), part(True)


def predict(student: PreTrainedModel, teacher: Teacher, batch: PackedBatch) -> Predictions:
    """Run both models on a batch.

    Args:
        student, teacher: causal language models on the batch's device, prepared by
            `disc_train.models.causal_lm.use_attention`; no teacher: the student with its adapters switched off.
            A cached teacher reads nothing: its rows are in the batch.
    """
    # The teacher first: its adapters are the student's, which a backward pass runs again where it checkpoints.
    of_teacher: ModelPredictions | SummarisedPredictions | None = None
    if isinstance(teacher, CachedTeacher):
        of_teacher = _predictions_of_cached(teacher, batch)
    elif batch["teacher_input_ids"] is not None:
        of_teacher = predict_as_teacher(student, teacher, batch)
    of_student = predict_as_student(student, batch)
    return Predictions(of_student, of_teacher, batch["targets"], batch["row_weight"], batch["lengths"])


def predict_as_teacher(
    student: PreTrainedModel, teacher: PreTrainedModel | None, batch: PackedBatch
) -> ModelPredictions:
    """Run the teacher on its rows of a batch, without gradients."""
    # It gives what its own dtype gives, whatever mixed precision the student is trained in.
    with (
        torch.no_grad(),
        torch.autocast(batch["input_ids"].device.type, enabled=False),
        teacher_or_base_model(teacher, student) as model,
    ):
        assert batch["teacher_input_ids"] is not None and batch["teacher_layout"] is not None
        hidden = hidden_states(model, batch["teacher_input_ids"], batch["teacher_layout"])
        head = output_head(model)  # here, where adapters are off: one may have a head of its own
    return ModelPredictions(hidden, head, batch["teacher_index"])


def _predictions_of_cached(
    teacher: CachedTeacher, batch: PackedBatch
) -> ModelPredictions | SummarisedPredictions | None:
    rows, index = batch["teacher_rows"], batch["teacher_index"]
    if rows is None:
        return None
    if teacher.head is not None:
        return ModelPredictions(rows["hidden"].to(teacher.head.weight.dtype), teacher.head, index)
    summary = TeacherSummary(rows["embedding"].float(), rows["entropy"], rows["bias"])
    assert teacher.temperature is not None
    return SummarisedPredictions(summary, index, teacher.temperature, teacher.vocab_size)


def predict_as_student(student: PreTrainedModel, batch: PackedBatch) -> ModelPredictions:
    """Run the student on its rows of a batch."""
    hidden = hidden_states(student, batch["input_ids"], batch["layout"])
    return ModelPredictions(hidden, output_head(student), batch["student_index"])


def cross_entropy(predictions: Predictions, reduction: str = "sum") -> Tensor:
    """Compute -log p(target) of the student in nats: the sum by weight, or for "none" all M."""
    student = predictions.student
    return linear_cross_entropy(
        student.hidden,
        student.head,
        predictions.targets,
        index=torch.from_numpy(student.index),
        weight=predictions.weight,
        reduction=reduction,
    )


def divergence(
    predictions: Predictions,
    temperature: float,
    reduction: str = "sum",
    kind: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl",
    beta: float = 0.5,
    clip: float | None = None,
) -> Tensor:
    """Compute the divergence of teacher and student in nats: the sum by weight, or for "none" all M.

    Args:
        kind, beta: as `divergence` and `beta` of `disc_kernels.fused_suffix_kl`; forward_kl is KL(teacher || student).
        clip: a row of more nats counts as this many, and has no gradient; None: every row counts in full.

    Raises:
        ValueError: the teacher was summarised at another temperature, or the summaries do not serve: for another
            divergence, or a head with a soft cap or that is trained.
    """
    if clip is not None:
        rows = divergence(predictions, temperature, "none", kind, beta).clamp(max=clip)
        return rows if reduction == "none" else (predictions.weight * rows).sum()
    student, teacher = predictions.student, predictions.teacher
    assert teacher is not None
    if isinstance(teacher, SummarisedPredictions):
        return _divergence_of_summary(predictions, teacher, temperature, reduction, kind)
    return fused_suffix_kl(  # type: ignore[return-value]
        student.hidden,
        student.head,
        teacher.hidden,
        teacher.head,
        student_index=torch.from_numpy(student.index),
        teacher_index=torch.from_numpy(teacher.index),
        row_weight=predictions.weight,
        temperature=temperature,
        divergence=kind,
        beta=beta,
        reduction=reduction,
    )


def _divergence_of_summary(
    predictions: Predictions, teacher: SummarisedPredictions, temperature: float, reduction: str, kind: str
) -> Tensor:
    student = predictions.student
    if teacher.temperature != temperature:
        raise ValueError(f"temperature: expected {teacher.temperature}, the cached summaries', got {temperature}")
    if kind != "forward_kl":
        raise ValueError(f"divergence: expected forward_kl, which the cached summaries are for, got {kind}")
    return expected_embedding_kl(  # type: ignore[return-value]
        *(student.hidden, student.head, teacher.summary),
        student_index=torch.from_numpy(student.index),
        summary_index=torch.from_numpy(teacher.index),
        row_weight=predictions.weight,
        temperature=temperature,
        reduction=reduction,
        vocab_size=teacher.vocab_size,
    )


def sequence_means(values: Tensor, predictions: Predictions) -> Tensor:
    """Compute the mean of `values` [M] over each example's tokens: [examples]."""
    means = [sequence.sum() for sequence in (values * predictions.weight).split(predictions.lengths)]
    return torch.stack(means) if means else values
