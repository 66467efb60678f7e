"""Summarise a teacher for a student whose head is frozen: D + 2 numbers a teacher row in place of the teacher.

With c = sum_v p_v W_s[v] and H the entropy of the teacher's p, and z_s = scale (W_s h_s + b_s) the student's logits:

    KL(p || q)        = logsumexp(z_s / T) - scale (c . h_s + sum_v p_v b_s[v]) / T - H
    d KL / d h_s      = scale / T (sum_v q_v W_s[v] - c)

because sum_v p_v z_s[v] is linear in h_s. `teacher_summary` makes c, H and the bias term once; `expected_embedding_kl`
in `loss.py` then takes 2 products of 2 M V D operations a step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from disc_kernels.autocast import autocast_dtype
from disc_kernels.frozen_head.graph_break import outside_graphs
from disc_kernels.frozen_head.inputs import SummaryInputs, SummaryProblem, TeacherSummary
from disc_kernels.frozen_head.softmax import normalise, numbers_per_row, projected_chunks
from disc_kernels.frozen_head.validation import check_summary_inputs
from disc_kernels.linear_kl.inputs import LogitTransform, OutputHead, Projection
from disc_kernels.linear_kl.products import multiply_weights, with_copied_weight
from disc_kernels.linear_kl.ranks.agreement import agree
from disc_kernels.linear_kl.ranks.dtensor import local_tensors, vocabulary_group
from disc_kernels.linear_kl.ranks.group import PendingSum, VocabGroup
from disc_kernels.linear_kl.reference import reference_entropy, reference_logits
from disc_kernels.linear_kl.rows import choose_implementation, load_backend
from disc_kernels.linear_kl.validation import check_entries, check_head
from disc_kernels.linear_kl.workspace import Plan, divide_workspace, row_stride


@outside_graphs
def teacher_summary(
    teacher_hidden: Tensor,  # [..., D_t]
    teacher_weight: Tensor | OutputHead,  # [V_t, D_t]
    student_weight: Tensor | OutputHead,  # [V_s, D_s]
    *,
    teacher_index: Tensor | None = None,  # [M] int64
    temperature: float = 1.0,
    teacher_bias: Tensor | None = None,  # [V_t]
    student_bias: Tensor | None = None,  # [V_s]
    teacher_transform: LogitTransform | None = None,
    vocab_size: int | None = None,
    vocab_group: Any = None,
    max_workspace_bytes: int | None = None,
    impl: str | None = None,
) -> TeacherSummary:
    """Compute all that `expected_embedding_kl` needs to know of a teacher, for a student whose head stays as it is.

    Equal to, but without ever holding the `[M, V]` logits or probabilities:

        z_t = teacher_hidden.flatten(0, -2)[teacher_index] @ teacher_weight.T + teacher_bias
        log_p = log_softmax(teacher_transform(z_t)[:, :vocab_size] / temperature, -1)
        embedding = log_p.exp() @ student_weight[:vocab_size]       # [M, D_s]
        entropy = -(log_p.exp() * log_p).sum(-1)                    # [M], nats
        bias = log_p.exp() @ student_bias[:vocab_size]              # [M]

    Args:
        teacher_hidden: `[..., D_t]`, float16, bfloat16, float32 or float64; its rows are those of `flatten(0, -2)`.
        teacher_weight: `[V_t, D_t]`, the dtype of `teacher_hidden` or a wider one (any under autocast); or an
            `OutputHead`, a whole head in place of `teacher_bias` and `teacher_transform`.
        student_weight: `[V_s, D_s]`, the frozen head, or an `OutputHead`; its dtype and size may differ from the
            teacher's.
        teacher_index: `[M]` int64, the rows that are summarised; None: all, in order. Rows may repeat, but one summary
            can serve many student rows: see `summary_index` of `expected_embedding_kl`.
        temperature: T > 0; the loss must be taken at the same.
        teacher_bias: `[V_t]`; an entry of -inf takes the entry out of the teacher's distribution.
        student_bias: `[V_s]`, the frozen head's; the loss must be given it too.
        teacher_transform: `LogitTransform(scale, softcap)` of the teacher; None: nothing.
        vocab_size: the first `vocab_size` entries only (a padded vocabulary); needed where V_s != V_t, and the loss
            must be given it too.
        vocab_group: as for `fused_suffix_kl`, DTensors too: heads and biases are this rank's shards, the summary is
            that of the whole vocabulary on every rank. Each sends 4 numbers a row, and the rows of the embedding once.
        max_workspace_bytes: as for `fused_suffix_kl`.
        impl: as for `fused_suffix_kl`.

    Returns:
        `TeacherSummary`, float32, or float64 where an input is; no gradient. It takes 2 products of 2 M V D operations
        with float32 inputs. The tensor cores take 16-bit operands, and float32 probabilities go to them in two parts,
        so that the embedding has float32 accuracy: 3 products.

    Raises:
        TypeError, ValueError: as for `fused_suffix_kl`.
        RuntimeError: with a `vocab_group`, as for `fused_suffix_kl`.
    """
    student_weight, student_bias, _, student_entries = check_head("student_", student_weight, student_bias, None)
    teacher_weight, teacher_bias, teacher_transform, teacher_entries = check_head(
        "teacher_", teacher_weight, teacher_bias, teacher_transform
    )
    entries = check_entries(vocab_size, student_entries, teacher_entries)
    if vocab_size is None and student_entries not in (None, entries):
        raise ValueError(
            f"vocab_size: expected an int, which expected_embedding_kl must be given too, because the OutputHeads have "
            f"{student_entries} and {teacher_entries} entries; got None"
        )
    inputs = SummaryInputs(
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
        student_weight=student_weight,
        student_bias=student_bias,
        teacher_index=teacher_index,
        temperature=temperature,
        teacher_transform=teacher_transform,
        vocab_size=entries,
        max_workspace_bytes=max_workspace_bytes,
        impl=impl,
        autocast_dtype=autocast_dtype(teacher_hidden),
    )
    vocab_group = vocabulary_group(inputs, vocab_group)
    if vocab_group is not None:
        return _summarise(*agree(vocab_group, inputs, _prepare))
    inputs = local_tensors(inputs, None)
    if impl == "reference":
        return _reference(check_summary_inputs(inputs))
    return _summarise(*_prepare(inputs))


def _prepare(inputs: SummaryInputs, group: VocabGroup | None = None) -> tuple[SummaryProblem, Plan]:
    """Check the inputs, choose the row functions, divide the workspace."""
    problem = check_summary_inputs(inputs, sharded=group is not None)
    teacher, head = problem.teacher, problem.head
    wide = head.accumulate_dtype
    backend = load_backend(choose_implementation(inputs.impl, head.weight.device, wide, sharded=group is not None))
    # Logits; hidden rows gathered, rounded, widened; the remainder of split probabilities.
    logits = row_stride(head.vocab_size)
    row_bytes = wide.itemsize * (logits + 3 * teacher.hidden_size + numbers_per_row(group))
    row_bytes += head.product_dtype.itemsize * logits if splits(head) else 0
    row = (row_bytes, 0)
    return problem, divide_workspace(inputs.max_workspace_bytes, teacher.rows, (teacher, head), 0, row, backend, group)


def splits(head: Projection) -> bool:
    """Return whether probabilities go to the product in two parts, because it takes 16-bit operands.

    Rounded once, they would put 1e-3 of error into an embedding that is subtracted from all but its equal. For the
    student's own probabilities, which the loss itself is not made of, one part is enough.
    """
    return head.product_dtype != head.accumulate_dtype


def _summarise(problem: SummaryProblem, plan: Plan) -> TeacherSummary:
    """Summarise all rows, a chunk at a time: products by torch, softmax in place by the row functions."""
    teacher, head, rows = problem.teacher, problem.head, problem.teacher.rows
    new = partial(torch.empty, dtype=head.accumulate_dtype, device=head.weight.device)
    if plan.copy_weights:
        teacher, head = with_copied_weight(teacher), with_copied_weight(head)
    summary = TeacherSummary(embedding=new(rows, head.hidden_size), entropy=new(rows), bias=new(rows))
    remainder_rows = min(plan.chunk_rows, rows) if splits(head) else 0
    remainder_buffer = new(remainder_rows, plan.row_stride, dtype=head.product_dtype)
    pending_sum = PendingSum(plan.group)
    with torch.no_grad(), torch.autocast(head.weight.device.type, enabled=False):  # its rounding is in the operands
        for chunk, _, logits, weights in projected_chunks(teacher, plan, head.product_dtype):
            remainder = remainder_buffer[: len(logits), : head.vocab_size] if splits(head) else None
            normalised = normalise(logits, teacher, problem.temperature, plan, weights, remainder, other_bias=head.bias)
            embedding = summary.embedding[chunk]
            parts = [weights] if remainder is None else [weights, remainder]
            multiply_weights(head, parts, plan.tile_rows, embedding)
            (_, _, summary.entropy[chunk], summary.bias[chunk]), divisor = normalised()
            pending_sum.start(embedding.div_(divisor.unsqueeze(1)))
        pending_sum.finish()
    return summary


def _reference(problem: SummaryProblem) -> TeacherSummary:
    """Compute the summary as it is specified: everything written down."""
    head = problem.head
    with torch.no_grad(), torch.autocast(head.weight.device.type, enabled=False):
        log_p = torch.log_softmax(reference_logits(problem.teacher) / problem.temperature, -1)
        p = log_p.exp()
        weight = head.weight[: head.vocab_size].to(head.operand_dtype).to(p.dtype)
        bias = p.new_zeros(len(p))
        if head.bias is not None:
            bias = torch.where(p == 0, 0.0, p * head.bias[: head.vocab_size]).sum(-1)
        return TeacherSummary(p @ weight, reference_entropy(log_p), bias)
