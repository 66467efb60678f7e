"""Check the arguments of the frozen-head calls, by the checks of `linear_kl/validation.py`. Knows no backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from disc_kernels.frozen_head.inputs import LossInputs, LossProblem, SummaryInputs, SummaryProblem, TeacherSummary
from disc_kernels.linear_kl.inputs import LogitTransform, OutputHead, Projection
from disc_kernels.linear_kl.reduction import row_factors
from disc_kernels.linear_kl.validation import (
    check_float_tensor,
    check_head,
    check_index,
    check_number,
    check_projection,
    check_reduction,
    check_row_weight,
    check_same_rows,
    check_temperature,
    check_tensor,
    check_vocab_size,
    check_workspace,
)


def check_summary_inputs(inputs: SummaryInputs, sharded: bool = False) -> SummaryProblem:
    """Return the problem that the inputs pose, or raise; see `linear_kl.problem.check_inputs` for `sharded`."""
    x, autocast = inputs, inputs.autocast_dtype
    temperature = check_temperature(x.temperature)
    check_workspace(x.max_workspace_bytes)
    device = check_tensor("teacher_hidden", x.teacher_hidden).device
    given = x.teacher_hidden, x.teacher_weight, x.teacher_bias, x.teacher_index, x.teacher_transform
    teacher = check_projection("teacher_", *given, device, autocast, sharded)
    # Of the student there is a head and no row.
    weight = check_tensor("student_weight", x.student_weight)
    no_rows = weight.new_empty(0, weight.shape[-1] if weight.dim() else 0)
    head = check_projection("student_", no_rows, weight, x.student_bias, None, None, device, autocast, sharded)
    heads = {"student_weight": len(head.weight), "teacher_weight": len(teacher.weight)}
    vocab_size = check_vocab_size(x.vocab_size, heads, sharded)
    wide = torch.promote_types(head.accumulate_dtype, teacher.accumulate_dtype)
    teacher, head = (replace(model, vocab_size=vocab_size, accumulate_dtype=wide) for model in (teacher, head))
    return SummaryProblem(teacher, head, temperature)


def check_frozen_head(
    weight: Tensor | OutputHead, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None, float, int | None]:
    """Return weight, bias, scale and entries of a student's head that is given as one argument, or in parts."""
    weight, bias, transform, entries = check_head("student_", weight, bias, None)
    if transform is None:
        return weight, bias, scale, entries
    if scale != 1.0:
        raise ValueError(
            f"student_scale: expected 1.0, because student_weight is an OutputHead, which brings its own, got {scale}"
        )
    if transform.softcap is not None:
        raise ValueError(
            f"student_weight: expected a head without a softcap, because a summary holds for a linear one, got softcap "
            f"{transform.softcap}; use fused_suffix_kl"
        )
    return weight, bias, transform.scale, entries


def check_loss_inputs(inputs: LossInputs, sharded: bool = False) -> LossProblem:
    """Return the problem that the inputs pose, or raise; see `linear_kl.problem.check_inputs` for `sharded`."""
    x, summary, index = inputs, inputs.summary, inputs.summary_index
    reduction, temperature = check_reduction(x.reduction), check_temperature(x.temperature)
    check_workspace(x.max_workspace_bytes)
    device = check_tensor("student_hidden", x.student_hidden).device
    given = x.student_hidden, x.student_weight, x.student_bias, x.student_index, LogitTransform(_scale(x.student_scale))
    student = check_projection("student_", *given, device, x.autocast_dtype, sharded)
    _refuse_trainable_head(student)
    vocab_size = check_vocab_size(x.vocab_size, {"student_weight": len(student.weight)}, sharded)
    _check_summary(summary, student)
    wide = torch.promote_types(student.accumulate_dtype, summary.embedding.dtype)
    student = replace(student, vocab_size=vocab_size, accumulate_dtype=wide)
    compared = ("student_hidden" if student.index is None else "student_index", student.rows)
    chosen = ("summary", len(summary.embedding))
    if index is not None:
        index = check_index("summary_index", index, len(summary.embedding), "summary", device)
        chosen = ("summary_index", len(index))
    check_same_rows(compared, chosen, "student_index and summary_index")
    row_weight = check_row_weight(x.row_weight, student)
    return LossProblem(
        student=student,
        summary=TeacherSummary(*(part.detach() for part in summary)),
        summary_index=index,
        temperature=temperature,
        row_factor=row_factors(row_weight, student.rows, reduction, wide, device).expand(student.rows),
        statistics=x.return_stats,
    )


def _refuse_trainable_head(student: Projection) -> None:
    if not torch.is_grad_enabled():
        return
    for name, tensor in (("student_weight", student.weight), ("student_bias", student.bias)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor without requires_grad, got one with: a summary holds for the head it was "
                "made with, so that head must stay frozen; use fused_suffix_kl to train it"
            )


def _scale(value: Any) -> float:
    scale = check_number("student_scale", value)
    if scale == 0:
        raise ValueError(f"student_scale: expected a number other than 0, got {scale}")
    return scale


def _check_summary(summary: Any, student: Projection) -> None:
    if not isinstance(summary, TeacherSummary):
        raise TypeError(f"summary: expected a TeacherSummary, got {type(summary).__name__}")
    for name, tensor in summary._asdict().items():
        check_float_tensor(f"summary.{name}", tensor, student.hidden.device)
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"summary.{name}: expected float32 or float64, got {tensor.dtype}")
        if tensor.dtype != summary.embedding.dtype:
            raise TypeError(
                f"summary.{name}: expected {summary.embedding.dtype}, as summary.embedding, got {tensor.dtype}"
            )
    shape, size = list(summary.embedding.shape), student.hidden_size
    if len(shape) != 2 or shape[1] != size:
        raise ValueError(f"summary.embedding: expected shape [S, {size}], as wide as student_weight, got {shape}")
    for name in ("entropy", "bias"):
        got = list(getattr(summary, name).shape)
        if got != shape[:1]:
            raise ValueError(f"summary.{name}: expected shape {shape[:1]}, as summary.embedding {shape}, got {got}")
