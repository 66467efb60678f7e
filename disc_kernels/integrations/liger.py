"""Replace Liger's fused linear distillation losses by modules of the same names, arguments and defaults.

Only the import changes. Values and gradients are Liger's (0.8.5) up to rounding, with float32 logits also where the
weights have 16 bits; rows whose label is ignored cost nothing. Arguments that tune Liger's own memory, compiler or
rounding (`accum_dtype`, `compiled`, `chunk_size`, `eps`) are taken and have no effect.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from disc_kernels.linear_kl import fused_cross_entropy, fused_suffix_kl


class LigerFusedLinearJSD(nn.Module):
    """Compute the generalised JSD of two heads as `liger_kernel.transformers.LigerFusedLinearJSD` does."""

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.jsd_beta, self.ignore_index, self.temperature = jsd_beta, ignore_index, temperature

    def forward(
        self,
        student_input: Tensor,  # [M, D_s]
        student_weight: Tensor,  # [V, D_s]
        teacher_input: Tensor,  # [M, D_t]
        teacher_weight: Tensor,  # [V, D_t]
        shift_labels: Tensor | None = None,  # [M] int64
    ) -> Tensor:
        mask = None if shift_labels is None else shift_labels != self.ignore_index
        return fused_suffix_kl(  # type: ignore[return-value]
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            mask=mask,
            temperature=self.temperature,
            divergence="jsd",
            beta=self.jsd_beta,
        )


class LigerFusedLinearKLDivLoss(nn.Module):
    """Compute KL(target || student) as `liger_kernel.transformers.LigerFusedLinearKLDivLoss` does.

    `target` is given, so `[M, V]` is not avoided: its logarithm is a copy of the rows that count, in float32. A row
    need not sum to 1: as with Liger it counts `sum(target * (log(target) - log(student)))`, so one of zeros counts 0.
    """

    def __init__(
        self,
        reduction: str = "batchmean",
        ignore_index: int = -100,
        temperature: float = 1.0,
        eps: float = 1e-10,
        accum_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if reduction not in ("batchmean", "mean", "sum"):
            raise ValueError(f"reduction: expected 'batchmean', 'mean' or 'sum', got {reduction!r}")
        self.reduction, self.ignore_index, self.temperature = reduction, ignore_index, temperature

    def forward(
        self,
        student_input: Tensor,  # [M, D]
        student_weight: Tensor,  # [V, D]
        target: Tensor,  # [M, V] probabilities
        shift_labels: Tensor | None = None,  # [M] int64
    ) -> Tensor:
        rows = None
        if shift_labels is not None:
            rows = (shift_labels != self.ignore_index).nonzero().squeeze(1)
            target = target[rows]
        wide = torch.promote_types(target.dtype, torch.float32)
        mass = target.sum(-1, dtype=wide)
        # The teacher's logits are divided by the temperature as well, and these probabilities are at it already.
        logits = target.to(wide).log().mul_(self.temperature).masked_fill_(mass.unsqueeze(1) == 0, 0.0)
        # sum_v q_v (log q_v - log p_v) = mass (KL(q / mass || p) + log mass)
        options: dict[str, Any] = {"row_weight": mass, "temperature": self.temperature, "reduction": "sum"}
        loss: Any = fused_suffix_kl(student_input, student_weight, logits, None, student_index=rows, **options)
        counted = {"batchmean": len(target), "mean": target.numel(), "sum": 1}[self.reduction]
        return (loss + torch.xlogy(mass, mass).sum()) / max(counted, 1)


class LigerFusedLinearJSDLoss(nn.Module):
    """Add cross-entropy and generalised JSD as `liger_kernel.chunked_loss.LigerFusedLinearJSDLoss` does."""

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ):
        super().__init__()
        self.weight_hard_loss, self.weight_soft_loss, self.beta = weight_hard_loss, weight_soft_loss, beta
        self.ignore_index, self.temperature = ignore_index, temperature
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,  # [M, D_s]
        student_weight: Tensor,  # [V, D_s]
        teacher_input: Tensor,  # [M, D_t]
        teacher_weight: Tensor,  # [V, D_t]
        true_labels: Tensor,  # [M] int64
        student_bias: Tensor | None = None,  # [V]
        teacher_bias: Tensor | None = None,  # [V]
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        hard: Any = 0.0
        if self.weight_hard_loss or self.return_soft_hard_loss:
            hard = fused_cross_entropy(
                student_input, student_weight, true_labels, ignore_index=self.ignore_index, bias=student_bias
            )
        missing = len(teacher_weight) - len(student_weight)
        if missing > 0:  # as Liger does: a student's missing entries have logits of 0, and count
            student_weight = pad(student_weight, (0, 0, 0, missing))
            student_bias = None if student_bias is None else pad(student_bias, (0, missing))
        soft: Any = fused_suffix_kl(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            mask=true_labels != self.ignore_index,
            temperature=self.temperature,
            divergence="jsd",
            beta=self.beta,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
        )
        loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
        return (loss, soft, hard) if self.return_soft_hard_loss else loss
