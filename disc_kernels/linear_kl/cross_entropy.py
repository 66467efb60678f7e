"""Compute cross-entropy over the vocabulary without logits of all rows: the KL divergence from a certain teacher.

A distribution p with all its mass on token t has no entropy, so KL(p || q) = -log q_t: a top k of one entry, whose
log-probability is 0, and `fused_topk_kl` does all there is to do.

Liger's fused linear cross-entropy (0.8.5) rounds logits to the weights' 16 bits, and torch's `linear_cross_entropy`
(2.13) has no softcap and rounds each row's loss to the hidden states' dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from disc_kernels.autocast import autocast_dtype
from disc_kernels.host import to_device
from disc_kernels.linear_kl.inputs import LogitTransform, OutputHead
from disc_kernels.linear_kl.ranks.agreement import divided_vocabulary
from disc_kernels.linear_kl.ranks.dtensor import local_tensors, vocabulary_group
from disc_kernels.linear_kl.topk import fused_topk_kl
from disc_kernels.linear_kl.validation import (
    check_entries,
    check_head,
    check_index,
    check_projection,
    check_row_weight,
    check_tensor,
    check_vocab_size,
    is_traced,
)


@dataclass(frozen=True)
class _Head:
    """Hold the head under the names by which `ranks/dtensor.py` knows what may be divided."""

    student_weight: Tensor
    student_bias: Tensor | None


def fused_cross_entropy(
    hidden: Tensor,  # [..., D]
    weight: Tensor | OutputHead,  # [V, D]
    labels: Tensor,  # [...] int64
    *,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,  # [...]
    reduction: str = "mean",
    bias: Tensor | None = None,  # [V]
    transform: LogitTransform | None = None,
    vocab_size: int | None = None,
    vocab_group: Any = None,
    max_workspace_bytes: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute -log softmax(logits)[label] of every token, from hidden states and the head.

    Equal to, but without ever holding the logits of all tokens, in either direction:

        z = transform(hidden @ weight.T + bias)[..., :vocab_size]
        F.cross_entropy(z.flatten(0, -2).float(), labels.flatten(), ignore_index=ignore_index, reduction=reduction)

    Labels are not shifted: `labels[..., i]` is the token that `hidden[..., i, :]` predicts.

    Args:
        hidden: `[..., D]`, float16, bfloat16, float32 or float64.
        weight: `[V, D]`, of the dtype of `hidden` or a wider one; or an `OutputHead`, a whole head in place of `bias`
            and `transform`; see `fused_suffix_kl`.
        labels: `[...]`, the leading shape of `hidden`, int64 or int32. On the CPU, ignored tokens cost nothing with
            "mean" and "sum"; on a device, where looking for them would wait for it, they are computed and not counted.
        ignore_index: the label of tokens that do not count.
        row_weight: `[...]`, the leading shape of `hidden`, float or bool: weights of "sum" and "mean"; None: ones. No
            gradient flows to it.
        reduction: "mean" sum_i w_i d_i / sum_i w_i over the tokens that count, 0 where there are none; "batchmean" the
            same; "sum" sum_i w_i d_i; "none" every token's loss, in the shape of `labels`, whatever the weights: 0 for
            those that do not count. Of tokens that the model sampled it is the negative log-probability.
        bias: `[V]`; an entry of -inf takes the entry out.
        transform: `LogitTransform(scale, softcap)`, what the model does to its head's output; None: nothing.
        vocab_size: the first `vocab_size` entries only (a padded vocabulary).
        vocab_group: as for `fused_suffix_kl`, DTensors too.
        max_workspace_bytes: as for `fused_suffix_kl`.
        impl: as for `fused_suffix_kl`.

    Returns:
        The loss in nats, a scalar or, for "none", a tensor of the shape of `labels`; float32, or float64 where hidden
        states are. Gradients go to `hidden`, `weight` and `bias`, as for `fused_suffix_kl`: 3 products of 2 M V D
        operations with a scalar result (2 where the head is frozen), 1 without gradients. One operator in
        `torch.compile` too.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or options that do not fit; a label that is no entry and not `ignore_index`. On CUDA the
            device stops with the message.
        NotImplementedError, RuntimeError: as for `fused_suffix_kl`.
    """
    weight, bias, transform, entries = check_head("", weight, bias, transform)
    vocab_size = check_entries(vocab_size, entries)
    head = _Head(weight, bias)
    vocab_group = vocabulary_group(head, vocab_group)
    head = local_tensors(head, vocab_group)
    check = partial(_check, hidden, head, labels, ignore_index, row_weight, transform, vocab_group is not None)
    if vocab_group is None:
        total = check()
    else:
        options: dict[str, Any] = {"ignore_index": ignore_index, "row_weight": row_weight, "reduction": reduction}
        # The rest of the call has them by the names of `fused_topk_kl`, or not at all.
        options |= {"labels": labels, "transform": transform, "vocab_size": vocab_size, "impl": impl}
        total = divided_vocabulary(vocab_group, check, options)
    entries = check_vocab_size(vocab_size, {"weight": total})
    counts = labels != ignore_index
    tokens = check_index("labels", torch.where(counts, labels, 0).flatten(), entries, "the vocabulary", hidden.device)
    if is_traced(tokens) and not tokens.is_meta:  # and what its values are is checked when the graph runs
        in_range = ((tokens >= 0) & (tokens < entries)).all()
        torch._assert_async(
            in_range, f"labels: expected rows from 0 to {entries - 1} of the vocabulary, got a row outside"
        )
    if row_weight is not None:
        row_weight = row_weight.reshape(labels.shape)
    counts_there = to_device(counts, hidden.device)
    skip = labels.device.type == "cpu" and reduction != "none" and impl != "reference"
    if not skip:
        row_weight = counts_there if row_weight is None else row_weight * counts_there
    certain = torch.where(counts_there, 0.0, -torch.inf)
    loss = fused_topk_kl(
        hidden,
        head.student_weight,
        tokens.reshape(*labels.shape, 1),
        certain.unsqueeze(-1),
        row_weight=row_weight,
        mask=counts if skip else None,
        reduction=reduction,
        student_bias=head.student_bias,
        student_transform=transform,
        vocab_size=vocab_size,
        vocab_group=vocab_group,
        max_workspace_bytes=max_workspace_bytes,
        impl=impl,
    )
    return loss if reduction != "none" else torch.where(counts_there, loss.reshape(labels.shape), 0)


def _check(
    hidden: Tensor,
    head: _Head,
    labels: Tensor,
    ignore_index: int,
    row_weight: Tensor | None,
    transform: LogitTransform | None,
    sharded: bool,
) -> int:
    """Check what `fused_topk_kl` would call by a student's names; return how many rows the weight has."""
    device = check_tensor("hidden", hidden).device
    if sharded and is_traced(hidden):
        raise NotImplementedError("vocab_group: expected None under torch.compile and torch.export")
    given = hidden, head.student_weight, head.student_bias, None, transform
    model = check_projection("", *given, device, autocast_dtype(hidden), sharded)
    check_row_weight(row_weight, model)
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index: expected an int, got {ignore_index!r}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: expected an int of 64 bits, got {ignore_index}")
    if check_tensor("labels", labels).shape != hidden.shape[:-1]:
        raise ValueError(f"labels: expected shape {list(hidden.shape[:-1])}, as hidden's, got {list(labels.shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels: expected dtype torch.int64 or torch.int32, got {labels.dtype}")
    return len(model.weight)
