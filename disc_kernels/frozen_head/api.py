"""Forward KL to a student whose head is frozen, from D + 2 numbers a teacher row in place of the teacher.

With c = sum_v p_v W_s[v] and H the entropy of the teacher's p, and z_s = scale (W_s h_s + b_s) the student's logits:

    KL(p || q)        = logsumexp(z_s / T) - scale (c . h_s + sum_v p_v b_s[v]) / T - H
    d KL / d h_s      = scale / T (sum_v q_v W_s[v] - c)

because sum_v p_v z_s[v] is linear in h_s. `teacher_summary` makes c, H and the bias term once; `expected_embedding_kl`
then takes 2 products of 2 M V D operations a step. How they are computed is in `expected_rows.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from disc_kernels.frozen_head.chunks import (
    RowLosses,
    reference_row_losses,
    reference_summary,
    row_losses,
    summarise,
)
from disc_kernels.frozen_head.plan import (
    LossCall,
    Planned,
    SummaryCall,
    TeacherSummary,
    plan_loss,
    plan_summary,
)
from disc_kernels.frozen_head.validation import check_loss_call, check_summary_call
from disc_kernels.linear_kl.inputs import LogitTransform, Side, SuffixKLStats
from disc_kernels.linear_kl.ranks.agreement import agree
from disc_kernels.linear_kl.ranks.dtensor import local_tensors, vocabulary_group
from disc_kernels.linear_kl.ranks.group import VocabGroup
from disc_kernels.linear_kl.rows import choose_implementation, rows_backend
from disc_kernels.linear_kl.validation import check_count

P = ParamSpec("P")
T = TypeVar("T")


def _outside_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """A break in compiled graphs: the row functions overwrite memory that a compiler would see twice.

    `torch.compiler.disable` would do, but it imports the compiler, and Triton with it, for everyone.
    """

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **options)
        return function(*args, **options)

    return call


@_outside_graphs
def teacher_summary(
    teacher_hidden: Tensor,  # [..., D_t]
    teacher_weight: Tensor,  # [V_t, D_t]
    student_weight: Tensor,  # [V_s, D_s]
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
    """All that `expected_embedding_kl` needs to know of a teacher, for a student whose head stays as it is.

    Equal to, but without ever holding the `[M, V]` logits or probabilities::

        z_t = teacher_hidden.flatten(0, -2)[teacher_index] @ teacher_weight.T + teacher_bias
        log_p = log_softmax(teacher_transform(z_t)[:, :vocab_size] / temperature, -1)
        embedding = log_p.exp() @ student_weight[:vocab_size]       # [M, D_s]
        entropy = -(log_p.exp() * log_p).sum(-1)                    # [M], nats
        bias = log_p.exp() @ student_bias[:vocab_size]              # [M]

    Args:
        teacher_hidden: `[..., D_t]`, float16, bfloat16, float32 or float64; its rows are those of `flatten(0, -2)`.
        teacher_weight: `[V_t, D_t]`, the dtype of `teacher_hidden` (any under autocast).
        student_weight: `[V_s, D_s]`, the frozen head; its dtype and size may differ from the teacher's.
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
        max_workspace_bytes: bound on the memory used beyond inputs and outputs; None: 256 MiB on the CPU, 2 GiB on
            CUDA, more where one row needs it.
        impl: as for `fused_suffix_kl`.

    Returns:
        `TeacherSummary`, float32, or float64 where an input is; no gradient. It takes 2 products of 2 M V D operations
        with float32 inputs. The tensor cores take 16-bit operands, and float32 probabilities go to them in two parts,
        so that the embedding has float32 accuracy: 3 products.

    Raises:
        TypeError, ValueError: as for `fused_suffix_kl`.
        RuntimeError: with a `vocab_group`, as for `fused_suffix_kl`.
    """
    arguments: dict[str, Any] = {
        "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight,
        "student_weight": student_weight,
        "teacher_index": teacher_index,
        "temperature": temperature,
        "teacher_bias": teacher_bias,
        "student_bias": student_bias,
        "teacher_transform": teacher_transform,
        "vocab_size": vocab_size,
        "max_workspace_bytes": max_workspace_bytes,
        "impl": impl,
    }
    call = _prepared(arguments, vocab_group, _prepare_summary)
    device_type = teacher_hidden.device.type
    with torch.no_grad(), torch.autocast(device_type, enabled=False):  # its rounding is in the operands already
        return reference_summary(call) if isinstance(call, SummaryCall) else summarise(call)


@_outside_graphs
def expected_embedding_kl(
    student_hidden: Tensor,  # [..., D_s]
    student_weight: Tensor,  # [V_s, D_s]
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
    """KL(teacher || student) of a student with a frozen head, from `teacher_summary`: no teacher, no approximation.

    Equal to, but without ever holding the `[M, V]` logits or probabilities::

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
        student_weight: `[V_s, D_s]`, the dtype of `student_hidden` (any under autocast); frozen.
        summary: of `teacher_summary`: `TeacherSummary(embedding [S, D_s], entropy [S], bias [S])`, float32 or float64.
        student_index: `[M]` int64, the student rows that count; None: all, in order. Rows may repeat.
        summary_index: `[M]` int64, the summary row each of them is compared with; None: all, in order. Rows may repeat.
        row_weight: `[M]` float, weights of "sum" and "mean"; None: ones. No gradient flows to it.
        temperature: T > 0. The result is not multiplied by T^2: see `fused_suffix_kl`.
        reduction: "mean" sum_i w_i d_i / sum_i w_i (0 where the weights sum to 0); "sum" sum_i w_i d_i; "none" the
            d_i, `[M]`, whatever the weights.
        student_bias: `[V_s]`; frozen. An entry of -inf takes the entry out of the student's distribution.
        student_scale: finite factor on the student's logits, not 0.
        vocab_size: the first `vocab_size` entries only.
        vocab_group: as for `fused_suffix_kl`, DTensors too: head and bias are this rank's shard, everything else is the
            same on every rank. Each sends 4 numbers a row and, once, the rows of the hidden gradient before they are
            rounded.
        max_workspace_bytes: bound on the memory used beyond inputs, outputs, the gradient (where M is more than the
            rows of `student_hidden` also once at 4 bytes an entry), and its rows `[M, D_s]` that are kept for the
            backward; None: 256 MiB on the CPU, 2 GiB on CUDA, more where one row
            needs it.
        return_stats: also return `SuffixKLStats`, each `[M]`, detached. A summary does not know the teacher's most
            likely entry: `agreement` is NaN. `teacher_entropy` is the summary's.
        impl: as for `fused_suffix_kl`.

    Returns:
        The loss in nats: a scalar, or `[M]` for "none"; float32, or float64 where an input is. With M = 0 a zero (an
        empty `[0]`) still connected to the graph. With `return_stats`, `(loss, stats)`.

        The gradient goes to `student_hidden` only. Its rows are computed in the forward, whatever the reduction; every
        backward multiplies them by what it is given. Unlike `fused_suffix_kl` this is no operator of `torch.compile`:
        it breaks a compiled graph, and `fullgraph=True` refuses it.

    Raises:
        ValueError: the head requires a gradient while gradients are recorded: train it with `fused_suffix_kl`.
        TypeError, ValueError: else as for `fused_suffix_kl`.
        RuntimeError: when the backward is differentiated; with a `vocab_group`, as for `fused_suffix_kl`.
    """
    arguments: dict[str, Any] = {
        "student_hidden": student_hidden,
        "student_weight": student_weight,
        "summary": summary,
        "student_index": student_index,
        "summary_index": summary_index,
        "row_weight": row_weight,
        "temperature": temperature,
        "reduction": reduction,
        "student_bias": student_bias,
        "student_scale": student_scale,
        "vocab_size": vocab_size,
        "max_workspace_bytes": max_workspace_bytes,
        "return_stats": return_stats,
        "impl": impl,
    }
    call = _prepared(arguments, vocab_group, _prepare_loss)
    if isinstance(call, LossCall):
        losses = reference_row_losses(call)
    else:
        losses, call = row_losses(call), call.call
    loss = losses.divergence if reduction == "none" else (losses.divergence * call.row_factor).sum()
    return (loss, _stats(losses, call)) if return_stats else loss


def _prepared(
    arguments: dict[str, Any], vocab_group: Any, prepare: Callable[[dict[str, Any], VocabGroup | None], Any]
) -> Any:
    """What `prepare` makes of the arguments, without DTensors; of a shard, as all ranks of a group agree on it."""
    vocab_group = vocabulary_group(arguments, vocab_group)
    if vocab_group is None:
        return prepare(local_tensors(arguments, None), None)
    return agree(vocab_group, arguments, prepare)


def _prepare_summary(arguments: dict[str, Any], group: VocabGroup | None) -> SummaryCall | Planned[SummaryCall]:
    """The call, which is all that the reference needs, or planned."""
    call = check_summary_call(arguments, sharded=group is not None)
    impl, max_bytes = _means(arguments, call.head, group)
    return call if impl == "reference" else plan_summary(call, rows_backend(impl), max_bytes, group)


def _prepare_loss(arguments: dict[str, Any], group: VocabGroup | None) -> LossCall | Planned[LossCall]:
    call = check_loss_call(arguments, sharded=group is not None)
    impl, max_bytes = _means(arguments, call.student, group)
    return call if impl == "reference" else plan_loss(call, rows_backend(impl), max_bytes, group)


def _means(arguments: dict[str, Any], side: Side, group: VocabGroup | None) -> tuple[str, int | None]:
    """(impl, max_workspace_bytes)"""
    max_bytes = arguments["max_workspace_bytes"]
    max_bytes = None if max_bytes is None else check_count("max_workspace_bytes", max_bytes)
    device, dtype = side.hidden.device, side.accumulate_dtype
    return choose_implementation(arguments["impl"], device, dtype, sharded=group is not None), max_bytes


def _stats(losses: RowLosses, call: LossCall) -> SuffixKLStats:
    """Of memory that is nobody else's."""
    entropy = call.summary.entropy
    entropy = entropy.clone() if call.summary_index is None else entropy[call.summary_index]
    divergence = losses.divergence.detach().clone()
    return SuffixKLStats(
        divergence=divergence,
        student_entropy=losses.student_entropy,
        teacher_entropy=entropy.to(divergence.dtype),
        agreement=torch.full_like(divergence, torch.nan),
    )
