"""What is compared with what: the one description of a call that every implementation is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its head's output z (bias included): `softcap * tanh(scale * z / softcap)`, or `scale * z`.

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


class SuffixKLStats(NamedTuple):
    """Per-row statistics, each `[M]`, float32 (float64 for float64 inputs), detached.

    `divergence` in nats, at temperature T, not multiplied by the row's weight; `student_entropy` and `teacher_entropy`
    in nats, of softmax(logits / T); `agreement` 1.0 where both put their largest logit on the same entry, else 0.0.
    """

    divergence: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor


@dataclass(frozen=True)
class Side:
    """One model's half of the comparison."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [V_side, D]
    bias: Tensor | None  # [V_side]
    index: Tensor | None  # [M] int64, rows of hidden.flatten(0, -2); None: all of them, in order
    transform: LogitTransform
    operand_dtype: torch.dtype  # what hidden and weight are rounded to before they are multiplied
    accumulate_dtype: torch.dtype  # of logits, statistics, losses and sums of gradients
    vocab_size: int  # the first entries, those that are compared

    @property
    def product_dtype(self) -> torch.dtype:
        """What the matrix product is given, after rounding to `operand_dtype`."""
        sixteen_bit = self.operand_dtype in (torch.float16, torch.bfloat16)
        tensor_cores = self.hidden.is_cuda and sixteen_bit and self.accumulate_dtype == torch.float32
        return self.operand_dtype if tensor_cores else self.accumulate_dtype

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    @property
    def hidden_rows(self) -> int:
        return math.prod(self.hidden.shape[:-1])


def _same_memory(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.data_ptr() == b.data_ptr() and (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())


@dataclass(frozen=True)
class Problem:
    """M student rows, each compared with one teacher row over the first `vocab_size` entries."""

    student: Side
    teacher: Side
    rows: int  # M
    row_weight: Tensor | None  # [M]
    temperature: float
    divergence: str
    beta: float
    reduction: str
    sharded: bool = False  # whether the entries are one rank's shard of the vocabulary

    def tensors(self) -> tuple[Tensor | None, ...]:
        s, t = self.student, self.teacher
        return s.hidden, s.weight, s.bias, s.index, t.hidden, t.weight, t.bias, t.index, self.row_weight

    def with_tensors(self, tensors: Sequence[Any]) -> Problem:
        """The same problem on what `tensors()` gave, or with all of them None while autograd keeps them."""

        def side(old: Side, hidden: Any, weight: Any, bias: Any, index: Any) -> Side:
            return replace(old, hidden=hidden, weight=weight, bias=bias, index=index)

        student, teacher = side(self.student, *tensors[:4]), side(self.teacher, *tensors[4:8])
        return replace(self, student=student, teacher=teacher, row_weight=tensors[8])

    @property
    def one_head(self) -> bool:
        """Whether z_s - z_t can be computed as (h_s - h_t) W^T, which cancels nothing.

        It is as exact as its own size allows, where a difference of logits is as exact as theirs.

        Both sides must have one weight and do the same, linear thing to its product. Where products take 16-bit
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
    def device(self) -> torch.device:
        return self.student.hidden.device

    @property
    def vocab_size(self) -> int:
        return self.student.vocab_size

    @property
    def accumulate_dtype(self) -> torch.dtype:
        return self.student.accumulate_dtype
