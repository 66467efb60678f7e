"""Compute the divergence from a teacher of which only the K most likely entries of each row are known."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from disc_kernels.autocast import autocast_dtype
from disc_kernels.linear_kl.api import compute
from disc_kernels.linear_kl.inputs import LogitTransform, OutputHead, SuffixKLInputs
from disc_kernels.linear_kl.validation import check_entries, check_head


def fused_topk_kl(
    student_hidden: Tensor,  # [..., D]
    student_weight: Tensor | OutputHead,  # [V, D]
    topk_ids: Tensor,  # [M, K] int64 or int32
    topk_logprobs: Tensor,  # [M, K]
    *,
    tail: str = "bucket",
    student_index: Tensor | None = None,  # [M] int64
    row_weight: Tensor | None = None,  # [M] or [...]
    mask: Tensor | None = None,  # [...] bool
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    reduction: str = "mean",
    student_bias: Tensor | None = None,  # [V]
    student_transform: LogitTransform | None = None,
    vocab_size: int | None = None,
    vocab_group: Any = None,
    max_workspace_bytes: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute the divergence from a teacher that gives K entries and their log-probabilities a row, as servers do.

    Equal to, but without ever holding the `[M, V]` logits or probabilities, in either direction:

        z = student_hidden.flatten(0, -2)[student_index] @ student_weight.T + student_bias
        log_q = log_softmax(student_transform(z)[:, :vocab_size] / temperature, -1)
        listed_q = log_q.gather(1, topk_ids)
        # tail="bucket": K + 1 outcomes, of which the last is the rest of the vocabulary
        rest_q = logsumexp(log_q.scatter(1, topk_ids, -inf), -1, keepdim=True)
        rest_p = log(clamp(1 - topk_logprobs.exp().sum(-1, keepdim=True), min=0))    # reverse_kl: min=1e-7, if K < V
        log_q, log_p = log_softmax(cat([listed_q, rest_q], -1), -1), log_softmax(cat([topk_logprobs, rest_p], -1), -1)
        # tail="renormalise": K outcomes
        log_q, log_p = log_softmax(listed_q, -1), log_softmax(topk_logprobs, -1)
        d = (log_p.exp() * (log_p - log_q)).sum(-1)          # forward_kl: KL(teacher || student), nats
        loss = (row_weight * d).sum() / row_weight.sum()     # reduction="mean"

    "bucket" is at most the divergence of the whole vocabularies, and near it where the K entries have most of the mass;
    "renormalise" says nothing of how much mass they have. They are TRL's `distillation_add_tail` (SDFT, SDPO) and
    `loss_add_tail` (server distillation), True and False, and "renormalise" is ms-swift's `gkd_logits_topk`. (verl's
    `forward_kl_topk` is neither: it sums over K entries of distributions that do not sum to 1.)

    Args:
        student_hidden: `[..., D]`, float16, bfloat16, float32 or float64; its rows are those of `flatten(0, -2)`.
        student_weight: `[V, D]`, of the dtype of `student_hidden` or a wider one, or an `OutputHead`; see
            `fused_suffix_kl`.
        topk_ids: `[M, K]`, or `[..., K]` of M rows in all, int64 or int32: K different entries of each row, in any
            order. They need not be the teacher's most likely ones: TRL's SDFT names the student's.
        topk_logprobs: the same shape, float: the teacher's log-probabilities of them, over its whole vocabulary, at the
            temperature of the student's. Get no gradient. -inf fills rows that have fewer than K, whatever the id
            there; a row of nothing else has divergence 0, and counts in the mean unless `mask` or `row_weight` leave
            it out. For a temperature other than the server's there is `log_softmax(topk_logprobs / T, -1)` with
            "renormalise".
        tail: "bucket" or "renormalise", as above.
        student_index: `[M]`, the student rows that are compared, as for `fused_suffix_kl`.
        mask: bool, of the leading shape of `student_hidden`, `topk_ids` and `topk_logprobs`, in place of an index: the
            rows where it is True are compared, and the others cost nothing.
        row_weight: as for `fused_suffix_kl`.
        temperature: as for `fused_suffix_kl`.
        divergence: as for `fused_suffix_kl`.
        beta: as for `fused_suffix_kl`.
        reduction: as for `fused_suffix_kl`.
        student_bias: as for `fused_suffix_kl`.
        student_transform: as for `fused_suffix_kl`.
        vocab_size: as for `fused_suffix_kl`.
        vocab_group: as for `fused_suffix_kl`, DTensors too. Ids count over the whole vocabulary of a group, and are the
            same on every rank.
        max_workspace_bytes: as for `fused_suffix_kl`.
        impl: as for `fused_suffix_kl`.

    Returns:
        The loss in nats, a scalar or, for "none", `[M]`; float32, or float64 where hidden states are. Gradients go to
        `student_hidden`, `student_weight` and `student_bias`, as for `fused_suffix_kl`: 3 products of 2 M V D
        operations with a scalar result (2 where the head is frozen), 1 without gradients. One operator in
        `torch.compile` too.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or options that do not fit; in a row that is compared an id out of range or one that repeats,
            a log-probability above 0 or NaN, or probabilities that sum to more than 1, all with room for rounding
            (0.001, and that of their dtype). On CUDA the device stops with the message.
        NotImplementedError, RuntimeError: as for `fused_suffix_kl`.
    """
    student_weight, student_bias, student_transform, entries = check_head(
        "student_", student_weight, student_bias, student_transform
    )
    inputs = SuffixKLInputs(
        student_hidden=student_hidden,
        student_weight=student_weight,
        student_bias=student_bias,
        teacher_hidden=topk_logprobs,
        teacher_weight=None,
        teacher_bias=None,
        topk_ids=topk_ids,
        student_index=student_index,
        teacher_index=None,
        row_weight=row_weight,
        mask=mask,
        temperature=temperature,
        divergence=divergence,
        beta=beta,
        reduction=reduction,
        student_transform=student_transform,
        teacher_transform=None,
        vocab_size=check_entries(vocab_size, entries),
        max_workspace_bytes=max_workspace_bytes,
        return_stats=False,
        impl=impl,
        tail=tail,
        autocast_dtype=autocast_dtype(student_hidden),
    )
    return compute(inputs, vocab_group)[0]
