"""Compute the loss chunk by chunk of rows, and wrap that in an autograd function.

A chunk's logits live only while the chunk does: products by torch, rows by a backend, the gradient in place of the
student's logits, then the two gradient products (once for a group of chunks where they take 16-bit operands). For a
scalar loss all of this happens in the forward, because the upstream gradient is one number that can be multiplied in
later. With `reduction="none"`, and in a second backward through a retained graph, the backward computes it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from disc_kernels.linear_kl.gradients import GradientSums, Wanted
from disc_kernels.linear_kl.inputs import Problem, SuffixKLInputs, SuffixKLStats
from disc_kernels.linear_kl.logits import Logits
from disc_kernels.linear_kl.problem import check_inputs
from disc_kernels.linear_kl.ranks.group import VocabGroup, compare_shard_rows
from disc_kernels.linear_kl.reduction import row_factors, weighted_sum
from disc_kernels.linear_kl.rows import choose_implementation, load_backend
from disc_kernels.linear_kl.rows.topk import compare_topk_rows
from disc_kernels.linear_kl.teacher_rows import Chunk, choose_teacher_rows
from disc_kernels.linear_kl.workspace import Plan, max_cached_rows, plan_problem


def prepare(inputs: SuffixKLInputs, group: VocabGroup | None = None) -> tuple[Problem, Plan]:
    """Check the inputs, choose the row functions, sort the rows, divide the workspace."""
    problem = check_inputs(inputs, sharded=group is not None)
    impl = choose_implementation(inputs.impl, problem.device, problem.accumulate_dtype, sharded=group is not None)
    max_bytes, index = inputs.max_workspace_bytes, inputs.teacher_index
    host_index = None
    if index is not None and index.device.type == "cpu" and index.dtype != torch.bool:  # which repeats no row
        host_index = index.to(torch.int64)
    sizes = problem.rows, problem.teacher.hidden_rows, max_cached_rows(problem, max_bytes)
    shared = problem.with_teacher_rows(choose_teacher_rows(problem.teacher.index, host_index, *sizes))
    try:
        return shared, plan_problem(shared, max_bytes, load_backend(impl), group)
    except ValueError:
        if not shared.teacher_rows.cached:
            raise
        # What caching them leaves of the workspace is too little for the rest.
        return problem, plan_problem(problem, max_bytes, load_backend(impl), group)


def fused(problem: Problem, plan: Plan) -> tuple[Tensor, SuffixKLStats]:
    """Compute the loss; record gradients for the student tensors that need them."""
    student = problem.student
    tensors = (student.hidden, student.weight, student.bias)
    wanted = Wanted(*(torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors))
    if not any(wanted):
        return forward_only(problem, plan)
    loss, *stats = FusedSuffixKL.apply(*tensors, problem, plan, wanted)
    return loss, SuffixKLStats(*stats)


def forward_only(problem: Problem, plan: Plan) -> tuple[Tensor, SuffixKLStats]:
    """Compute the loss where no gradient is asked for."""
    with torch.no_grad():
        return _finish(problem, _run_chunks(problem, plan, None, None))


def forward_with_gradients(
    problem: Problem, plan: Plan, wanted: Wanted
) -> tuple[tuple[Tensor, SuffixKLStats], GradientSums]:
    """Compute a scalar loss, and its gradients but for the upstream one."""
    with torch.no_grad():
        row_scale, largest_weight = _row_scale(_row_factors(problem))
        gradients = GradientSums(problem, plan, wanted, largest_weight)
        return _finish(problem, _run_chunks(problem, plan, row_scale, gradients)), gradients


class FusedSuffixKL(torch.autograd.Function):
    """Compute (loss, *statistics) = apply(student_hidden, student_weight, student_bias, problem, plan, wanted)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem, plan: Plan, wanted: Wanted
    ) -> tuple[Tensor, ...]:
        if problem.reduction == "none":
            (loss, stats), ctx.gradients = forward_only(problem, plan), None
        else:
            (loss, stats), ctx.gradients = forward_with_gradients(problem, plan, wanted)
        tensors = problem.tensors()
        save_tensors(ctx, tensors)
        ctx.problem, ctx.plan, ctx.wanted = problem.with_tensors((None,) * len(tensors)), plan, wanted
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if upstream is None:
            return (None,) * 6
        # Handed out once, not copied: a copy would double the memory of the weight's gradient.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            problem = replace(ctx.problem.with_tensors(saved_tensors(ctx)), statistics=False)
            if problem.reduction == "none":  # a sum, now that its weights are known
                weight = problem.teacher_rows.to_sorted_order(upstream)
                problem, upstream = replace(problem, reduction="sum", row_weight=weight), upstream.new_ones(())
            _, gradients = forward_with_gradients(problem, ctx.plan, ctx.wanted)
        return *gradients.finish(upstream), None, None, None


def refuse_double_backward() -> None:
    """Raise where autograd records a backward, which it does for `create_graph=True` only.

    Gradients made in the forward are no part of that record: differentiated again they would count as constants.
    (`once_differentiable` refuses only where the upstream gradient requires one itself.)
    """
    if torch.is_grad_enabled():
        raise RuntimeError("The gradients of this loss cannot be differentiated: call backward without create_graph")


def save_tensors(ctx: Any, tensors: tuple[Tensor | None, ...]) -> None:
    """Save the inputs for a backward that has to recompute.

    Through autograd, which frees them after the backward and notices when one was changed in place before it. It does
    not take a teacher's tensors from `torch.inference_mode`, which are kept as they are.
    """
    ctx.inference_tensors = {i: x for i, x in enumerate(tensors) if x is not None and x.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.inference_tensors else x for i, x in enumerate(tensors)))


def saved_tensors(ctx: Any) -> list[Tensor | None]:
    """Return what `save_tensors` saved."""
    return [ctx.inference_tensors.get(i, x) for i, x in enumerate(ctx.saved_tensors)]


def _run_chunks(
    problem: Problem, plan: Plan, row_scale: Tensor | None, gradients: GradientSums | None
) -> SuffixKLStats:
    """Compare all rows chunk by chunk; add to `gradients`, of rows times `row_scale` [M], where they are given."""
    compare_rows = plan.backend.compare_rows
    if problem.teacher.ids is not None:
        compare_rows = partial(compare_topk_rows, plan.backend, plan.group)
    elif plan.group is not None:
        compare_rows = partial(compare_shard_rows, plan.backend, plan.group)
    wide, narrow, device = problem.accumulate_dtype, problem.student.product_dtype, problem.device
    stats = SuffixKLStats(*(torch.empty(problem.rows, dtype=wide, device=device) for _ in range(4)))
    logits = Logits(problem, plan)
    # The gradient takes the student's place in memory, row by row, or has a buffer of the dtype that is multiplied.
    gradient_buffer = logits.student_buffer
    if gradients is not None and narrow != wide:
        gradient_buffer = torch.empty(min(plan.group_rows, problem.rows), plan.row_stride, dtype=narrow, device=device)
    gradient_buffer = gradient_buffer[:, : problem.vocab_size]
    with torch.autocast(device.type, enabled=False):  # its rounding is in the operands already
        for group in _groups(logits.chunks, plan.group_rows, alone=narrow == wide):
            group_rows = slice(group[0].start, group[-1].stop)
            for chunk in group:
                rows, place = slice(chunk.start, chunk.stop), chunk.start - group_rows.start
                student, teacher, inverse_index = logits.of(chunk)
                compare_rows(
                    student,
                    teacher,
                    inverse_index,
                    problem,
                    plan.block_rows,
                    stats=SuffixKLStats(*(x[rows] for x in stats)),
                    statistics=problem.statistics,
                    row_scale=None if row_scale is None else row_scale[rows],
                    gradient=None if gradients is None else gradient_buffer[place : place + len(student)],
                )
            if gradients is not None:
                gradient = gradient_buffer[: group_rows.stop - group_rows.start]
                gradients.add_rows(logits.student, group_rows.start, group_rows.stop, gradient)
        if gradients is not None:
            gradients.finish_groups()
        if plan.group is not None and problem.rows > 0 and problem.teacher.ids is None:
            plan.group.add_shares(stats, problem.statistics)
    return stats


def _groups(chunks: Sequence[Chunk], group_rows: int, alone: bool) -> Iterator[list[Chunk]]:
    """Yield runs of chunks of at most `group_rows` rows together; each chunk by itself where it is `alone`."""
    group: list[Chunk] = []
    for chunk in chunks:
        if group and (alone or chunk.stop - group[0].start > group_rows):
            yield group
            group = []
        group.append(chunk)
    if group:
        yield group


def _finish(problem: Problem, stats: SuffixKLStats) -> tuple[Tensor, SuffixKLStats]:
    """Return the loss and the statistics in the caller's order of rows."""
    callers_stats = SuffixKLStats(*map(problem.teacher_rows.to_callers_order, stats))
    if problem.reduction == "none":
        return callers_stats.divergence.clone(), callers_stats  # so that they share no memory
    return weighted_sum(stats.divergence, _row_factors(problem)), callers_stats


def _row_factors(problem: Problem) -> Tensor:
    """Return what each row's divergence is multiplied with: [M], or [1] where all rows count the same."""
    return row_factors(problem.row_weight, problem.rows, problem.reduction, problem.accumulate_dtype, problem.device)


def _row_scale(factors: Tensor) -> tuple[Tensor | None, Tensor]:
    """Split `factors` [M] or [1] into (themselves over the largest, the largest): a 16-bit gradient stays in range."""
    if factors.numel() <= 1:  # M = 0, or all rows alike
        return None, factors.sum()
    largest = factors.abs().amax()
    return factors / torch.where(largest == 0, 1, largest), largest
