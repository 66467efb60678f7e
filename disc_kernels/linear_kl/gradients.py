"""Sum the student's gradients over groups of rows."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from disc_kernels.linear_kl.inputs import Problem, Projection
from disc_kernels.linear_kl.products import multiply_into, multiply_weights, take_rows, to_product_dtype
from disc_kernels.linear_kl.ranks.group import PendingSum
from disc_kernels.linear_kl.workspace import Plan


class Wanted(NamedTuple):
    """Say which gradients of the student's tensors are asked for."""

    hidden: bool
    weight: bool
    bias: bool


class GradientSums:
    """Sum the student's gradients over groups of rows, to be multiplied by a scale at the end.

    The scale is the largest row weight (`largest_weight`, 0-dim) times the factor that `rows/torch_backend.py` leaves
    out. It is split into mantissa and power of two. The mantissa is applied to the hidden gradient while it is
    float32, the power, exact in any dtype, in the backward: a 16-bit gradient is rounded once, and a float16 one does
    not underflow before the upstream gradient (a loss scaler's) has been multiplied in. The head's gradients, which are
    far larger and summed in 4 bytes, are not multiplied by the scale where products take operands of 4 bytes too: the
    hidden states are, before them. `head_factor` is what is still missing.
    """

    def __init__(self, problem: Problem, plan: Plan, wanted: Wanted, largest_weight: Tensor):
        student, wide = problem.student, problem.accumulate_dtype
        scale = largest_weight * (student.transform.scale / problem.temperature)
        self.mantissa, _ = torch.frexp(scale)
        self.power = torch.where(scale == 0, 1, scale / self.mantissa)  # exact
        self.row_scale, self.head_factor = None, scale
        if student.product_dtype == wide:
            self.row_scale, self.head_factor = scale, torch.ones_like(scale)
        self.pending_sum = PendingSum(plan.group)
        weight, hidden, bias = student.weight, student.hidden, student.bias
        # Nothing here keeps the inputs alive until the backward.
        self.hidden_shape, self.chunk_rows, self.tile_rows = hidden.shape, plan.chunk_rows, plan.tile_rows
        self.multiplied = plan.backend.multiplied
        self.hidden_dtype, self.weight_dtype = hidden.dtype, weight.dtype
        self.bias_dtype = weight.dtype if bias is None else bias.dtype
        self.hidden: Tensor | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if wanted.hidden:
            # With an index some rows may never be written, and some may be summed; where some must be, in 4 bytes, for
            # the sum of many 16-bit numbers stops growing.
            new = torch.empty if student.index is None else torch.zeros
            dtype = wide if problem.rows > student.hidden_rows else hidden.dtype
            self.hidden = new(student.hidden_rows, student.hidden_size, dtype=dtype, device=hidden.device)
        if wanted.weight:
            # With the weight's strides, or autograd would copy it to get them.
            self.weight = torch.empty_like(weight, dtype=wide)
            # The first group writes what is compared; the rest of the vocabulary has no gradient.
            self.weight[problem.vocab_size if problem.rows else 0 :].zero_()
        if wanted.bias:
            self.bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device)

    def add_rows(self, student: Projection, start: int, stop: int, gradient: Tensor) -> None:
        """Add what rows start..stop give, from the `gradient` [R, V] of their logits."""
        if self.hidden is not None:
            rows = self._hidden_rows(student, gradient)
            index = None if student.index is None else student.index[start:stop]
            self.pending_sum.start(rows, then=partial(self._take_hidden_rows, self.hidden, rows, start, index))
        if self.weight is not None:
            hidden = to_product_dtype(take_rows(student, start, stop), student)
            if self.row_scale is not None:
                hidden = hidden * self.row_scale
            multiply_into(self.weight[: student.vocab_size], gradient.T, hidden, accumulate=start > 0)
        if self.bias is not None:
            total = gradient.sum(0, dtype=self.bias.dtype)
            self.bias[: student.vocab_size] += total if self.row_scale is None else total.mul_(self.row_scale)

    def finish_groups(self) -> None:
        """Complete all sums, after the last group."""
        self.pending_sum.finish()

    @staticmethod
    def _take_hidden_rows(total: Tensor, rows: Tensor, start: int, index: Tensor | None) -> None:
        if index is None:
            total[start : start + len(rows)] = rows
        else:
            total.index_add_(0, index, rows.to(total.dtype))

    def _hidden_rows(self, student: Projection, gradient: Tensor) -> Tensor:
        """Return the hidden gradient of a group's rows, [R, D], but for the power of two."""
        rows = torch.empty(len(gradient), student.hidden_size, dtype=self.power.dtype, device=gradient.device)
        multiply_weights(student, [gradient], self.tile_rows, rows)
        return rows.mul_(self.mantissa)

    def finish(self, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Multiply by what is still missing; return gradients in the inputs' shapes and dtypes."""
        factor = self.power * upstream
        hidden = weight = bias = None
        if self.hidden is not None:
            # In float32, a chunk at a time: a 16-bit factor would round, and promotion would copy the whole.
            for rows in self.hidden.split(self.chunk_rows):
                rows.copy_(rows.to(factor.dtype).mul_(factor))
            hidden = self.hidden.view(self.hidden_shape).to(self.hidden_dtype)
        factor = self.head_factor * upstream
        if self.weight is not None:
            weight = self.multiplied(self.weight, factor, self.weight_dtype)
        if self.bias is not None:
            bias = self.bias.mul_(factor).to(self.bias_dtype)
        return hidden, weight, bias
