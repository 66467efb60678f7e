"""Compare a loss and its gradients with float64, beside what plain torch with float32 logits gives."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Inputs

CHUNK_ENTRIES = 2**27  # logits that exist at once: 1 GiB in float64

# Beyond these a result is wrong, not inaccurate. Logits and log-probabilities rounded to bfloat16, which peers have,
# give a few per cent; a factor, a direction or a slice of the vocabulary that is missing gives tens.
WRONG = {torch.float32: 1e-3, torch.bfloat16: 0.1}


class Wrong(Exception):
    """Say that a result is missing, or further from the right one than its bound."""


class Outcome(NamedTuple):
    loss: Tensor  # []
    hidden: Tensor | None  # [N, D]; None: no gradient asked
    weight: Tensor | None  # [V, D]; None: no gradient asked


def plain_torch(x: Inputs, compute: torch.dtype) -> Outcome:
    """Compute the case's loss and gradients in plain torch, a few rows at a time, everything in `compute`.

    In float32 the gradient of the logits is rounded to the inputs' dtype before its two products, and so are the
    results, as in any torch program.
    """
    case, wants_weight = x.case, x.case.backward and not x.case.frozen_head
    student, student_weight, teacher, teacher_weight = (t.detach() for t in x.gathered())
    student_head, teacher_head = student_weight.to(compute), teacher_weight.to(compute)
    loss = torch.zeros((), dtype=compute, device=student.device)
    hidden = torch.zeros(student.shape, dtype=compute, device=student.device) if case.backward else None
    weight = torch.zeros_like(student_head) if wants_weight else None
    for start in range(0, case.rows, max(CHUNK_ENTRIES // case.vocab, 1)):
        rows = slice(start, start + max(CHUNK_ENTRIES // case.vocab, 1))
        log_q = (student[rows].to(compute) @ student_head.T).log_softmax(-1)
        if x.labels is None:
            log_p = (teacher[rows].to(compute) @ teacher_head.T).log_softmax(-1)
            p = log_p.exp()
            loss += (p * (log_p - log_q)).sum() / case.rows
        else:
            p = F.one_hot(x.labels[rows], case.vocab).to(compute)
            loss -= (p * log_q).sum() / case.rows
        if hidden is None:
            continue
        gradient = (log_q.exp() - p) / case.rows
        if compute != torch.float64:
            gradient = gradient.to(case.dtype).to(compute)
        hidden[rows] = gradient @ student_head
        if weight is not None:
            weight += gradient.T @ student[rows].to(compute)
    if hidden is not None and x.student_index is not None:
        index = x.student_index.to(hidden.device)
        hidden = torch.zeros(x.student.shape, dtype=compute, device=hidden.device).index_copy(0, index, hidden)
    if compute != torch.float64:
        hidden, weight = (t if t is None else t.to(case.dtype) for t in (hidden, weight))
    return Outcome(loss, hidden, weight)


class Problem:
    """Hold a case's tensors and their right answer, each made when it is first asked for."""

    def __init__(self, case: Case, device: str):
        self.case, self.device = case, device

    @cached_property
    def inputs(self) -> Inputs:
        return self.case.inputs(self.device)

    @cached_property
    def exact(self) -> Outcome:
        return plain_torch(self.inputs, torch.float64)

    @cached_property
    def float32_logits_errors(self) -> dict[str, float]:
        return self.errors(plain_torch(self.inputs, torch.float32))

    def errors(self, got: Outcome) -> dict[str, float]:
        """Return the relative error of each part that there is: the norm of its difference from float64 over the norm.

        Raises:
            Wrong: a part is missing.
        """
        errors = {}
        for part, value, exact in zip(Outcome._fields, got, self.exact, strict=True):
            if exact is None:
                continue
            if value is None:
                raise Wrong(f"no gradient of {part}")
            errors[part] = ((value.double() - exact).norm() / exact.norm()).item()
        return errors

    def hold_to_bounds(self, errors: dict[str, float]) -> None:
        """Raise `Wrong` if an error is so large that a figure beside it would mean nothing."""
        for part, error in errors.items():
            if not error <= WRONG[self.case.dtype]:
                raise Wrong(f"relative {'' if part == 'loss' else 'gradient '}error of {part} {error:.1e}")

    def hold_to_plain_torch(self, errors: dict[str, float]) -> None:
        """Raise `Wrong` if our gradients are clearly less accurate than those of plain torch with float32 logits.

        Raises:
            Wrong: a gradient's error is more than twice plain torch's; `tests/linear_kl` says why it is this factor.
        """
        for part in ("hidden", "weight"):
            if part in errors and errors[part] > 2 * self.float32_logits_errors[part]:
                raise Wrong(
                    f"gradient error of {part} {errors[part]:.1e}, twice that of plain torch with float32 logits is "
                    f"{2 * self.float32_logits_errors[part]:.1e}"
                )
