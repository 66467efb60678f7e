"""Compute the fused linear + divergence loss: `fused_suffix_kl`, and `FusedSuffixKLLoss`, the module of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from disc_kernels.autocast import autocast_dtype
from disc_kernels.linear_kl.compile import traced_suffix_kl
from disc_kernels.linear_kl.function import fused, prepare
from disc_kernels.linear_kl.inputs import LogitTransform, OutputHead, SuffixKLInputs, SuffixKLStats
from disc_kernels.linear_kl.problem import check_inputs
from disc_kernels.linear_kl.ranks.agreement import agree
from disc_kernels.linear_kl.ranks.dtensor import local_tensors, vocabulary_group
from disc_kernels.linear_kl.reference import reference_suffix_kl
from disc_kernels.linear_kl.teacher import check_topk_values
from disc_kernels.linear_kl.validation import check_entries, check_head, is_traced


def fused_suffix_kl(
    student_hidden: Tensor,  # [..., D_s]
    student_weight: Tensor | OutputHead,  # [V_s, D_s]
    teacher_hidden: Tensor,  # [..., D_t], or logits [..., V_t]
    teacher_weight: Tensor | OutputHead | None,  # [V_t, D_t]
    *,
    student_index: Tensor | None = None,  # [M] int64
    teacher_index: Tensor | None = None,  # [M] int64
    row_weight: Tensor | None = None,  # [M] or [...]
    mask: Tensor | None = None,  # [...] bool
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    reduction: str = "mean",
    student_bias: Tensor | None = None,  # [V_s]
    teacher_bias: Tensor | None = None,  # [V_t]
    student_transform: LogitTransform | None = None,
    teacher_transform: LogitTransform | None = None,
    vocab_size: int | None = None,
    vocab_group: Any = None,
    max_workspace_bytes: int | None = None,
    return_stats: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, SuffixKLStats]:
    """Compute the divergence between a teacher's and a student's next-token distributions from hidden states and heads.

    Equal to, but without ever holding the `[M, V]` logits, probabilities or losses, in either direction:

        z_s = student_hidden.flatten(0, -2)[student_index] @ student_weight.T + student_bias
        z_t = teacher_hidden.flatten(0, -2)[teacher_index] @ teacher_weight.T + teacher_bias
        log_q = log_softmax(student_transform(z_s)[:, :vocab_size] / temperature, -1)
        log_p = log_softmax(teacher_transform(z_t)[:, :vocab_size] / temperature, -1)
        d = (log_p.exp() * (log_p - log_q)).sum(-1)          # forward_kl: KL(teacher || student), nats
        loss = (row_weight * d).sum() / row_weight.sum()     # reduction="mean"

    With a frozen head and forward KL, `expected_embedding_kl` gives the same loss from a teacher that was summarised
    once, in 2 products a step.

    Args:
        student_hidden: `[..., D_s]`, float16, bfloat16, float32 or float64; its rows are those of `flatten(0, -2)`.
        student_weight: `[V_s, D_s]`, the dtype of `student_hidden` (any under autocast), or a wider one, which is
            rounded to it, as autocast does: a logit is off by at most u sum_d |h_d W_vd|, u = 2^-8 for bfloat16 and
            2^-11 for float16. Its gradient has its own dtype. Or an `OutputHead`, a whole head: then `student_bias` and
            `student_transform` are None, and `vocab_size` is the smaller of the heads', unless it says fewer.
        teacher_hidden: `[..., D_t]`; gets no gradient. Its dtype and size may differ from the student's.
        teacher_weight: `[V_t, D_t]`, or an `OutputHead`; gets no gradient; may be the student's own. None:
            `teacher_hidden` are the teacher's logits, `[..., V_t]`, as a cache has them, and are never rounded. An
            entry of -inf has probability 0 and counts nothing in forward KL and JSD; where the student gives it any,
            reverse KL is inf and its gradient NaN. A row with NaN, or with nothing but -inf, is a ValueError on the
            CPU; on CUDA, where looking for one would wait for the device, its divergence is NaN. Not with a
            `vocab_group`.
        student_index: `[M]` int64 or int32, the student rows that count; None: all, in order. Rows may repeat. It may
            be on the CPU whatever the other tensors' device. Or bool, an entry a row: those that are True, for which
            the host waits where they are on CUDA.
        teacher_index: the same for the teacher: the row each of them is compared with. One that repeats is projected
            once, if the index is on the CPU, where its values can be seen without waiting for a device; or if all rows
            of `teacher_hidden`, at most `M / 2`, fit half of the workspace.
        row_weight: float or bool, weights of "sum" and "mean"; None: ones. `[M]`, or of the leading shape of
            `student_hidden`, of which the rows that count are taken. No gradient flows to it.
        mask: bool, of the leading shape of `student_hidden` and `teacher_hidden`, in place of both indices: the rows
            where it is True are compared, M of them, and the others cost nothing. It may be on the CPU; where it is on
            CUDA the host waits for it. In `torch.compile` with "mean" and "sum", and without `return_stats`.
        temperature: T > 0; both models' logits are divided by it. The result is not multiplied by T^2: do that
            outside, as with `F.kl_div`, where the gradient's size should not depend on T (Hinton et al. 2015,
            arXiv 1503.02531).
        divergence: "forward_kl" KL(teacher || student); "reverse_kl" KL(student || teacher); "jsd", with
            m = (1 - beta) student + beta teacher: beta KL(teacher || m) + (1 - beta) KL(student || m)
            (generalised Jensen-Shannon divergence, Agarwal et al. 2024, arXiv 2306.13649).
        beta: for "jsd", from 0 to 1. As in TRL and Liger 0 stands for "forward_kl" and 1 for "reverse_kl", the limits
            of JSD / (beta (1 - beta)); JSD itself goes to 0 at both ends.
        reduction: "mean" sum_i w_i d_i / sum_i w_i (0 where the weights sum to 0), also as "batchmean"; "sum"
            sum_i w_i d_i; "none" the d_i, `[M]`, whatever the weights.
        student_bias: `[V_s]`; an entry of -inf takes the entry out of the student's distribution (behind a softcap,
            which bounds it, it does not).
        teacher_bias: `[V_t]`.
        student_transform: `LogitTransform(scale, softcap)`, what the student does to its head's output; None: nothing.
        teacher_transform: the same for the teacher.
        vocab_size: compare the first `vocab_size` entries only (a padded vocabulary); needed where V_s != V_t.
        vocab_group: a `torch.distributed` process group whose ranks share the vocabulary. Both weights and biases are
            then this rank's contiguous shard, in rank order, divided alike for both models as far as `vocab_size`,
            which counts over all ranks (None: the sum of the shards). Shards may be of different sizes, or empty; all
            other arguments are the same on every rank. Result, statistics and the hidden gradient are those of the
            whole vocabulary, on every rank; gradients of weight and bias are the shard's. All ranks make the call, and
            the same backwards. Not with `impl="reference"`, `torch.compile` or `torch.export`. DTensors: see below.
        max_workspace_bytes: bound on the memory used beyond inputs, outputs and gradients (the weight's gradient, and
            the hidden states' where M is more than their rows, also once at 4 bytes an entry while they accumulate);
            None: 256 MiB on the CPU, 2 GiB on CUDA, more where one row needs it.
        return_stats: also return `SuffixKLStats`, each `[M]`, detached.
        impl: "triton", "torch" or "reference" (materialises the logits; for comparison); None: "triton" on CUDA
            (float64: "torch"), "torch" elsewhere. One that is named never falls back to another.

    Returns:
        The loss in nats, a scalar or, for "none", `[M]`; float32, or float64 where hidden states are. With
        M = 0 a zero (an empty `[0]`) still connected to the graph. With `return_stats`, `(loss, stats)`.

        Gradients go to `student_hidden`, `student_weight` and `student_bias`, whichever require one. For "mean" and
        "sum" they are computed in the forward and handed out by the first backward; a second one, through a graph that
        was retained, computes them again.

        Weights and biases may be DTensors; their gradients come back with the same placements. `Shard(0)` over a mesh
        dimension named "tp" is a shard of the vocabulary, and those ranks a `vocab_group`. Any other dimension, FSDP's
        for instance, and one without a name, is gathered: once a call, kept until the backward, on top of
        `max_workspace_bytes`. The gradient is then averaged over these ranks, as FSDP2 and DDP average theirs: what the
        eager loss gives in the forward of the same `fully_shard` module. So each rank's loss is its own rows', and one
        that should be the mean over all ranks' rows is to be scaled as for FSDP2 (a divide factor that was set there is
        not known here). Hidden states may be DTensors that are replicated.

        In `torch.compile` and `torch.export` the call is one operator, `disc_kernels::fused_suffix_kl`. Another number
        of rows compiles nothing; another option does, a temperature for example. What depends on values, such as an
        index out of range, is raised when the graph runs. `impl="reference"` is traced like any torch code.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices, indices or options that do not fit. An index out of range is found on the device,
            without a host synchronisation, where the index is on CUDA: there the device stops with the message. With
            a `vocab_group`: ranks disagree, or one of them raises; then all do, with the same message. DTensors that
            are neither divided alike nor replicated, as above.
        NotImplementedError: `vocab_group` while a compiler traces the call.
        RuntimeError: in a backward with `create_graph=True`; when an input was changed in place before a backward that
            computes gradients again; when a rank of the `vocab_group` does not take part within the group's timeout
            (with NCCL alone its watchdog ends the process).
    """
    student_weight, student_bias, student_transform, student_entries = check_head(
        "student_", student_weight, student_bias, student_transform
    )
    teacher_weight, teacher_bias, teacher_transform, teacher_entries = check_head(
        "teacher_", teacher_weight, teacher_bias, teacher_transform
    )
    inputs = SuffixKLInputs(
        student_hidden=student_hidden,
        student_weight=student_weight,
        student_bias=student_bias,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
        topk_ids=None,
        student_index=student_index,
        teacher_index=teacher_index,
        row_weight=row_weight,
        mask=mask,
        temperature=temperature,
        divergence=divergence,
        beta=beta,
        reduction=reduction,
        student_transform=student_transform,
        teacher_transform=teacher_transform,
        vocab_size=check_entries(vocab_size, student_entries, teacher_entries),
        max_workspace_bytes=max_workspace_bytes,
        return_stats=return_stats,
        impl=impl,
        tail="bucket",
        autocast_dtype=autocast_dtype(student_hidden),
    )
    loss, stats = compute(inputs, vocab_group)
    return (loss, stats) if return_stats else loss


def compute(inputs: SuffixKLInputs, vocab_group: Any) -> tuple[Tensor, SuffixKLStats]:
    """Compute the loss by the implementation that is asked for: in a graph, over the ranks of a group, or here."""
    vocab_group = vocabulary_group(inputs, vocab_group)
    if vocab_group is not None:
        if is_traced(inputs.student_hidden):
            raise NotImplementedError("vocab_group: expected None under torch.compile and torch.export")
        problem, plan = agree(vocab_group, inputs, prepare)
        if problem.teacher.ids is not None and plan.group is not None:
            check_topk_values(problem.teacher, plan.group.entries)
        return fused(problem, plan)
    inputs = local_tensors(inputs, None)
    if inputs.impl == "reference":
        return reference_suffix_kl(check_inputs(inputs))
    if is_traced(inputs.student_hidden):
        return traced_suffix_kl(inputs)
    return fused(*prepare(inputs))


class FusedSuffixKLLoss(nn.Module):
    """Wrap `fused_suffix_kl` in a module: options at construction, tensors (and any option again) at the call.

    Args:
        **options: keyword arguments of `fused_suffix_kl`.

    Raises:
        TypeError: an option that `fused_suffix_kl` does not have.
    """

    def __init__(self, **options: Any):
        super().__init__()
        known = fused_suffix_kl.__kwdefaults__ or {}
        for name in options:
            if name not in known:
                raise TypeError(f"FusedSuffixKLLoss: unexpected option {name!r}, expected one of {', '.join(known)}")
        self.options = options

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor | OutputHead,
        teacher_hidden: Tensor,
        teacher_weight: Tensor | OutputHead | None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, SuffixKLStats]:
        return fused_suffix_kl(
            student_hidden, student_weight, teacher_hidden, teacher_weight, **{**self.options, **options}
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
