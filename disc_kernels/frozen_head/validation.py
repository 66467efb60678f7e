"""Every check of what the frozen-head form is given, with the checks of `validation.py`; knows no backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from disc_kernels.frozen_head.plan import LossCall, SummaryCall, TeacherSummary
from disc_kernels.linear_kl.inputs import LogitTransform, Side
from disc_kernels.linear_kl.validation import (
    REDUCTIONS,
    check_choice,
    check_count,
    check_index,
    check_number,
    check_row_weight,
    check_side,
    check_tensor,
    check_vocab_size,
)


def check_summary_call(arguments: dict[str, Any], sharded: bool) -> SummaryCall:
    """What `teacher_summary` was given, by name, as a call; see `build_problem` for `sharded`."""
    a = arguments
    temperature = _temperature(a["temperature"])
    device = check_tensor("teacher_hidden", a["teacher_hidden"]).device
    teacher = (a["teacher_hidden"], a["teacher_weight"], a["teacher_bias"], a["teacher_index"], a["teacher_transform"])
    reading = check_side("teacher", *teacher, device, sharded)
    # Of the student there is a head and no row.
    weight = check_tensor("student_weight", a["student_weight"])
    no_rows = weight.new_empty(0, weight.shape[-1] if weight.dim() else 0)
    head = check_side("student", no_rows, weight, a["student_bias"], None, None, device, sharded)
    vocab_size = check_vocab_size(a["vocab_size"], head.weight.shape[0], reading.weight.shape[0], sharded)
    wide = torch.promote_types(head.accumulate_dtype, reading.accumulate_dtype)
    reading, head = (replace(side, vocab_size=vocab_size, accumulate_dtype=wide) for side in (reading, head))
    return SummaryCall(reading, head, temperature)


def check_loss_call(arguments: dict[str, Any], sharded: bool) -> LossCall:
    """What `expected_embedding_kl` was given, by name, as a call; see `build_problem` for `sharded`."""
    a, summary = arguments, arguments["summary"]
    check_choice("reduction", a["reduction"], REDUCTIONS)
    temperature = _temperature(a["temperature"])
    device = check_tensor("student_hidden", a["student_hidden"]).device
    transform = LogitTransform(_scale(a["student_scale"]))
    given = (a["student_hidden"], a["student_weight"], a["student_bias"], a["student_index"], transform)
    student = check_side("student", *given, device, sharded)
    _refuse_trainable_head(student)
    vocab_size = _vocab_size(a["vocab_size"], student, sharded)
    _check_summary(summary, student)
    wide = torch.promote_types(student.accumulate_dtype, summary.embedding.dtype)
    student = replace(student, vocab_size=vocab_size, accumulate_dtype=wide)
    index = a["summary_index"]
    if index is not None:
        index = check_index("summary_index", index, len(summary.embedding), "summary", device)
    rows = _paired_rows(student, summary, index)
    return LossCall(
        student=student,
        summary=TeacherSummary(*(x.detach() for x in summary)),
        summary_index=index,
        rows=rows,
        temperature=temperature,
        row_factor=_row_factor(check_row_weight(a["row_weight"], rows, device), rows, a["reduction"], student),
        statistics=a["return_stats"],
    )


def _vocab_size(vocab_size: Any, student: Side, sharded: bool) -> int:
    if vocab_size is not None:
        check_count("vocab_size", vocab_size)
    if vocab_size is None or sharded:
        return student.vocab_size
    if vocab_size > student.vocab_size:
        raise ValueError(
            f"vocab_size: expected at most {student.vocab_size}, the vocabulary rows of student_weight, "
            f"got {vocab_size}"
        )
    return int(vocab_size)


def _row_factor(row_weight: Tensor | None, rows: int, reduction: str, student: Side) -> Tensor:
    """[M], what the reduction multiplies each row with: 0 where every row is masked, not NaN."""
    wide, device = student.accumulate_dtype, student.hidden.device
    if row_weight is None or reduction == "none":
        factor = torch.ones(rows, dtype=wide, device=device)
    else:
        factor = row_weight.to(wide)
    if reduction != "mean":
        return factor
    total = factor.sum()
    return factor / torch.where(total == 0, torch.inf, total)


def _refuse_trainable_head(student: Side) -> None:
    if not torch.is_grad_enabled():
        return
    for name, tensor in (("student_weight", student.weight), ("student_bias", student.bias)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor without requires_grad, got one with: a summary holds for the head it was "
                "made with, so that head must stay frozen; use fused_suffix_kl to train it"
            )


def _temperature(value: Any) -> float:
    temperature = check_number("temperature", value)
    if temperature <= 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    return temperature


def _scale(value: Any) -> float:
    scale = check_number("student_scale", value)
    if scale == 0:
        raise ValueError(f"student_scale: expected a number other than 0, got {scale}")
    return scale


def _check_summary(summary: Any, student: Side) -> None:
    if not isinstance(summary, TeacherSummary):
        raise TypeError(f"summary: expected a TeacherSummary, got {type(summary).__name__}")
    for name, tensor in summary._asdict().items():
        check_tensor(f"summary.{name}", tensor)
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"summary.{name}: expected float32 or float64, got {tensor.dtype}")
        if tensor.dtype != summary.embedding.dtype:
            raise TypeError(
                f"summary.{name}: expected {summary.embedding.dtype}, as summary.embedding, got {tensor.dtype}"
            )
        if tensor.device != student.hidden.device:
            raise ValueError(
                f"summary.{name}: expected device {student.hidden.device}, as the hidden states, got {tensor.device}"
            )
    shape, size = list(summary.embedding.shape), student.hidden_size
    if len(shape) != 2 or shape[1] != size:
        raise ValueError(f"summary.embedding: expected shape [S, {size}], as wide as student_weight, got {shape}")
    for name in ("entropy", "bias"):
        got = list(getattr(summary, name).shape)
        if got != shape[:1]:
            raise ValueError(f"summary.{name}: expected shape {shape[:1]}, as summary.embedding {shape}, got {got}")


def _paired_rows(student: Side, summary: TeacherSummary, summary_index: Tensor | None) -> int:
    compared, given = ("student_hidden", student.hidden_rows), ("summary", len(summary.embedding))
    if student.index is not None:
        compared = ("student_index", len(student.index))
    if summary_index is not None:
        given = ("summary_index", len(summary_index))
    if compared[1] != given[1]:
        raise ValueError(
            f"{given[0]}: expected {compared[1]} rows, one for each row of {compared[0]}, got {given[1]}; "
            "student_index and summary_index choose the rows that are compared"
        )
    return compared[1]
