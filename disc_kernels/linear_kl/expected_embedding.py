"""Forward KL to a student whose head is frozen, from D + 2 numbers a teacher row in place of the teacher.

With c = sum_v p_v W_s[v] and H the entropy of the teacher's p, and z_s = scale (W_s h_s + b_s) the student's logits:

    KL(p || q)        = logsumexp(z_s / T) - scale (c . h_s + sum_v p_v b_s[v]) / T - H
    d KL / d h_s      = scale / T (sum_v q_v W_s[v] - c)

because sum_v p_v z_s[v] is linear in h_s. `teacher_summary` makes c, H and the bias term once; `expected_embedding_kl`
then takes 2 products of 2 M V D operations a step. How they are computed is in `expected_rows.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from disc_kernels.linear_kl.expected_rows import (
    LossCall,
    RowLosses,
    SummaryCall,
    TeacherSummary,
    reference_row_losses,
    reference_summary,
    row_losses,
    summarise,
)
from disc_kernels.linear_kl.implementations import choose_implementation, rows_backend
from disc_kernels.linear_kl.problem import LogitTransform, Side, SuffixKLStats
from disc_kernels.linear_kl.validation import (
    REDUCTIONS,
    check_choice,
    check_count,
    check_index,
    check_number,
    check_row_weight,
    check_side,
    check_tensor,
    check_vocab_size,
)

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
        vocab_group: not available yet.
        max_workspace_bytes: bound on the memory used beyond inputs and outputs; None: 256 MiB on the CPU, 2 GiB on
            CUDA, more where one row needs it.
        impl: as for `fused_suffix_kl`.

    Returns:
        `TeacherSummary`, float32, or float64 where an input is; no gradient. It takes 2 products of 2 M V D operations
        with float32 inputs. The tensor cores take 16-bit operands, and float32 probabilities go to them in two parts,
        so that the embedding has float32 accuracy: 3 products.

    Raises:
        TypeError, ValueError, NotImplementedError: as for `fused_suffix_kl`.
    """
    _refuse_vocab_group(vocab_group)
    temperature = _temperature(temperature)
    device = check_tensor("teacher_hidden", teacher_hidden).device
    teacher = check_side(
        "teacher", teacher_hidden, teacher_weight, teacher_bias, teacher_index, teacher_transform, device
    )
    # Of the student there is a head and no row.
    check_tensor("student_weight", student_weight)
    no_rows = student_weight.new_empty(0, student_weight.shape[-1] if student_weight.dim() else 0)
    head = check_side("student", no_rows, student_weight, student_bias, None, None, device)
    vocab_size = check_vocab_size(vocab_size, head.weight.shape[0], teacher.weight.shape[0])
    wide = torch.promote_types(head.accumulate_dtype, teacher.accumulate_dtype)
    teacher, head = (replace(side, vocab_size=vocab_size, accumulate_dtype=wide) for side in (teacher, head))
    call = SummaryCall(teacher, head, temperature)
    max_workspace_bytes = _workspace(max_workspace_bytes)
    impl = choose_implementation(impl, device, wide)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):  # its rounding is in the operands already
        if impl == "reference":
            return reference_summary(call)
        return summarise(call, rows_backend(impl), max_workspace_bytes)


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
        vocab_group: not available yet.
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
        TypeError, ValueError, NotImplementedError: else as for `fused_suffix_kl`.
        RuntimeError: when the backward is differentiated.
    """
    _refuse_vocab_group(vocab_group)
    check_choice("reduction", reduction, REDUCTIONS)
    temperature = _temperature(temperature)
    device = check_tensor("student_hidden", student_hidden).device
    transform = LogitTransform(_scale(student_scale))
    student = check_side("student", student_hidden, student_weight, student_bias, student_index, transform, device)
    _refuse_trainable_head(student)
    vocab_size = student.vocab_size if vocab_size is None else check_count("vocab_size", vocab_size)
    if vocab_size > student.vocab_size:
        raise ValueError(
            f"vocab_size: expected at most {student.vocab_size}, the vocabulary rows of student_weight, "
            f"got {vocab_size}"
        )
    _check_summary(summary, student)
    wide = torch.promote_types(student.accumulate_dtype, summary.embedding.dtype)
    student = replace(student, vocab_size=vocab_size, accumulate_dtype=wide)
    if summary_index is not None:
        summary_index = check_index("summary_index", summary_index, len(summary.embedding), "summary", device)
    rows = _paired_rows(student, summary, summary_index)
    row_weight = check_row_weight(row_weight, rows, device)

    call = LossCall(
        student=student,
        summary=TeacherSummary(*(x.detach() for x in summary)),
        summary_index=summary_index,
        rows=rows,
        temperature=temperature,
        row_factor=_row_factor(row_weight, rows, reduction, student),
        statistics=return_stats,
    )
    max_workspace_bytes = _workspace(max_workspace_bytes)
    impl = choose_implementation(impl, device, wide)
    if impl == "reference":
        losses = reference_row_losses(call)
    else:
        losses = row_losses(call, rows_backend(impl), max_workspace_bytes)
    divergence = losses.divergence
    loss = divergence if reduction == "none" else (divergence * call.row_factor).sum()
    return (loss, _stats(losses, call)) if return_stats else loss


def _row_factor(row_weight: Tensor | None, rows: int, reduction: str, student: Side) -> Tensor:
    """[M], what the reduction multiplies each row with: 0 where every row is masked, not NaN."""
    wide, device = student.accumulate_dtype, student.hidden.device
    if row_weight is None or reduction == "none":
        factor = torch.ones(rows, dtype=wide, device=device)
    else:
        factor = row_weight.to(wide)
    if reduction != "mean":
        return factor
    total = factor.sum()
    return factor / torch.where(total == 0, torch.inf, total)


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


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _refuse_vocab_group(vocab_group: Any) -> None:
    if vocab_group is not None:
        raise NotImplementedError("vocab_group: vocabulary-parallel heads are not available yet")


def _refuse_trainable_head(student: Side) -> None:
    if not torch.is_grad_enabled():
        return
    for name, tensor in (("student_weight", student.weight), ("student_bias", student.bias)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor without requires_grad, got one with: a summary holds for the head it was "
                "made with, so that head must stay frozen; use fused_suffix_kl to train it"
            )


def _temperature(value: Any) -> float:
    temperature = check_number("temperature", value)
    if temperature <= 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    return temperature


def _scale(value: Any) -> float:
    scale = check_number("student_scale", value)
    if scale == 0:
        raise ValueError(f"student_scale: expected a number other than 0, got {scale}")
    return scale


def _workspace(max_workspace_bytes: Any) -> int | None:
    return None if max_workspace_bytes is None else check_count("max_workspace_bytes", max_workspace_bytes)


def _check_summary(summary: Any, student: Side) -> None:
    if not isinstance(summary, TeacherSummary):
        raise TypeError(f"summary: expected a TeacherSummary, got {type(summary).__name__}")
    for name, tensor in summary._asdict().items():
        check_tensor(f"summary.{name}", tensor)
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"summary.{name}: expected float32 or float64, got {tensor.dtype}")
        if tensor.dtype != summary.embedding.dtype:
            raise TypeError(
                f"summary.{name}: expected {summary.embedding.dtype}, as summary.embedding, got {tensor.dtype}"
            )
        if tensor.device != student.hidden.device:
            raise ValueError(
                f"summary.{name}: expected device {student.hidden.device}, as the hidden states, got {tensor.device}"
            )
    shape, size = list(summary.embedding.shape), student.hidden_size
    if len(shape) != 2 or shape[1] != size:
        raise ValueError(f"summary.embedding: expected shape [S, {size}], as wide as student_weight, got {shape}")
    for name in ("entropy", "bias"):
        got = list(getattr(summary, name).shape)
        if got != shape[:1]:
            raise ValueError(f"summary.{name}: expected shape {shape[:1]}, as summary.embedding {shape}, got {got}")


def _paired_rows(student: Side, summary: TeacherSummary, summary_index: Tensor | None) -> int:
    compared, given = ("student_hidden", student.hidden_rows), ("summary", len(summary.embedding))
    if student.index is not None:
        compared = ("student_index", len(student.index))
    if summary_index is not None:
        given = ("summary_index", len(summary_index))
    if compared[1] != given[1]:
        raise ValueError(
            f"{given[0]}: expected {compared[1]} rows, one for each row of {compared[0]}, got {given[1]}; "
            "student_index and summary_index choose the rows that are compared"
        )
    return compared[1]
