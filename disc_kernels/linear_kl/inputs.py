"""Hold the arguments of a call as they were given, and the checked problem that they pose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from disc_kernels.linear_kl.teacher_rows import TeacherRows


@dataclass(frozen=True)
class LogitTransform:
    """Describe a model's transform of its head's output z: `softcap * tanh(scale * z / softcap)`, or `scale * z`.

    Args:
        scale: finite factor on the logits (Cohere's `logit_scale`; `1 / logits_scaling` for Granite).
        softcap: positive bound of the logits (Gemma 2's `final_logit_softcapping`), or None for no bound.

    Raises:
        TypeError: an argument is not a number.
        ValueError: `scale` is zero or not finite, or `softcap` is not positive and finite.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("scale", self.scale), ("softcap", self.softcap)):
            if value is None and name == "softcap":
                continue
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"LogitTransform: {name} must be a number, got {type(value).__name__}")
            object.__setattr__(self, name, float(value))  # NumPy's numbers and fractions too
        if not 0 < abs(self.scale) < math.inf:
            raise ValueError(f"LogitTransform: scale must be finite and not zero, got {self.scale}")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"LogitTransform: softcap must be positive and finite, or None, got {self.softcap}")


class OutputHead(NamedTuple):
    """Hold a model's output head: its logits are `transform(hidden @ weight.T + bias)[..., :vocab_size]`.

    It may stand wherever a loss takes a weight, and brings the rest with it. `disc_kernels.hf.output_head` reads it
    from a Hugging Face model.

    Attributes:
        weight: `[V, D]`.
        bias: `[V]` or None.
        transform: what the model does to the product.
        vocab_size: how many entries are logits, at most V; None: all.
    """

    weight: Tensor
    bias: Tensor | None = None
    transform: LogitTransform = LogitTransform()
    vocab_size: int | None = None


class SuffixKLStats(NamedTuple):
    """Hold statistics of each row, each `[M]`, float32 (float64 for float64 inputs), detached.

    Attributes:
        divergence: nats, at temperature T, not multiplied by the row's weight.
        student_entropy: nats, of the student's softmax(logits / T).
        teacher_entropy: nats, of the teacher's.
        agreement: 1.0 where both put their largest logit on the same entry, else 0.0.
    """

    divergence: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor


@dataclass(frozen=True)
class SuffixKLInputs:
    """Hold the arguments of one `fused_suffix_kl` call, but for its group, before any check.

    Tensors come first, and among them those that may require a gradient: the order of the operator in `compile.py`,
    which takes its schema from these annotations.
    """

    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_hidden: Tensor
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    topk_ids: Tensor | None  # then `teacher_hidden` are their log-probabilities, and there is no `teacher_weight`
    student_index: Tensor | None
    teacher_index: Tensor | None
    row_weight: Tensor | None
    mask: Tensor | None
    temperature: float
    divergence: str
    beta: float
    reduction: str
    student_transform: LogitTransform | None
    teacher_transform: LogitTransform | None
    vocab_size: int | None
    max_workspace_bytes: int | None
    return_stats: bool
    impl: str | None
    tail: str  # of `topk_ids`
    autocast_dtype: torch.dtype | None  # of the autocast that is on around the call


@dataclass(frozen=True)
class Projection:
    """Hold one model's hidden rows and the head that projects them to logits, checked."""

    hidden: Tensor  # [..., D]; where the logits themselves were given, these: [..., vocab_size]; of a top k [..., K]
    weight: Tensor  # [V_model, D]; [vocab_size, 0] for given logits, [K, 0] for a top k
    bias: Tensor | None  # [V_model]
    index: Tensor | None  # [M] int64, rows of hidden.flatten(0, -2); None: all of them, in order
    transform: LogitTransform
    operand_dtype: torch.dtype  # what hidden and weight are rounded to before they are multiplied
    accumulate_dtype: torch.dtype  # of logits, statistics, losses and sums of gradients
    vocab_size: int  # the first entries, those that are compared
    ids: Tensor | None = None  # [..., K] the entries of a top k, of which `hidden` holds the log-probabilities
    copied: bool = False  # whether the weight is a copy that was made to be multiplied: rounded, widened, in order

    @property
    def product_dtype(self) -> torch.dtype:
        """Return the dtype that the matrix product is given, after rounding to `operand_dtype`."""
        sixteen_bit = self.operand_dtype in (torch.float16, torch.bfloat16)
        tensor_cores = self.hidden.is_cuda and sixteen_bit and self.accumulate_dtype == torch.float32
        return self.operand_dtype if tensor_cores else self.accumulate_dtype

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    @property
    def is_given(self) -> bool:
        """Return whether `hidden` holds logits, which no head has to project."""
        return self.weight.shape[1] == 0

    @property
    def hidden_rows(self) -> int:
        return math.prod(self.hidden.shape[:-1])

    @property
    def rows(self) -> int:
        """Return the number of rows that are compared, M."""
        return self.hidden_rows if self.index is None else self.index.shape[0]


@dataclass(frozen=True)
class Problem:
    """Hold M student rows, each compared with one teacher row over the first `vocab_size` entries."""

    student: Projection
    teacher: Projection
    teacher_rows: TeacherRows  # the order of the M rows, and which teacher rows are projected
    row_weight: Tensor | None  # [M]
    temperature: float
    divergence: str
    beta: float
    reduction: str
    statistics: bool  # whether more than the divergence is asked for
    sharded: bool  # whether the entries are one rank's shard of the vocabulary
    tail: str  # of a top k

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the tensors that autograd holds until the backward."""
        s, t = self.student, self.teacher
        return s.hidden, s.weight, s.bias, s.index, t.hidden, t.weight, t.bias, t.index, self.row_weight, t.ids

    def with_tensors(self, tensors: Sequence[Any]) -> Problem:
        """Replace the tensors that `tensors()` returned; by None for all while autograd holds them."""

        names = ("hidden", "weight", "bias", "index")
        student = replace(self.student, **dict(zip(names, tensors[:4], strict=True)))
        teacher = replace(self.teacher, **dict(zip(names, tensors[4:8], strict=True)), ids=tensors[9])
        return replace(self, student=student, teacher=teacher, row_weight=tensors[8])

    def with_teacher_rows(self, teacher_rows: TeacherRows) -> Problem:
        """Project these teacher rows; sort the problem's rows as they say."""
        order = teacher_rows.order
        if order is None:
            return replace(self, teacher_rows=teacher_rows)
        student, teacher, weight = self.student, self.teacher, self.row_weight
        assert teacher.index is not None
        return replace(
            self,
            student=replace(student, index=order if student.index is None else student.index[order]),
            teacher=replace(teacher, index=teacher.index[order]),
            teacher_rows=teacher_rows,
            row_weight=None if weight is None else weight[order],
        )

    @property
    def one_head(self) -> bool:
        """Return whether z_s - z_t can be computed as (h_s - h_t) W^T, which cancels nothing.

        It is as exact as its own size allows, where a difference of logits is as exact as theirs.

        Both models must have one weight and do the same, linear thing to its product. Where products take 16-bit
        operands the difference of two hidden states would be rounded, which costs more than it saves. Ranks that share
        a vocabulary would have one more number a row to send.
        """
        s, t = self.student, self.teacher
        return (
            not self.sharded
            and _same_memory(s.weight, t.weight)
            and _same_memory(s.bias, t.bias)
            and s.transform == t.transform
            and s.transform.softcap is None
            and s.operand_dtype == t.operand_dtype
            and s.product_dtype == s.accumulate_dtype
        )

    @property
    def rows(self) -> int:
        """Return the number of rows that are compared, M."""
        return self.student.rows

    @property
    def device(self) -> torch.device:
        return self.student.hidden.device

    @property
    def vocab_size(self) -> int:
        return self.student.vocab_size

    @property
    def accumulate_dtype(self) -> torch.dtype:
        return self.student.accumulate_dtype


def _same_memory(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.data_ptr() == b.data_ptr() and (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
