"""How the frozen-head form is computed, a chunk of rows at a time: products by torch, softmax in place by a backend.

With a frozen head a row's gradient is a multiple of what its own forward gives, whatever the reduction. So the forward
keeps those rows, `[M, D]` numbers, and every backward multiplies them by its upstream gradient: nothing is computed
again.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from disc_kernels.frozen_head.plan import LossCall, Planned, SummaryCall, TeacherSummary, splits
from disc_kernels.linear_kl.function import refuse_double_backward, save_tensors, saved_tensors
from disc_kernels.linear_kl.inputs import Side
from disc_kernels.linear_kl.products import multiply_into, project, take_rows, to_product_dtype, weight_tiles
from disc_kernels.linear_kl.ranks.group import Adding
from disc_kernels.linear_kl.reference import reference_entropy, reference_logits


class RowLosses(NamedTuple):
    divergence: Tensor  # [M] nats
    student_entropy: Tensor  # [M] nats, where statistics are asked for


# ---------------------------------------------------------------------------------------------------------------------
# Summary


def summarise(planned: Planned[SummaryCall]) -> TeacherSummary:
    call, plan = planned.call, planned.plan
    teacher, head, wide, device = call.teacher, call.head, call.head.accumulate_dtype, call.head.weight.device
    summary = TeacherSummary(
        embedding=torch.empty(call.rows, head.hidden_size, dtype=wide, device=device),
        entropy=torch.empty(call.rows, dtype=wide, device=device),
        bias=torch.empty(call.rows, dtype=wide, device=device),
    )
    buffer = torch.empty(min(plan.chunk_rows, call.rows), plan.row_stride, dtype=wide, device=device)
    weights_buffer = buffer.view(head.product_dtype)
    remainder_buffer = torch.empty_like(weights_buffer[:, : plan.row_stride]) if splits(head) else None
    adding = Adding(planned.group)
    for start in range(0, call.rows, plan.chunk_rows):
        chunk = slice(start, min(start + plan.chunk_rows, call.rows))
        part = slice(chunk.stop - start), slice(head.vocab_size)
        hidden = to_product_dtype(take_rows(teacher, chunk.start, chunk.stop), teacher)
        project(teacher, hidden, plan.tile_rows, buffer[part])
        weights, remainder = weights_buffer[part], None if remainder_buffer is None else remainder_buffer[part]
        normalised = planned.normalise(buffer[part], teacher, weights, remainder, other_bias=head.bias)
        embedding = summary.embedding[chunk]
        _multiply(head, weights, remainder, plan.tile_rows, embedding)
        (_, _, summary.entropy[chunk], summary.bias[chunk]), divisor = normalised()
        adding.start(embedding.div_(divisor.unsqueeze(1)), then=_nothing)
    adding.finish()
    return summary


def _nothing() -> None:
    """To be done with rows that are added up where they belong."""


def _multiply(head: Side, weights: Tensor, remainder: Tensor | None, tile_rows: int, out: Tensor) -> None:
    """Into `out` [R, D]: sum_v weights_v W[v], from multiples [R, V] of probabilities."""
    if head.vocab_size == 0:
        out.zero_()
    parts = [weights] if remainder is None else [weights, remainder]
    accumulate = False
    for tile, weight in weight_tiles(head, tile_rows):
        for part in parts:
            multiply_into(out, part[:, tile], weight, accumulate=accumulate)
            accumulate = True


def reference_summary(call: SummaryCall) -> TeacherSummary:
    """The specification: everything written down."""
    head = call.head
    log_p = torch.log_softmax(reference_logits(call.teacher) / call.temperature, -1)
    p = log_p.exp()
    weight = head.weight[: head.vocab_size].to(head.operand_dtype).to(p.dtype)
    bias = p.new_zeros(len(p))
    if head.bias is not None:
        bias = torch.where(p == 0, 0.0, p * head.bias[: head.vocab_size]).sum(-1)
    return TeacherSummary(p @ weight, reference_entropy(log_p), bias)


# ---------------------------------------------------------------------------------------------------------------------
# Loss


def row_losses(planned: Planned[LossCall]) -> RowLosses:
    """Divergences, with a gradient to the student's hidden states where one is asked for."""
    hidden = planned.call.student.hidden
    if torch.is_grad_enabled() and hidden.requires_grad:
        return RowLosses(*_RowLosses.apply(hidden, planned))
    with torch.no_grad():
        return _forward(planned, None, None)


class _RowLosses(torch.autograd.Function):
    """RowLosses(*apply(student_hidden, planned)); a gradient flows from the divergence.

    A 16-bit gradient should be rounded once. So the rows that are kept hold the mantissa of what they will probably be
    multiplied by, `call.row_factor` times the slope: what is left is then a power of two, or one times a loss scale.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, planned: Planned[LossCall]) -> RowLosses:
        call, student = planned.call, planned.call.student
        mantissa, _ = torch.frexp(call.row_factor * call.slope)
        mantissa = torch.where(mantissa == 0, 1, mantissa)
        gradient = torch.empty(call.rows, student.hidden_size, dtype=hidden.dtype, device=hidden.device)
        losses = _forward(planned, mantissa, gradient)
        save_tensors(ctx, (gradient, mantissa, student.index))
        ctx.hidden_shape, ctx.chunk_rows, ctx.slope = hidden.shape, planned.chunk_rows, call.slope
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(losses.student_entropy)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
        refuse_double_backward()
        if upstream is None:
            return None, None
        rows, mantissa, index = saved_tensors(ctx)
        assert rows is not None and mantissa is not None
        factor = (upstream * ctx.slope / mantissa).unsqueeze(1)
        new = rows.new_empty if index is None else rows.new_zeros  # with an index some rows may never be written
        # Where some rows must repeat, in 4 bytes: the sum of many 16-bit numbers stops growing.
        repeats = len(rows) > math.prod(ctx.hidden_shape[:-1])
        gradient = new(ctx.hidden_shape, dtype=factor.dtype if repeats else rows.dtype)
        flat = gradient.view(-1, rows.shape[1])
        for start in range(0, len(rows), ctx.chunk_rows):
            chunk = slice(start, start + ctx.chunk_rows)
            product = rows[chunk] * factor[chunk]  # wide: a 16-bit factor would round
            if index is None:
                flat[chunk] = product
            else:
                flat.index_add_(0, index[chunk], product.to(flat.dtype))
        return gradient.to(rows.dtype), None


def _forward(planned: Planned[LossCall], mantissa: Tensor | None, gradient: Tensor | None) -> RowLosses:
    """Fills `gradient` [M, D] with mantissa (sum_v q_v W[v] - c), where one is given."""
    with torch.autocast(planned.call.student.hidden.device.type, enabled=False):  # its rounding is in the operands
        return _chunk_loop(planned, mantissa, gradient)


def _chunk_loop(planned: Planned[LossCall], mantissa: Tensor | None, gradient: Tensor | None) -> RowLosses:
    call, plan, student = planned.call, planned.plan, planned.call.student
    new = partial(torch.empty, dtype=student.accumulate_dtype, device=student.hidden.device)
    losses = RowLosses(new(call.rows), new(call.rows))
    buffer = new(min(plan.chunk_rows, call.rows), plan.row_stride)
    weights_buffer = buffer.view(student.product_dtype)
    adding = Adding(planned.group)
    for start in range(0, call.rows, plan.chunk_rows):
        chunk = slice(start, min(start + plan.chunk_rows, call.rows))
        part = slice(chunk.stop - start), slice(student.vocab_size)
        hidden = to_product_dtype(take_rows(student, chunk.start, chunk.stop), student)
        project(student, hidden, plan.tile_rows, buffer[part])
        weights = None if gradient is None else weights_buffer[part]
        normalised = planned.normalise(buffer[part], student, weights, entropy=call.statistics)
        rows = None if weights is None else new(len(hidden), student.hidden_size)
        if weights is not None and rows is not None:
            _multiply(student, weights, None, plan.tile_rows, rows)
        chosen = chunk if call.summary_index is None else call.summary_index[chunk]
        embedding, entropy, bias = (x[chosen] for x in call.summary)
        expected = (embedding * hidden).sum(-1).add_(bias).mul_(call.slope)
        (maximum, log_sum, losses.student_entropy[chunk], _), divisor = normalised()
        # The two large numbers first: what is left of them is exact, and of the size of the rest.
        losses.divergence[chunk] = (maximum - expected).add_(log_sum - entropy).clamp_min_(0)
        if rows is not None and gradient is not None and mantissa is not None:
            take = partial(_take_gradient, gradient[chunk], rows, embedding, mantissa[chunk])
            adding.start(rows.div_(divisor.unsqueeze(1)), then=take)
    adding.finish()
    return losses


def _take_gradient(out: Tensor, rows: Tensor, embedding: Tensor, mantissa: Tensor) -> None:
    """Into `out` [R, D], from sum_v q_v W[v] and c; overwrites the first."""
    out.copy_(rows.sub_(embedding).mul_(mantissa.unsqueeze(1)))


def reference_row_losses(call: LossCall) -> RowLosses:
    """The specification: everything written down, gradients by autograd."""
    student = call.student
    with torch.autocast(student.hidden.device.type, enabled=False):
        u = reference_logits(student) / call.temperature
        hidden = student.hidden.flatten(0, -2)
        if student.index is not None:
            hidden = hidden.index_select(0, student.index)
        hidden = hidden.to(student.operand_dtype).to(u.dtype)
        chosen = slice(None) if call.summary_index is None else call.summary_index
        embedding, entropy, bias = (x[chosen].clone() for x in call.summary)  # autograd saves no inference tensor
        expected = ((embedding * hidden).sum(-1) + bias) * call.slope
        divergence = torch.logsumexp(u, -1) - expected - entropy
        return RowLosses(divergence, reference_entropy(torch.log_softmax(u.detach(), -1)))
