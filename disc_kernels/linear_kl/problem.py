"""Check a call's arguments, and pose the problem that they state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from disc_kernels.linear_kl.inputs import Problem, SuffixKLInputs
from disc_kernels.linear_kl.teacher import check_teacher, compared_teacher
from disc_kernels.linear_kl.teacher_rows import TeacherRows
from disc_kernels.linear_kl.validation import (
    DIVERGENCES,
    check_choice,
    check_index_device,
    check_number,
    check_projection,
    check_reduction,
    check_row_weight,
    check_same_rows,
    check_temperature,
    check_tensor,
    check_vocab_size,
    check_workspace,
    is_traced,
)


def check_inputs(inputs: SuffixKLInputs, sharded: bool = False) -> Problem:
    """Return the problem that the inputs pose, or raise an error that names the argument.

    Where it is `sharded`, weights and biases are one rank's shard of the vocabulary, which may be empty, and
    `vocab_size`, which counts over all of them, is left to who knows all: all entries of the shard are compared.
    """
    x = inputs if inputs.mask is None else _masked(inputs)
    divergence, beta = _check_divergence(x.divergence, x.beta)
    reduction, temperature = check_reduction(x.reduction), check_temperature(x.temperature)
    check_workspace(x.max_workspace_bytes)
    device = check_tensor("student_hidden", x.student_hidden).device
    given = x.student_hidden, x.student_weight, x.student_bias, x.student_index, x.student_transform
    student = check_projection("student_", *given, device, x.autocast_dtype, sharded)
    teacher, rows_of, head = check_teacher(x, device, sharded)
    compared = "student_hidden" if student.index is None else "student_index", student.rows
    indices = "student_index and teacher_index" if teacher.ids is None else "student_index or mask"
    check_same_rows(compared, (rows_of, teacher.rows), indices)
    heads = {"student_weight": len(student.weight)} | ({} if head is None else {head: len(teacher.weight)})
    vocab_size = check_vocab_size(x.vocab_size, heads, sharded)
    teacher = compared_teacher(teacher, vocab_size, sharded)
    wide = torch.promote_types(student.accumulate_dtype, teacher.accumulate_dtype)
    return Problem(
        student=replace(student, vocab_size=vocab_size, accumulate_dtype=wide),
        teacher=replace(teacher, accumulate_dtype=wide),
        teacher_rows=TeacherRows(student.rows, teacher.index),
        row_weight=check_row_weight(x.row_weight, student),
        temperature=temperature,
        divergence=divergence,
        beta=beta,
        reduction=reduction,
        statistics=x.return_stats,
        sharded=sharded,
        tail=x.tail,
    )


def _check_divergence(divergence: Any, beta: Any) -> tuple[str, float]:
    check_choice("divergence", divergence, DIVERGENCES)
    beta = check_number("beta", beta)
    if divergence == "jsd":
        if not 0 <= beta <= 1:
            raise ValueError(f"beta: expected a number from 0 to 1, got {beta}")
        # As in TRL and Liger: the limits of JSD / (beta (1 - beta)), where JSD itself is zero.
        divergence = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, divergence)
    return divergence, beta


def _masked(inputs: SuffixKLInputs) -> SuffixKLInputs:
    """Put the indices of the rows that the mask keeps in its place."""
    mask = check_mask(inputs)
    if is_traced(mask):
        raise ValueError('mask: expected None with impl="reference" or symbolic values, got a mask without values')
    index = mask.flatten().nonzero().squeeze(1)
    return replace(inputs, mask=None, student_index=index, teacher_index=index)


def check_mask(inputs: SuffixKLInputs) -> Tensor:
    """Return the mask of both models' rows, of the hidden states' leading shape."""
    mask = check_tensor("mask", inputs.mask)
    for model in ("student", "teacher"):
        if getattr(inputs, f"{model}_index") is not None:
            raise ValueError(f"mask: expected None with a {model}_index, which chooses the rows itself, got a mask")
        name = "topk_logprobs" if model == "teacher" and inputs.topk_ids is not None else f"{model}_hidden"
        shape = check_tensor(name, getattr(inputs, f"{model}_hidden")).shape[:-1]
        if mask.shape != shape:
            raise ValueError(f"mask: expected shape {list(shape)}, as {name}'s tokens, got {list(mask.shape)}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected dtype torch.bool, got {mask.dtype}")
    check_index_device("mask", mask, inputs.student_hidden.device)
    return mask
