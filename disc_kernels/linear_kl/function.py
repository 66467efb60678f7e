"""The loop over chunks of rows, and the autograd function around it.

A chunk's logits live only while the chunk does: products by torch, rows by a backend, the gradient in place of the
student's logits, then the two gradient products. For a scalar loss all of this happens in the forward (4 products of
2 M V D operations; 3 with a frozen head), because the upstream gradient is one number that can be multiplied in later.
For `reduction="none"` the upstream gradient of each row is known in the backward only, so that recomputes (6 products);
so does a second backward through a graph that was retained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from disc_kernels.linear_kl.problem import Problem, Side, SuffixKLStats
from disc_kernels.linear_kl.products import multiply_into, to_product_dtype, weight_tiles
from disc_kernels.linear_kl.workspace import Plan


class Wanted(NamedTuple):
    """Which gradients of the student's tensors are asked for."""

    hidden: bool
    weight: bool
    bias: bool


@dataclass(frozen=True)
class Call:
    """A problem with how it is to be computed."""

    problem: Problem
    plan: Plan
    rows_backend: ModuleType
    statistics: bool


def fused_forward(call: Call) -> tuple[Tensor, SuffixKLStats]:
    """Loss and statistics where no gradient is asked for."""
    with torch.no_grad():
        stats = _run_chunks(call, None, None)
        return _reduced(call.problem, stats.divergence), stats


class FusedSuffixKL(torch.autograd.Function):
    """(loss, *statistics) = apply(student_hidden, student_weight, student_bias, call, wanted)"""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call, wanted: Wanted
    ) -> tuple[Tensor, ...]:
        problem = call.problem
        row_scale = ctx.gradients = None
        if problem.reduction != "none":
            row_scale, largest_weight = _row_scale(_normalised_weight(problem), problem)
            ctx.gradients = GradientSums(call, wanted, largest_weight)
        stats = _run_chunks(call, row_scale, ctx.gradients)
        _save_tensors(ctx, problem.tensors())
        ctx.call, ctx.wanted = replace(call, problem=problem.with_tensors((None,) * len(problem.tensors()))), wanted
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*stats)
        return _reduced(problem, stats.divergence), *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, None, None, None, None
        # Handed out once, not copied: a copy would double the memory of the weight's gradient.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            call = replace(ctx.call, problem=ctx.call.problem.with_tensors(_saved_tensors(ctx)), statistics=False)
            weight = upstream if upstream.dim() else upstream * _normalised_weight(call.problem)
            row_scale, largest_weight = _row_scale(weight, call.problem)
            gradients = GradientSums(call, ctx.wanted, largest_weight)
            _run_chunks(call, row_scale, gradients)
            upstream = torch.ones_like(largest_weight)
        return *gradients.finish(upstream), None, None


def _save_tensors(ctx: Any, tensors: tuple[Tensor | None, ...]) -> None:
    """Keep the inputs for a backward that has to recompute.

    Through autograd, which frees them after the backward and notices when one was changed in place before it. It does
    not take a teacher's tensors from `torch.inference_mode`, which are kept as they are.
    """
    ctx.kept = tuple(x if x is not None and x.is_inference() else None for x in tensors)
    ctx.save_for_backward(*(x if kept is None else None for x, kept in zip(tensors, ctx.kept, strict=True)))


def _saved_tensors(ctx: Any) -> list[Tensor | None]:
    return [x if kept is None else kept for x, kept in zip(ctx.saved_tensors, ctx.kept, strict=True)]


class GradientSums:
    """The student's gradients while they are summed over chunks, still to be multiplied by a scale.

    The scale is the largest row weight (`largest_weight`, 0-dim) times the factor that `rows_torch.py` leaves out. It
    is split into mantissa and power of two. The mantissa is applied to the hidden gradient while it is float32, the
    power, exact in any dtype, in the backward: a 16-bit gradient is rounded once, and a float16 one does not underflow
    before the upstream gradient (a loss scaler's) has been multiplied in.
    """

    def __init__(self, call: Call, wanted: Wanted, largest_weight: Tensor):
        problem, student = call.problem, call.problem.student
        scale = largest_weight * (student.transform.scale / problem.temperature)
        self.mantissa, _ = torch.frexp(scale)
        self.power = torch.where(scale == 0, 1, scale / self.mantissa)  # exact
        weight, hidden, bias = student.weight, student.hidden, student.bias
        # Nothing here keeps the inputs alive until the backward.
        self.hidden_shape, self.chunk_rows = hidden.shape, call.plan.chunk_rows
        self.weight_dtype, self.bias_dtype = weight.dtype, weight.dtype if bias is None else bias.dtype
        wide = problem.accumulate_dtype
        self.hidden: Tensor | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if wanted.hidden:
            # With an index some rows may never be written, and some may be summed.
            new = torch.empty if student.index is None else torch.zeros
            self.hidden = new(student.hidden_rows, student.hidden_size, dtype=hidden.dtype, device=hidden.device)
        if wanted.weight:
            # With the weight's strides, or autograd would copy it to get them.
            self.weight = torch.empty_like(weight, dtype=wide)
            # The first chunk writes what is compared; the rest of the vocabulary has no gradient.
            self.weight[problem.vocab_size if problem.rows else 0 :].zero_()
        if wanted.bias:
            self.bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device)

    def add_chunk(self, call: Call, start: int, stop: int, gradient: Tensor, hidden: Tensor) -> None:
        """Add what rows start..stop give, from their logits' `gradient` [R, V] and `hidden` rows [R, D]."""
        problem, student = call.problem, call.problem.student
        if self.hidden is not None:
            rows = torch.empty(
                stop - start, student.hidden_size, dtype=problem.accumulate_dtype, device=gradient.device
            )
            for first, last, weight in weight_tiles(student, call.plan.tile_rows):
                multiply_into(rows, gradient[:, first:last], weight, accumulate=first > 0)
            rows.mul_(self.mantissa)
            if student.index is None:
                self.hidden[start:stop] = rows
            else:
                self.hidden.index_add_(0, student.index[start:stop], rows.to(self.hidden.dtype))
        if self.weight is not None:
            multiply_into(self.weight[: problem.vocab_size], gradient.T, hidden, accumulate=start > 0)
        if self.bias is not None:
            self.bias[: problem.vocab_size] += gradient.sum(0, dtype=self.bias.dtype)

    def finish(self, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Multiply by what is still missing; gradients in the inputs' shapes and dtypes."""
        factor = self.power * upstream
        hidden = weight = bias = None
        if self.hidden is not None:
            # In float32, a chunk at a time: a 16-bit factor would round, and promotion would copy the whole.
            for rows in self.hidden.split(self.chunk_rows):
                rows.copy_(rows.to(factor.dtype).mul_(factor))
            hidden = self.hidden.view(self.hidden_shape)
        factor = factor * self.mantissa
        if self.weight is not None:
            weight = self.weight.mul_(factor).to(self.weight_dtype)
        if self.bias is not None:
            bias = self.bias.mul_(factor).to(self.bias_dtype)
        return hidden, weight, bias


def _run_chunks(call: Call, row_scale: Tensor | None, gradients: GradientSums | None) -> SuffixKLStats:
    with torch.autocast(call.problem.device.type, enabled=False):  # its rounding is in the operands already
        return _chunk_loop(call, row_scale, gradients)


def _chunk_loop(call: Call, row_scale: Tensor | None, gradients: GradientSums | None) -> SuffixKLStats:
    problem, plan = call.problem, call.plan
    wide, device = problem.accumulate_dtype, problem.device
    stats = SuffixKLStats(*(torch.empty(problem.rows, dtype=wide, device=device) for _ in range(4)))
    student_buffer, teacher_buffer = (
        torch.empty(min(plan.chunk_rows, problem.rows), plan.row_stride, dtype=wide, device=device) for _ in range(2)
    )
    # The gradient takes the student's place in memory, row by row, in the dtype of the products it goes to.
    gradient_buffer = student_buffer.view(problem.student.product_dtype)
    for start in range(0, problem.rows, plan.chunk_rows):
        stop = min(start + plan.chunk_rows, problem.rows)
        student, student_hidden = _logits(problem.student, call, start, stop, student_buffer)
        teacher, _ = _logits(problem.teacher, call, start, stop, teacher_buffer)
        gradient = gradient_buffer[: stop - start, : problem.vocab_size] if gradients is not None else None
        call.rows_backend.compare_rows(
            student,
            teacher,
            problem,
            plan.block_rows,
            SuffixKLStats(*(row[start:stop] for row in stats)),
            row_scale=None if row_scale is None else row_scale[start:stop],
            gradient=gradient,
            statistics=call.statistics,
        )
        if gradients is not None and gradient is not None:
            gradients.add_chunk(call, start, stop, gradient, student_hidden)
    return stats


def _logits(side: Side, call: Call, start: int, stop: int, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Head outputs [R, V] of rows start..stop, in `buffer`, and the hidden rows they came from, ready to multiply."""
    hidden = to_product_dtype(_take_rows(side, start, stop), side)
    logits = buffer[: stop - start, : side.vocab_size]
    for first, last, weight in weight_tiles(side, call.plan.tile_rows):
        multiply_into(logits[:, first:last], hidden, weight.T)
    return logits, hidden


def _take_rows(side: Side, start: int, stop: int) -> Tensor:
    """Rows start..stop of what the side compares; never a copy of more than those."""
    shape = side.hidden.shape
    try:
        flat = side.hidden.view(-1, shape[-1])
    except RuntimeError:  # strides that no view can flatten, such as hidden[:, :-1]
        flat = None
    if side.index is None and flat is not None:
        return flat[start:stop]
    if side.index is None:
        rows = torch.arange(start, stop, device=side.hidden.device)
    else:
        rows = side.index[start:stop]
    if flat is not None:
        return flat.index_select(0, rows)
    coordinates = []
    for size in reversed(shape[:-1]):
        coordinates.append(rows % size)
        rows = rows // size
    return side.hidden[tuple(reversed(coordinates))]


def _normalised_weight(problem: Problem) -> Tensor:
    """[M], or [1] where all rows count the same: the weights divided by what the reduction divides by."""
    wide, device = problem.accumulate_dtype, problem.device
    if problem.row_weight is None:
        divisor = max(problem.rows, 1) if problem.reduction == "mean" else 1
        return torch.full((1,), 1 / divisor, dtype=wide, device=device)
    weight = problem.row_weight.to(wide)
    return weight if problem.reduction == "sum" else weight / _total_weight(weight)


def _total_weight(weight: Tensor) -> Tensor:
    """What "mean" divides by; infinite where every row is masked, so that loss and gradients are zero, not NaN."""
    total = weight.sum()
    return torch.where(total == 0, torch.inf, total)


def _row_scale(weight: Tensor, problem: Problem) -> tuple[Tensor | None, Tensor]:
    """`weight` [M] or [1] as (weight over its largest, the largest): the first keeps a 16-bit gradient in range."""
    weight = weight.to(problem.accumulate_dtype)
    if weight.numel() <= 1:  # M = 0, or all rows alike
        return None, weight.sum()
    largest = weight.abs().amax()
    return weight / torch.where(largest == 0, 1, largest), largest


def _reduced(problem: Problem, divergence: Tensor) -> Tensor:
    if problem.reduction == "none":
        return divergence.clone()  # the statistics hold the other one
    weight = problem.row_weight
    if weight is None:
        return divergence.sum() / (max(problem.rows, 1) if problem.reduction == "mean" else 1)
    weight = weight.to(divergence.dtype)
    loss = (divergence * weight).sum()
    return loss / _total_weight(weight) if problem.reduction == "mean" else loss
