"""How the frozen-head form is computed, a chunk of rows at a time: products by torch, softmax in place by a backend.

With a frozen head a row's gradient is a multiple of what its own forward gives, whatever the reduction. So the forward
keeps those rows, `[M, D]` numbers, and every backward multiplies them by its upstream gradient: nothing is computed
again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from disc_kernels.linear_kl.function import refuse_double_backward, save_tensors, saved_tensors
from disc_kernels.linear_kl.problem import Side
from disc_kernels.linear_kl.products import (
    multiply_into,
    needs_tiles,
    project,
    take_rows,
    to_product_dtype,
    weight_tiles,
)
from disc_kernels.linear_kl.reference import reference_entropy, reference_logits
from disc_kernels.linear_kl.workspace import Demand, Plan, divide, row_stride


class TeacherSummary(NamedTuple):
    """What is kept of M teacher rows: D + 2 numbers each, float32 (float64 for float64 inputs), detached.

    Choose rows with `TeacherSummary(*(x[rows] for x in summary))`; save with `torch.save(summary._asdict(), path)`,
    load with `TeacherSummary(**torch.load(path))`.
    """

    embedding: Tensor  # [M, D_s]: sum_v p_v W_s[v], the student's output embedding the teacher expects
    entropy: Tensor  # [M]: nats, of the teacher's p = softmax(logits / T)
    bias: Tensor  # [M]: sum_v p_v b_s[v], 0 without a bias


@dataclass(frozen=True)
class SummaryCall:
    teacher: Side
    head: Side  # the student's; it has no rows
    temperature: float

    @property
    def rows(self) -> int:
        return self.teacher.hidden_rows if self.teacher.index is None else len(self.teacher.index)


@dataclass(frozen=True)
class LossCall:
    student: Side
    summary: TeacherSummary
    summary_index: Tensor | None  # [M] int64; None: all rows, in order
    rows: int  # M
    temperature: float
    row_factor: Tensor  # [M]: the derivative of the loss in each row's divergence
    statistics: bool

    @property
    def slope(self) -> float:
        """Derivative of a logit over T in the head's output."""
        return self.student.transform.scale / self.temperature


class RowLosses(NamedTuple):
    divergence: Tensor  # [M] nats
    student_entropy: Tensor  # [M] nats, where statistics are asked for


# ---------------------------------------------------------------------------------------------------------------------
# Summary


def summarise(call: SummaryCall, backend: ModuleType, max_bytes: int | None) -> TeacherSummary:
    teacher, head, wide, device = call.teacher, call.head, call.head.accumulate_dtype, call.head.weight.device
    plan = _plan(call.rows, (teacher, head), _summary_row_bytes(call), 0, backend, max_bytes)
    summary = TeacherSummary(
        embedding=torch.empty(call.rows, head.hidden_size, dtype=wide, device=device),
        entropy=torch.empty(call.rows, dtype=wide, device=device),
        bias=torch.zeros(call.rows, dtype=wide, device=device),
    )
    chunk_rows = min(plan.chunk_rows, call.rows)
    buffer = torch.empty(chunk_rows, plan.row_stride, dtype=wide, device=device)
    weights_buffer = buffer.view(head.product_dtype)
    remainder_buffer = torch.empty_like(weights_buffer[:, : plan.row_stride]) if _splits(head) else None
    numbers = torch.empty(3, chunk_rows, dtype=wide, device=device)
    for start in range(0, call.rows, plan.chunk_rows):
        chunk = slice(start, min(start + plan.chunk_rows, call.rows))
        part = slice(chunk.stop - start), slice(head.vocab_size)
        hidden = to_product_dtype(take_rows(teacher, chunk.start, chunk.stop), teacher)
        project(teacher, hidden, plan.tile_rows, buffer[part])
        maximum, log_sum, total = numbers[:, part[0]]
        remainder = None if remainder_buffer is None else remainder_buffer[part]
        backend.normalise_rows(
            buffer[part],
            teacher,
            call.temperature,
            plan.block_rows,
            maximum=maximum,
            log_sum=log_sum,
            entropy=summary.entropy[chunk],
            weights=weights_buffer[part],
            remainder=remainder,
            total=total,
            other_bias=head.bias,
            expected_bias=None if head.bias is None else summary.bias[chunk],
        )
        _expect(head, weights_buffer[part], remainder, total, plan.tile_rows, summary.embedding[chunk])
    return summary


def _splits(head: Side) -> bool:
    """Whether probabilities go to the product in two parts, because it takes 16-bit operands.

    Rounded once, they would put 1e-3 of error into an embedding that is subtracted from all but its equal. For the
    student's own probabilities, which the loss itself is not made of, one part is enough.
    """
    return head.product_dtype != head.accumulate_dtype


def _expect(head: Side, weights: Tensor, remainder: Tensor | None, total: Tensor, tile_rows: int, out: Tensor) -> None:
    """Into `out` [R, D]: sum_v p_v W[v], from multiples [R, V] of p that sum to `total` [R]."""
    parts = [weights] if remainder is None else [weights, remainder]
    accumulate = False
    for tile, weight in weight_tiles(head, tile_rows):
        for part in parts:
            multiply_into(out, part[:, tile], weight, accumulate=accumulate)
            accumulate = True
    out.div_(total.unsqueeze(1))


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


def row_losses(call: LossCall, backend: ModuleType, max_bytes: int | None) -> RowLosses:
    """Divergences, with a gradient to the student's hidden states where one is asked for."""
    plan = _plan(call.rows, (call.student,), _loss_row_bytes(call), _LOSS_ROW_VECTORS, backend, max_bytes)
    if torch.is_grad_enabled() and call.student.hidden.requires_grad:
        return RowLosses(*_RowLosses.apply(call.student.hidden, call, plan, backend))
    with torch.no_grad():
        return _forward(call, plan, backend, None, None)


class _RowLosses(torch.autograd.Function):
    """RowLosses(*apply(student_hidden, call, plan, backend)); a gradient flows from the divergence.

    A 16-bit gradient should be rounded once. So the rows that are kept hold the mantissa of what they will probably be
    multiplied by, `call.row_factor` times the slope: what is left is then a power of two, or one times a loss scale.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, call: LossCall, plan: Plan, backend: ModuleType) -> RowLosses:
        student = call.student
        mantissa, _ = torch.frexp(call.row_factor * call.slope)
        mantissa = torch.where(mantissa == 0, 1, mantissa)
        gradient = torch.empty(call.rows, student.hidden_size, dtype=hidden.dtype, device=hidden.device)
        losses = _forward(call, plan, backend, mantissa, gradient)
        save_tensors(ctx, (gradient, mantissa, student.index))
        ctx.hidden_shape, ctx.chunk_rows, ctx.slope = hidden.shape, plan.chunk_rows, call.slope
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(losses.student_entropy)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, None, None, None]:
        refuse_double_backward()
        if upstream is None:
            return None, None, None, None
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
        return gradient.to(rows.dtype), None, None, None


def _forward(
    call: LossCall, plan: Plan, backend: ModuleType, mantissa: Tensor | None, gradient: Tensor | None
) -> RowLosses:
    """Fills `gradient` [M, D] with mantissa (sum_v q_v W[v] - c), where one is given."""
    with torch.autocast(call.student.hidden.device.type, enabled=False):  # its rounding is in the operands already
        return _chunk_loop(call, plan, backend, mantissa, gradient)


def _chunk_loop(
    call: LossCall, plan: Plan, backend: ModuleType, mantissa: Tensor | None, gradient: Tensor | None
) -> RowLosses:
    student, wide, device = call.student, call.student.accumulate_dtype, call.student.hidden.device
    losses = RowLosses(*(torch.empty(call.rows, dtype=wide, device=device) for _ in range(2)))
    chunk_rows = min(plan.chunk_rows, call.rows)
    buffer = torch.empty(chunk_rows, plan.row_stride, dtype=wide, device=device)
    weights_buffer = buffer.view(student.product_dtype)
    numbers = torch.empty(3, chunk_rows, dtype=wide, device=device)
    for start in range(0, call.rows, plan.chunk_rows):
        chunk = slice(start, min(start + plan.chunk_rows, call.rows))
        part = slice(chunk.stop - start), slice(student.vocab_size)
        hidden = to_product_dtype(take_rows(student, chunk.start, chunk.stop), student)
        project(student, hidden, plan.tile_rows, buffer[part])
        maximum, log_sum, total = numbers[:, part[0]]
        backend.normalise_rows(
            buffer[part],
            student,
            call.temperature,
            plan.block_rows,
            maximum=maximum,
            log_sum=log_sum,
            entropy=losses.student_entropy[chunk] if call.statistics else None,
            weights=None if gradient is None else weights_buffer[part],
            total=total,
        )
        chosen = chunk if call.summary_index is None else call.summary_index[chunk]
        embedding, entropy, bias = (x[chosen] for x in call.summary)
        expected = (embedding * hidden).sum(-1).add_(bias).mul_(call.slope)
        # The two large numbers first: what is left of them is exact, and of the size of the rest.
        losses.divergence[chunk] = (maximum - expected).add_(log_sum - entropy).clamp_min_(0)
        if gradient is not None and mantissa is not None:
            rows = torch.empty(len(hidden), student.hidden_size, dtype=wide, device=device)
            _expect(student, weights_buffer[part], None, total, plan.tile_rows, rows)
            gradient[chunk] = rows.sub_(embedding).mul_(mantissa[chunk].unsqueeze(1))
    return losses


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


# ---------------------------------------------------------------------------------------------------------------------
# Workspace

# Whole-call vectors, each M accumulate-dtype numbers: divergence, entropy, row factor and its product with the
# divergence, mantissa and exponent, upstream, and 3 for indices and intermediates.
_LOSS_ROW_VECTORS = 10

# Numbers a row of a chunk: maximum, log-sum, total, and intermediates of the row function and of the divergence.
_CHUNK_NUMBERS = 12


def _summary_row_bytes(call: SummaryCall) -> int:
    """Logits; hidden rows gathered, rounded, widened; the remainder of split probabilities."""
    size, logits = call.head.accumulate_dtype.itemsize, row_stride(call.head.vocab_size)
    remainder = call.head.product_dtype.itemsize * logits if _splits(call.head) else 0
    return size * (logits + 3 * call.teacher.hidden_size + _CHUNK_NUMBERS) + remainder


def _loss_row_bytes(call: LossCall) -> int:
    """Logits; hidden rows gathered, rounded, widened; the summary's rows, their product, the gradient's rows."""
    student = call.student
    numbers = row_stride(student.vocab_size) + 6 * student.hidden_size + _CHUNK_NUMBERS
    return student.accumulate_dtype.itemsize * numbers


def _plan(
    rows: int, sides: tuple[Side, ...], row_bytes: int, vectors: int, backend: ModuleType, max_bytes: int | None
) -> Plan:
    size, device_type = sides[0].accumulate_dtype.itemsize, sides[0].hidden.device.type
    vocab_size = sides[0].vocab_size
    demand = Demand(
        rows=rows,
        vocab_size=vocab_size,
        device_type=device_type,
        fixed_bytes=size * vectors * rows,
        row_bytes=row_bytes,
        # A tile exists as rounded copy and as widened copy.
        tile_row_bytes=2 * size * max((side.hidden_size for side in sides if needs_tiles(side)), default=0),
        block_row_bytes=size * vocab_size * backend.BLOCK_TEMPORARIES,
        block_entries=backend.BLOCK_ENTRIES.get(device_type, backend.BLOCK_ENTRIES["cpu"]),
    )
    return divide(demand, max_bytes)
