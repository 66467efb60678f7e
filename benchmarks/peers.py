"""Who is measured: each a function of the four tensors, mean forward KL over rows at temperature 1, in nats."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from disc_kernels import fused_suffix_kl

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ours() -> Loss:
    return fused_suffix_kl  # type: ignore[return-value]


def eager() -> Loss:
    """Full float32 logits and softmaxes, as a trainer without this library would write it."""

    def loss(student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        log_q = F.log_softmax((student @ student_weight.T).float(), dim=-1)
        with torch.no_grad():
            log_p = F.log_softmax((teacher @ teacher_weight.T).float(), dim=-1)
        return F.kl_div(log_q, log_p, log_target=True, reduction="sum") / student.shape[0]

    return loss


def liger_chunked() -> Loss:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)

    def loss(student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        labels = torch.zeros(student.shape[0], dtype=torch.int64, device=student.device)
        return module(student, student_weight, teacher, teacher_weight, labels)

    return loss


def liger_fused() -> Loss:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.0)


def trl_chunked() -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        return ChunkedDivergenceFunction.apply(student, student_weight, None, teacher, teacher_weight, None, 0.0)[
            0
        ].mean()

    return loss


EVERYWHERE = (ours, eager, liger_chunked, trl_chunked)
ON_CUDA_ONLY = (liger_fused,)
