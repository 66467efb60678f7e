"""Compute cross-entropy over the vocabulary without logits of all rows: the KL divergence from a one-hot teacher.

A distribution p with all its mass on token t has no entropy, so KL(p || q) = -log q_t. `fused_suffix_kl` then does all
there is to do: float32 logits whatever the weights' dtype, bias, scale and softcap of the head, a weight for every row,
bounded memory, on every device. Liger's fused linear cross-entropy (0.8.5) rounds logits to the weights' 16 bits, and
torch's `linear_cross_entropy` (2.13) has no softcap and rounds each row's loss to the hidden states' dtype.
"""

import torch
from torch import Tensor

from disc_kernels import LogitTransform, fused_suffix_kl
from disc_kernels.linear_kl.validation import check_index
from disc_train.models.causal_lm import Head

# Codes of different tokens have products that are smaller by at least 2: exp(-2 * 512) is 0, in float64 too. Anything
# above would meet the -log 0 of an entry that a bias of -inf takes out, and the loss be infinite.
ONE_HOT = LogitTransform(scale=512.0)


def linear_cross_entropy(
    hidden: Tensor,  # [..., D]
    head: Head,
    targets: Tensor,  # [M] int64
    *,
    index: Tensor | None = None,  # [M] int64
    weight: Tensor | None = None,  # [M]
    reduction: str = "sum",
) -> Tensor:
    """Compute -log softmax(logits)[target] in nats, with gradients to `hidden`, the head's weight and its bias.

    It takes 3 products of 2 M V D operations with a scalar result (2 where the head is frozen), 1 without gradients.

    Args:
        index: the rows of `hidden.flatten(0, -2)` that predict the targets; None: all, in order. It may be on the CPU.
        weight: of each row in "sum"; None: ones. No gradient flows to it.
        reduction: "sum", or "none" for the M values, whatever the weights.

    Returns:
        A scalar, or [M]; float32, or float64 where hidden states are.

    Raises:
        ValueError, TypeError: a target that the head has no row for, and as `disc_kernels.fused_suffix_kl`. On CUDA the
            device stops with the message.
    """
    entries = head.weight.shape[0]
    # In binary, a target out of range (the -100 that others ignore, say) would look like another one.
    targets = check_index("targets", targets, entries, "the head's weight", hidden.device)
    codes = _binary(torch.arange(entries, device=targets.device), entries, head.weight.dtype)
    return fused_suffix_kl(  # type: ignore[return-value]
        *(hidden, head.weight, _binary(targets, entries, head.weight.dtype), codes),
        student_index=index,
        row_weight=weight,
        reduction=reduction,
        student_bias=head.bias,
        student_transform=head.transform,
        teacher_transform=ONE_HOT,
    )


def _binary(tokens: Tensor, entries: int, dtype: torch.dtype) -> Tensor:
    """Write tokens [M] in binary, with the digits -1 and 1: [M, ceil(log2(entries))].

    The product of two such rows is their length less twice the number of digits in which they differ, an integer that
    every dtype holds exactly: largest for a token and itself.
    """
    places = torch.arange(max(1, (entries - 1).bit_length()), device=tokens.device)
    return ((tokens[:, None] >> places) & 1).to(dtype) * 2 - 1
