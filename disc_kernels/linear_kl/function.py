"""The loop over chunks of rows, and the autograd function around it.

A chunk's logits live only while the chunk does: products by torch, rows by a backend, the gradient in place of the
student's logits, then the two gradient products. For a scalar loss all of this happens in the forward (4 products of
2 M V D operations; 3 with a frozen head), because the upstream gradient is one number that can be multiplied in later.
For `reduction="none"` the upstream gradient of each row is known in the backward only, so that recomputes (6 products);
so does a second backward through a graph that was retained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from disc_kernels.linear_kl.gradients import GradientSums, Wanted
from disc_kernels.linear_kl.inputs import Problem, SuffixKLStats
from disc_kernels.linear_kl.products import project, take_rows, to_product_dtype
from disc_kernels.linear_kl.ranks.group import ShardedRows, VocabGroup
from disc_kernels.linear_kl.rows import rows_backend
from disc_kernels.linear_kl.teacher_rows import TeacherRows, share_teacher_rows
from disc_kernels.linear_kl.workspace import Plan, most_kept_rows, plan


@dataclass(frozen=True)
class Call:
    """A problem with how it is to be computed."""

    problem: Problem  # its rows in the order of `teacher_rows`
    teacher_rows: TeacherRows
    plan: Plan
    rows_backend: Any  # whose `compare_rows` is that of rows_torch.py
    statistics: bool
    group: VocabGroup | None = None

    @property
    def head_rows(self) -> dict[str, int]:
        sides = {"student_weight": self.problem.student, "teacher_weight": self.problem.teacher}
        return {name: side.weight.shape[0] for name, side in sides.items()}

    @property
    def chunk_rows(self) -> int:
        return self.plan.chunk_rows

    def divided(self, entries: int, chunk_rows: int) -> Call:
        """Of the first `entries` entries of the heads, in chunks of so many rows."""
        student, teacher = (replace(x, vocab_size=entries) for x in (self.problem.student, self.problem.teacher))
        problem = replace(self.problem, student=student, teacher=teacher)
        return replace(self, problem=problem, plan=replace(self.plan, chunk_rows=chunk_rows))


def prepare(
    problem: Problem,
    teacher_index: Tensor | None,  # as the caller gave it, perhaps on the CPU
    impl: str,  # "triton" or "torch"
    max_bytes: int | None,
    statistics: bool,
    group: VocabGroup | None = None,
) -> Call:
    """Sort the rows, divide the workspace, choose the row functions."""
    host_index = teacher_index if teacher_index is not None and teacher_index.device.type == "cpu" else None
    rows = rows_backend(impl, sharded=group is not None)
    demands = (max_bytes, rows.BLOCK_ENTRIES, rows.BLOCK_TEMPORARIES)
    ranks = 1 if group is None else group.ranks
    problem, teacher_rows = share_teacher_rows(problem, host_index, most_kept_rows(problem, max_bytes))
    try:
        how = plan(problem, teacher_rows, *demands, ranks)
    except ValueError:
        if not teacher_rows.kept:
            raise
        # What keeping them leaves of the workspace is too little for the rest.
        teacher_rows = TeacherRows(problem.rows, problem.teacher.index)
        how = plan(problem, teacher_rows, *demands, ranks)
    compare = rows if group is None else ShardedRows(rows, group)
    return Call(problem, teacher_rows, how, compare, statistics, group)


class Result(NamedTuple):
    """What a call gives, in the caller's order of rows."""

    loss: Tensor  # 0-dim, or [M] for reduction "none"
    divergence: Tensor  # [M], as the statistics that follow
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor

    @property
    def stats(self) -> SuffixKLStats:
        return SuffixKLStats(*self[1:5])


def fused(call: Call) -> Result:
    """The result, with gradients for what of the student's requires them."""
    student = call.problem.student
    tensors = (student.hidden, student.weight, student.bias)
    wanted = Wanted(*(torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors))
    return Result(*FusedSuffixKL.apply(*tensors, call, wanted)) if any(wanted) else fused_forward(call)


def fused_forward(call: Call) -> Result:
    """The result where no gradient is asked for."""
    with torch.no_grad():
        return _result(call, _run_chunks(call, None, None))


def forward_with_gradients(call: Call, wanted: Wanted) -> tuple[Result, GradientSums]:
    """The result for a reduction to a scalar, and its gradients but for the upstream one."""
    with torch.no_grad():
        row_scale, largest_weight = _row_scale(_normalised_weight(call.problem), call.problem)
        gradients = GradientSums(call.problem, call.plan, wanted, largest_weight, call.group)
        return _result(call, _run_chunks(call, row_scale, gradients)), gradients


class FusedSuffixKL(torch.autograd.Function):
    """Result(*apply(student_hidden, student_weight, student_bias, call, wanted)); gradients flow from the loss."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call, wanted: Wanted
    ) -> tuple[Tensor, ...]:
        problem = call.problem
        if problem.reduction == "none":
            result, ctx.gradients = fused_forward(call), None
        else:
            result, ctx.gradients = forward_with_gradients(call, wanted)
        save_tensors(ctx, problem.tensors())
        ctx.call, ctx.wanted = replace(call, problem=problem.with_tensors((None,) * len(problem.tensors()))), wanted
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*result[1:])
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if upstream is None:
            return None, None, None, None, None
        # Handed out once, not copied: a copy would double the memory of the weight's gradient.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            problem = ctx.call.problem.with_tensors(saved_tensors(ctx))
            if problem.reduction == "none":  # a sum, now that its weights are known
                weight = ctx.call.teacher_rows.in_sorted_order(upstream)
                problem, upstream = replace(problem, reduction="sum", row_weight=weight), upstream.new_ones(())
            _, gradients = forward_with_gradients(replace(ctx.call, problem=problem, statistics=False), ctx.wanted)
        return *gradients.finish(upstream), None, None


def refuse_double_backward() -> None:
    """Raise where autograd records a backward, which it does for `create_graph=True` only.

    Gradients made in the forward are no part of that record: differentiated again they would count as constants.
    (`once_differentiable` refuses only where the upstream gradient requires one itself.)
    """
    if torch.is_grad_enabled():
        raise RuntimeError("The gradients of this loss cannot be differentiated: call backward without create_graph")


def _result(call: Call, stats: SuffixKLStats) -> Result:
    loss = _reduced(call.problem, stats.divergence)
    if call.problem.reduction == "none":
        loss = call.teacher_rows.in_callers_order(loss)
    return Result(loss, *map(call.teacher_rows.in_callers_order, stats))


def save_tensors(ctx: Any, tensors: tuple[Tensor | None, ...]) -> None:
    """Keep the inputs for a backward that has to recompute.

    Through autograd, which frees them after the backward and notices when one was changed in place before it. It does
    not take a teacher's tensors from `torch.inference_mode`, which are kept as they are.
    """
    ctx.kept = tuple(x if x is not None and x.is_inference() else None for x in tensors)
    ctx.save_for_backward(*(x if kept is None else None for x, kept in zip(tensors, ctx.kept, strict=True)))


def saved_tensors(ctx: Any) -> list[Tensor | None]:
    return [x if kept is None else kept for x, kept in zip(ctx.saved_tensors, ctx.kept, strict=True)]


def _run_chunks(call: Call, row_scale: Tensor | None, gradients: GradientSums | None) -> SuffixKLStats:
    with torch.autocast(call.problem.device.type, enabled=False):  # its rounding is in the operands already
        return _chunk_loop(call, row_scale, gradients)


def _chunk_loop(call: Call, row_scale: Tensor | None, gradients: GradientSums | None) -> SuffixKLStats:
    problem, plan, teacher_rows = call.problem, call.plan, call.teacher_rows
    wide, device, entries = problem.accumulate_dtype, problem.device, slice(problem.vocab_size)
    projected_side = replace(problem.teacher, index=teacher_rows.index)
    chunks = list(teacher_rows.chunks(problem.rows, plan.chunk_rows))
    stats = SuffixKLStats(*(torch.empty(problem.rows, dtype=wide, device=device) for _ in range(4)))
    student_buffer, teacher_buffer = (
        torch.empty(rows, plan.row_stride, dtype=wide, device=device)
        for rows in (
            max((chunk.stop - chunk.start for chunk in chunks), default=0),
            max((chunk.last - chunk.first for chunk in chunks), default=0),
        )
    )
    # The gradient takes the student's place in memory, row by row, in the dtype of the products it goes to.
    gradient_buffer = student_buffer.view(problem.student.product_dtype)
    projected = None
    for start, stop, first, last in chunks:
        rows = slice(start, stop)
        student_hidden = to_product_dtype(take_rows(problem.student, start, stop), problem.student)
        student = student_buffer[: stop - start, entries]
        if problem.one_head:
            teacher_hidden = to_product_dtype(take_rows(problem.teacher, start, stop), problem.teacher)
            project(problem.student, student_hidden - teacher_hidden, plan.tile_rows, student)
        else:
            project(problem.student, student_hidden, plan.tile_rows, student)
        teacher = teacher_buffer[: last - first, entries]
        if projected != (first, last):
            teacher_hidden = to_product_dtype(take_rows(projected_side, first, last), projected_side)
            project(projected_side, teacher_hidden, plan.tile_rows, teacher)
            projected = first, last
        gradient = gradient_buffer[: stop - start, entries] if gradients is not None else None
        call.rows_backend.compare_rows(
            student,
            teacher,
            None if teacher_rows.slot is None else teacher_rows.slot[rows] - first,
            problem,
            plan.block_rows,
            SuffixKLStats(*(x[rows] for x in stats)),
            row_scale=None if row_scale is None else row_scale[rows],
            gradient=gradient,
            statistics=call.statistics,
        )
        if gradients is not None and gradient is not None:
            gradients.add_chunk(problem.student, start, stop, gradient, student_hidden)
    if gradients is not None:
        gradients.finish_chunks()
    if call.group is not None and problem.rows > 0:
        call.group.add_shares(stats, call.statistics)
    return stats


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
