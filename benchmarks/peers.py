"""Call the systems that are measured: each function prepares what is not timed, and returns the call that is.

The call computes the mean forward KL over the rows that are compared, at temperature 1, in nats, or the mean
cross-entropy where there are labels.

Peers run with their own defaults, as a user would call them. None but ours takes row indices, so they are given
gathered rows (gathered within the timed call), which costs them less than the label masks some offer: a masked row is
projected all the same.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy import Wrong
from benchmarks.cases import Inputs
from disc_kernels import fused_cross_entropy, fused_suffix_kl

Call = Callable[[], Any]  # gives a Tensor []
PRODUCT_ROWS = 8192  # rows of logits that the products alone write at once; more would not be faster, only larger


class NotAvailable(Exception):
    """Say that a system that is installed cannot run on this machine."""


def reason(error: Exception) -> str:
    """Say in one line why there is no measurement."""
    if isinstance(error, ImportError):
        return f"not installed: {error}"
    if isinstance(error, NotAvailable):
        return f"not available: {error}"
    if isinstance(error, Wrong):
        return f"wrong: {error}"
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    return f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def products(x: Inputs) -> Callable[[], None]:
    """Compute the limit: the case's matrix products and nothing else, operands and results in the inputs' dtype."""
    case = x.case
    student, weight, teacher, teacher_weight = (
        t.detach() for t in (x.student, x.student_weight, x.teacher, x.teacher_weight)
    )
    logits = student.new_empty(min(case.rows, PRODUCT_ROWS), case.vocab)
    hidden_gradient, weight_gradient = torch.empty_like(student), torch.empty_like(weight)

    def run() -> None:
        for first in range(0, case.teacher_rows, PRODUCT_ROWS):
            rows = teacher[first : min(first + PRODUCT_ROWS, case.teacher_rows)]
            torch.mm(rows, teacher_weight.T, out=logits[: len(rows)])
        for first in range(0, case.rows, PRODUCT_ROWS):
            chunk = slice(first, min(first + PRODUCT_ROWS, case.rows))
            z = logits[: chunk.stop - first]
            torch.mm(student[chunk], weight.T, out=z)
            if case.backward:
                torch.mm(z, weight, out=hidden_gradient[chunk])
            if case.backward and not case.frozen_head:
                torch.mm(z.T, student[chunk], out=weight_gradient)

    return run


def ours(x: Inputs) -> Call:
    tensors = x.student, x.student_weight, x.teacher, x.teacher_weight
    indices = {"student_index": x.student_index, "teacher_index": x.teacher_index}
    return lambda: fused_suffix_kl(*tensors, **indices, impl=_impl(x))


def ours_one_head(x: Inputs) -> Call:
    """Give one tensor as both heads, as where adapters are trained: in float32 hidden states are then subtracted."""
    return lambda: fused_suffix_kl(x.student, x.student_weight, x.teacher, x.student_weight, impl=_impl(x))


def ours_expected_embedding(x: Inputs) -> Call:
    from disc_kernels import expected_embedding_kl, teacher_summary

    impl = _impl(x)
    summary = teacher_summary(x.teacher, x.teacher_weight, x.student_weight, teacher_index=x.teacher_index, impl=impl)
    return lambda: expected_embedding_kl(x.student, x.student_weight, summary, student_index=x.student_index, impl=impl)


def ours_cross_entropy(x: Inputs) -> Call:
    return lambda: fused_cross_entropy(x.student, x.student_weight, x.labels, impl=_impl(x))


def eager_cross_entropy(x: Inputs) -> Call:
    return lambda: F.cross_entropy((x.student @ x.student_weight.T).float(), x.labels)


def torch_linear_cross_entropy(x: Inputs) -> Call:
    """Call PyTorch's own, which chooses its chunks; without `options` it would be eager."""
    if not hasattr(F, "linear_cross_entropy"):
        raise NotAvailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda: F.linear_cross_entropy(x.student, x.student_weight, x.labels, options=options)


def liger_cross_entropy(x: Inputs) -> Call:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    _require_cuda(x)
    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: loss(x.student_weight, x.student, x.labels)


def full_logits(student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    """Compute the loss as a trainer without any of these libraries does, from all logits, widened to float32."""
    log_q = F.log_softmax((student @ student_weight.T).float(), dim=-1)
    with torch.no_grad():
        log_p = F.log_softmax((teacher @ teacher_weight.T).float(), dim=-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def eager(x: Inputs) -> Call:
    return lambda: full_logits(*x.gathered())


def eager_compiled(x: Inputs) -> Call:
    _require_compiler(x)
    torch.compiler.reset()  # a shape seen before must not make this one dynamic
    loss = torch.compile(full_logits)
    return lambda: loss(*x.gathered())


def liger_fused(x: Inputs) -> Call:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    _require_cuda(x)
    loss = LigerFusedLinearJSD(jsd_beta=0.0)
    return lambda: loss(*x.gathered(), None)


def liger_kl_div(x: Inputs) -> Call:
    """Call Liger's loss for a teacher given as `[M, V]` probabilities, which are made here from its hidden states."""
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    _require_cuda(x)
    loss = LigerFusedLinearKLDivLoss()

    def call() -> Tensor:
        student, student_weight, teacher, teacher_weight = x.gathered()
        with torch.no_grad():
            target = (teacher @ teacher_weight.T).softmax(dim=-1, dtype=torch.float32)
        return loss(student, student_weight, target)

    return call


def liger_chunked(x: Inputs) -> Call:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    _require_compiler(x)
    torch.compiler.reset()
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    labels = torch.zeros(x.case.rows, dtype=torch.int64, device=x.student.device)
    return lambda: loss(*x.gathered(), labels)


def trl_chunked(x: Inputs) -> Call:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss() -> Tensor:
        student, student_weight, teacher, teacher_weight = x.gathered()
        each, _ = ChunkedDivergenceFunction.apply(student, student_weight, None, teacher, teacher_weight, None, 0.0)
        return each.mean()

    return loss


def fla_fused(x: Inputs) -> Call:
    _require_cuda(x)  # before the import, which warns of a missing GPU
    from fla.modules import FusedKLDivLoss

    loss = FusedKLDivLoss()

    def call() -> Tensor:
        student, student_weight, teacher, teacher_weight = x.gathered()
        return loss(student, teacher, student_weight, teacher_weight)

    return call


def orda(x: Inputs) -> Call:
    from orda_kernel import SeparateTeacher, distillation_loss

    _require_cuda(x)  # elsewhere it is plain torch
    backend = "torch" if x.case.rehearsal else "triton"
    labels = torch.zeros(x.case.rows, dtype=torch.int64, device=x.student.device)
    weights = {"student_ce_weight": 0.0, "teacher_ce_weight": 0.0, "kl_weight": 1.0}

    def call() -> Tensor:
        student, student_weight, teacher, teacher_weight = x.gathered()
        head = SeparateTeacher(hidden=teacher, weight=teacher_weight)
        return distillation_loss(student, student_weight, labels, head, **weights, backend=backend).loss

    return call


def _impl(x: Inputs) -> str | None:
    """Leave the choice to ours, which takes Triton for CUDA tensors; in a rehearsal take Triton on the CPU too."""
    return "triton" if x.case.rehearsal else None


def _require_cuda(x: Inputs) -> None:
    if x.student.device.type != "cuda" and not x.case.rehearsal:
        raise NotAvailable("needs CUDA")


def _require_compiler(x: Inputs) -> None:
    """Raise `NotAvailable` without the C++ compiler that torch.compile needs on the CPU; on CUDA it needs Triton."""
    if x.student.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise NotAvailable("no C++ compiler")
