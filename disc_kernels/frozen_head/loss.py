"""Compute forward KL to a student whose head is frozen, from a summary of the teacher's rows; see `summary.py`.

With a frozen head a row's gradient is a multiple of what its own forward gives, whatever the reduction. So the forward
keeps those rows, `[M, D]` numbers, and every backward multiplies them by its upstream gradient: nothing is computed
again.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from disc_kernels.autocast import autocast_dtype
from disc_kernels.frozen_head.graph_break import outside_graphs
from disc_kernels.frozen_head.inputs import LossInputs, LossProblem, TeacherSummary
from disc_kernels.frozen_head.softmax import normalise, numbers_per_row, projected_chunks
from disc_kernels.frozen_head.validation import check_frozen_head, check_loss_inputs
from disc_kernels.linear_kl.function import refuse_double_backward, save_tensors, saved_tensors
from disc_kernels.linear_kl.inputs import OutputHead, SuffixKLStats
from disc_kernels.linear_kl.products import multiply_weights, with_copied_weight
from disc_kernels.linear_kl.ranks.agreement import agree
from disc_kernels.linear_kl.ranks.dtensor import local_tensors, vocabulary_group
from disc_kernels.linear_kl.ranks.group import PendingSum, VocabGroup
from disc_kernels.linear_kl.reduction import weighted_sum
from disc_kernels.linear_kl.reference import reference_entropy, reference_logits, reference_rows
from disc_kernels.linear_kl.rows import choose_implementation, load_backend
from disc_kernels.linear_kl.validation import check_entries
from disc_kernels.linear_kl.workspace import Plan, divide_workspace, row_stride

# Whole-call vectors, each M accumulate-dtype numbers: divergence, entropy, row factor and its product with the
# divergence, mantissa and exponent, upstream, and 3 for indices and intermediates.
_ROW_VECTORS = 10


@outside_graphs
def expected_embedding_kl(
    student_hidden: Tensor,  # [..., D_s]
    student_weight: Tensor | OutputHead,  # [V_s, D_s]
    summary: TeacherSummary,
    *,
    student_index: Tensor | None = None,  # [M] int64
    summary_index: Tensor | None = None,  # [M] int64
    row_weight: Tensor | None = None,  # [M]
    temperature: float = 1.0,
    reduction: str = "mean",
    student_bias: Tensor | None = None,  # [V_s]
    student_scale: float = 1.0,
    vocab_size: int | None = None,
    vocab_group: Any = None,
    max_workspace_bytes: int | None = None,
    return_stats: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, SuffixKLStats]:
    """Compute KL(teacher || student) of a student with a frozen head from `teacher_summary`, without approximation.

    Equal to, but without ever holding the `[M, V]` logits or probabilities:

        h = student_hidden.flatten(0, -2)[student_index]
        c, entropy, bias = (x[summary_index] for x in summary)
        z = student_scale * (h @ student_weight.T + student_bias)[:, :vocab_size] / temperature
        d = logsumexp(z, -1) - student_scale * ((c * h).sum(-1) + bias) / temperature - entropy     # nats
        loss = (row_weight * d).sum() / row_weight.sum()     # reduction="mean"

    This is `fused_suffix_kl(divergence="forward_kl")` of the teacher that was summarised, for half of its products.
    Temperature, head, bias and `vocab_size` must be those the summary was made with (and autocast too, where it rounds
    the head): a summary of something else cannot be told from a right one. `student_scale`, and hidden states, may
    change. The KL is a difference of large numbers here: its absolute error is a few roundings of the largest logit
    (1e-6 nats at logits of 10, 1e-5 at 60), where `fused_suffix_kl` has a relative error. It is never negative. Nor is
    the gradient q - p, but a difference of two rows: 16-bit operands on CUDA round q, not q - p, so where the models
    nearly agree the gradient has a larger relative error than that of `fused_suffix_kl`.

    Args:
        student_hidden: `[..., D_s]`, float16, bfloat16, float32 or float64; its rows are those of `flatten(0, -2)`.
        student_weight: `[V_s, D_s]`, the dtype of `student_hidden` or a wider one (any under autocast); frozen.
            Or an `OutputHead` without a softcap, a whole head in place of `student_bias` and `student_scale`.
        summary: of `teacher_summary`: `TeacherSummary(embedding [S, D_s], entropy [S], bias [S])`, float32 or float64.
        student_index: as for `fused_suffix_kl`.
        summary_index: `[M]` int64, the summary row each student row is compared with; None: all. Rows may repeat.
        row_weight: as for `fused_suffix_kl`.
        temperature: as for `fused_suffix_kl`.
        reduction: as for `fused_suffix_kl`.
        student_bias: `[V_s]`; frozen. An entry of -inf takes the entry out of the student's distribution.
        student_scale: finite factor on the student's logits, not 0.
        vocab_size: the first `vocab_size` entries only.
        vocab_group: as for `fused_suffix_kl`, DTensors too: head and bias are this rank's shard, everything else is the
            same on every rank. Each sends 4 numbers a row and, once, the rows of the hidden gradient before they are
            rounded.
        max_workspace_bytes: as for `fused_suffix_kl`, and beyond the gradient's rows, `[M, D_s]`, which are kept for
            the backward.
        return_stats: also return `SuffixKLStats`, each `[M]`, detached. A summary does not know the teacher's most
            likely entry: `agreement` is NaN. `teacher_entropy` is the summary's.
        impl: as for `fused_suffix_kl`.

    Returns:
        The loss in nats, a scalar or, for "none", `[M]`; float32, or float64 where an input is. With M = 0 a zero (an
        empty `[0]`) still connected to the graph. With `return_stats`, `(loss, stats)`.

        The gradient goes to `student_hidden` only. Its rows are computed in the forward, whatever the reduction; every
        backward multiplies them by what it is given. Unlike `fused_suffix_kl` this is no operator of `torch.compile`:
        it breaks a compiled graph, and `fullgraph=True` refuses it.

    Raises:
        ValueError: the head requires a gradient while gradients are recorded: train it with `fused_suffix_kl`.
        TypeError, ValueError: else as for `fused_suffix_kl`.
        RuntimeError: when the backward is differentiated; with a `vocab_group`, as for `fused_suffix_kl`.
    """
    student_weight, student_bias, student_scale, entries = check_frozen_head(
        student_weight, student_bias, student_scale
    )
    inputs = LossInputs(
        student_hidden=student_hidden,
        student_weight=student_weight,
        student_bias=student_bias,
        summary=summary,
        student_index=student_index,
        summary_index=summary_index,
        row_weight=row_weight,
        temperature=temperature,
        reduction=reduction,
        student_scale=student_scale,
        vocab_size=check_entries(vocab_size, entries),
        max_workspace_bytes=max_workspace_bytes,
        return_stats=return_stats,
        impl=impl,
        autocast_dtype=autocast_dtype(student_hidden),
    )
    vocab_group = vocabulary_group(inputs, vocab_group)
    if vocab_group is not None:
        problem, plan = agree(vocab_group, inputs, _prepare)
        divergence, student_entropy = _row_losses(problem, plan)
    else:
        inputs = local_tensors(inputs, None)
        if impl == "reference":
            problem = check_loss_inputs(inputs)
            divergence, student_entropy = _reference(problem)
        else:
            problem, plan = _prepare(inputs)
            divergence, student_entropy = _row_losses(problem, plan)
    loss = divergence if reduction == "none" else weighted_sum(divergence, problem.row_factor)
    return (loss, _stats(problem, divergence, student_entropy)) if return_stats else loss


def _prepare(inputs: LossInputs, group: VocabGroup | None = None) -> tuple[LossProblem, Plan]:
    """Check the inputs, choose the row functions, divide the workspace."""
    problem = check_loss_inputs(inputs, sharded=group is not None)
    student = problem.student
    wide, device = student.accumulate_dtype, student.hidden.device
    backend = load_backend(choose_implementation(inputs.impl, device, wide, sharded=group is not None))
    # Logits; hidden rows gathered, rounded, widened; the summary's rows, their product, the gradient's rows. With a
    # group the rows of two chunks.
    hidden_rows = 6 if group is None else 8
    numbers = row_stride(student.vocab_size) + hidden_rows * student.hidden_size + numbers_per_row(group)
    fixed_bytes = wide.itemsize * _ROW_VECTORS * student.rows
    row_bytes = (wide.itemsize * numbers, 0)
    return problem, divide_workspace(
        inputs.max_workspace_bytes, student.rows, (student,), fixed_bytes, row_bytes, backend, group
    )


def _row_losses(problem: LossProblem, plan: Plan) -> tuple[Tensor, Tensor]:
    """Compute divergences and student entropies, [M]; record the hidden states' gradient where they need one."""
    hidden = problem.student.hidden
    if torch.is_grad_enabled() and hidden.requires_grad:
        divergence, student_entropy = _RowLosses.apply(hidden, problem, plan)
        return divergence, student_entropy
    with torch.no_grad():
        return _run_chunks(problem, plan, None, None)


class _RowLosses(torch.autograd.Function):
    """Compute (divergence, student_entropy) = apply(student_hidden, problem, plan), the first with a gradient.

    A 16-bit gradient should be rounded once. So the rows that are kept hold the mantissa of what they will probably be
    multiplied by, `row_factor` times `logit_factor`: what is left is then a power of two, or one times a loss scale.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, problem: LossProblem, plan: Plan) -> tuple[Tensor, Tensor]:
        student = problem.student
        mantissa, _ = torch.frexp(problem.row_factor * problem.logit_factor)
        mantissa = torch.where(mantissa == 0, 1, mantissa)
        gradient = torch.empty(student.rows, student.hidden_size, dtype=hidden.dtype, device=hidden.device)
        divergence, student_entropy = _run_chunks(problem, plan, mantissa, gradient)
        save_tensors(ctx, (gradient, mantissa, student.index))
        ctx.hidden_shape, ctx.chunk_rows, ctx.logit_factor = hidden.shape, plan.chunk_rows, problem.logit_factor
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(student_entropy)
        return divergence, student_entropy

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, None, None]:
        refuse_double_backward()
        if upstream is None:
            return None, None, None
        rows, mantissa, index = saved_tensors(ctx)
        assert rows is not None and mantissa is not None
        factor = (upstream * ctx.logit_factor / mantissa).unsqueeze(1)
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
        return gradient.to(rows.dtype), None, None


def _run_chunks(
    problem: LossProblem, plan: Plan, mantissa: Tensor | None, gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute the divergences and entropies; fill `gradient` [M, D] with mantissa (sum_v q_v W[v] - c), where given."""
    student, rows = problem.student, problem.student.rows
    new = partial(torch.empty, dtype=student.accumulate_dtype, device=student.hidden.device)
    divergence, student_entropy = new(rows), new(rows)
    if plan.copy_weights:
        student = with_copied_weight(student)
    pending_sum = PendingSum(plan.group)
    with torch.autocast(student.hidden.device.type, enabled=False):  # its rounding is in the operands already
        for chunk, hidden, logits, memory in projected_chunks(student, plan, student.product_dtype):
            weights = None if gradient is None else memory
            normalised = normalise(logits, student, problem.temperature, plan, weights, entropy=problem.statistics)
            hidden_rows = None
            if weights is not None:
                hidden_rows = new(len(hidden), student.hidden_size)
                multiply_weights(student, [weights], plan.tile_rows, hidden_rows)
            chosen = chunk if problem.summary_index is None else problem.summary_index[chunk]
            embedding, entropy, bias = (x[chosen] for x in problem.summary)
            expected = (embedding * hidden).sum(-1).add_(bias).mul_(problem.logit_factor)
            (maximum, log_sum, student_entropy[chunk], _), divisor = normalised()
            # The two large numbers first: what is left of them is exact, and of the size of the rest.
            divergence[chunk] = (maximum - expected).add_(log_sum - entropy).clamp_min_(0)
            if hidden_rows is not None and gradient is not None and mantissa is not None:
                take = partial(_take_gradient, gradient[chunk], hidden_rows, embedding, mantissa[chunk])
                pending_sum.start(hidden_rows.div_(divisor.unsqueeze(1)), then=take)
        pending_sum.finish()
    return divergence, student_entropy


def _take_gradient(out: Tensor, rows: Tensor, embedding: Tensor, mantissa: Tensor) -> None:
    """Write the gradient into `out` [R, D], from sum_v q_v W[v] and c; overwrite the first."""
    out.copy_(rows.sub_(embedding).mul_(mantissa.unsqueeze(1)))


def _stats(problem: LossProblem, divergence: Tensor, student_entropy: Tensor) -> SuffixKLStats:
    """Return fresh tensors that alias nothing."""
    entropy = problem.summary.entropy
    entropy = entropy.clone() if problem.summary_index is None else entropy[problem.summary_index]
    divergence = divergence.detach().clone()
    return SuffixKLStats(
        divergence=divergence,
        student_entropy=student_entropy,
        teacher_entropy=entropy.to(divergence.dtype),
        agreement=torch.full_like(divergence, torch.nan),
    )


def _reference(problem: LossProblem) -> tuple[Tensor, Tensor]:
    """Specify divergences and student entropies: everything written down, gradients by autograd."""
    student = problem.student
    with torch.autocast(student.hidden.device.type, enabled=False):
        u = reference_logits(student) / problem.temperature
        chosen = slice(None) if problem.summary_index is None else problem.summary_index
        embedding, entropy, bias = (x[chosen].clone() for x in problem.summary)  # autograd saves no inference tensor
        expected = ((embedding * reference_rows(student)).sum(-1) + bias) * problem.logit_factor
        divergence = torch.logsumexp(u, -1) - expected - entropy
        return divergence, reference_entropy(torch.log_softmax(u.detach(), -1))
