"""What the frozen-head form computes and with what means: its two calls, planned for one rank or a shard of many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from disc_kernels.linear_kl.inputs import Side
from disc_kernels.linear_kl.products import needs_tiles
from disc_kernels.linear_kl.ranks.group import VocabGroup
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

    @property
    def head_rows(self) -> dict[str, int]:
        return {"student_weight": self.head.weight.shape[0], "teacher_weight": self.teacher.weight.shape[0]}

    def of_entries(self, entries: int) -> SummaryCall:
        teacher, head = (replace(side, vocab_size=entries) for side in (self.teacher, self.head))
        return replace(self, teacher=teacher, head=head)


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

    @property
    def head_rows(self) -> dict[str, int]:
        return {"student_weight": self.student.weight.shape[0]}

    def of_entries(self, entries: int) -> LossCall:
        return replace(self, student=replace(self.student, vocab_size=entries))


C = TypeVar("C", SummaryCall, LossCall)


@dataclass(frozen=True)
class Planned(Generic[C]):
    """A call with how it is to be computed."""

    call: C
    backend: ModuleType  # whose `normalise_rows` is that of rows_torch.py
    plan: Plan
    group: VocabGroup | None

    @property
    def head_rows(self) -> dict[str, int]:
        return self.call.head_rows

    @property
    def chunk_rows(self) -> int:
        return self.plan.chunk_rows

    def divided(self, entries: int, chunk_rows: int) -> Planned[C]:
        """Of the first `entries` entries of the heads, in chunks of so many rows."""
        return replace(self, call=self.call.of_entries(entries), plan=replace(self.plan, chunk_rows=chunk_rows))

    def normalise(
        self,
        logits: Tensor,  # [R, V] head outputs, see rows_torch.py for these three
        side: Side,
        weights: Tensor | None,  # [R, V]
        remainder: Tensor | None = None,  # [R, V]
        *,
        entropy: bool = True,
        other_bias: Tensor | None = None,  # [>= V]
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """Softmax in place.

        Returns:
            What waits for the other ranks, so that there can be a product before, and gives: a row's maximum, log-sum,
            entropy and expected bias, `[4, R]`, the first NaN where no entry is possible; and `[R]`, what `weights`
            must be divided by to be probabilities of the whole vocabulary.
        """
        numbers = torch.zeros(4, len(logits), dtype=logits.dtype, device=logits.device)
        maximum, log_sum, entropies, bias = numbers
        total = torch.zeros_like(maximum)
        if side.vocab_size > 0:
            self.backend.normalise_rows(
                logits,
                side,
                self.call.temperature,
                self.plan.block_rows,
                maximum=maximum,
                log_sum=log_sum,
                entropy=entropies if entropy else None,
                weights=weights,
                remainder=remainder,
                total=total,
                other_bias=other_bias,
                expected_bias=None if other_bias is None else bias,
            )
        else:
            numbers[:2] = -torch.inf
        if self.group is None:
            maximum.masked_fill_(maximum == -torch.inf, torch.nan)
            return lambda: (numbers, total)
        merge = self.group.start_merging(numbers)

        def merged() -> tuple[Tensor, Tensor]:
            whole, share = merge()
            return whole, torch.where(share == 0, torch.inf, total / share)

        return merged


def splits(head: Side) -> bool:
    """Whether probabilities go to the product in two parts, because it takes 16-bit operands.

    Rounded once, they would put 1e-3 of error into an embedding that is subtracted from all but its equal. For the
    student's own probabilities, which the loss itself is not made of, one part is enough.
    """
    return head.product_dtype != head.accumulate_dtype


# Whole-call vectors, each M accumulate-dtype numbers: divergence, entropy, row factor and its product with the
# divergence, mantissa and exponent, upstream, and 3 for indices and intermediates.
_LOSS_ROW_VECTORS = 10

# Numbers a row of a chunk: maximum, log-sum, entropy, bias, total, and intermediates of the row function and of the
# divergence.
_CHUNK_NUMBERS = 14


def plan_summary(
    call: SummaryCall, backend: ModuleType, max_bytes: int | None, group: VocabGroup | None
) -> Planned[SummaryCall]:
    head, size = call.head, call.head.accumulate_dtype.itemsize
    # Logits; hidden rows gathered, rounded, widened; the remainder of split probabilities.
    logits = row_stride(head.vocab_size)
    row_bytes = size * (logits + 3 * call.teacher.hidden_size + _CHUNK_NUMBERS + _exchanged(group))
    row_bytes += head.product_dtype.itemsize * logits if splits(head) else 0
    plan = _plan(call.rows, (call.teacher, head), row_bytes, 0, backend, max_bytes)
    return Planned(call, backend, plan, group)


def plan_loss(
    call: LossCall, backend: ModuleType, max_bytes: int | None, group: VocabGroup | None
) -> Planned[LossCall]:
    student = call.student
    # Logits; hidden rows gathered, rounded, widened; the summary's rows, their product, the gradient's rows. With a
    # group the rows of two chunks.
    rows = 6 if group is None else 8
    numbers = row_stride(student.vocab_size) + rows * student.hidden_size + _CHUNK_NUMBERS + _exchanged(group)
    row_bytes = student.accumulate_dtype.itemsize * numbers
    plan = _plan(call.rows, (student,), row_bytes, _LOSS_ROW_VECTORS, backend, max_bytes)
    return Planned(call, backend, plan, group)


def _exchanged(group: VocabGroup | None) -> int:
    """Numbers a row that are gathered from all ranks, and what merges them, some of it in float64."""
    return 0 if group is None else 18 * group.ranks + 10


def _plan(
    rows: int, sides: tuple[Side, ...], row_bytes: int, vectors: int, backend: ModuleType, max_bytes: int | None
) -> Plan:
    size, device_type = sides[0].accumulate_dtype.itemsize, sides[0].hidden.device.type
    vocab_size = sides[0].vocab_size
    demand = Demand(
        rows=rows,
        vocab_size=max(vocab_size, 1),  # a rank's shard may be empty
        device_type=device_type,
        fixed_bytes=size * vectors * rows,
        row_bytes=row_bytes,
        # A tile exists as rounded copy and as widened copy.
        tile_row_bytes=2 * size * max((side.hidden_size for side in sides if needs_tiles(side)), default=0),
        block_row_bytes=size * vocab_size * backend.BLOCK_TEMPORARIES,
        block_entries=backend.BLOCK_ENTRIES.get(device_type, backend.BLOCK_ENTRIES["cpu"]),
    )
    return divide(demand, max_bytes)
