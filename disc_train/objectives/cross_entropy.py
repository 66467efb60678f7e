"""Compute the cross-entropy of chosen rows with a model's own output head."""

from torch import Tensor

from disc_kernels import fused_cross_entropy
from disc_kernels.hf import OutputHead
from disc_kernels.host import to_device


def linear_cross_entropy(
    hidden: Tensor,  # [..., D]
    head: OutputHead,
    targets: Tensor,  # [M] int64
    *,
    index: Tensor | None = None,  # [M] int64
    weight: Tensor | None = None,  # [M]
    reduction: str = "sum",
) -> Tensor:
    """Compute `disc_kernels.fused_cross_entropy` of the rows of `hidden.flatten(0, -2)` that predict the targets.

    Args:
        index: those rows, which may repeat, where several branches follow a trunk; None: all, in order. It may be on
            the CPU.
        weight: of each row in "sum"; None: ones. No gradient flows to it.
        reduction: "sum", or "none" for the M values, whatever the weights.
    """
    rows = hidden.flatten(0, -2)
    if index is not None:
        rows = rows.index_select(0, to_device(index, hidden.device))
    return fused_cross_entropy(
        *(rows, head, targets),
        row_weight=weight,
        reduction=reduction,
    )
