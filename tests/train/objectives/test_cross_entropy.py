"""Cross-entropy of chosen rows, some of them chosen twice: what a head makes of them is tests/linear_kl's."""

import torch
from torch.nn.functional import cross_entropy

from disc_kernels import LogitTransform
from disc_kernels.hf import OutputHead
from disc_train.objectives.cross_entropy import linear_cross_entropy


def test_rows_and_weights():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    hidden.requires_grad_()
    index, targets = torch.tensor([7, 0, 7, 3]), torch.tensor([2, 10, 0, 5])
    row_weight = torch.tensor([0.5, 1.0, 0.0, 2.0], dtype=torch.float64)
    values = cross_entropy(0.5 * hidden.flatten(0, 1)[index] @ weight.T, targets, reduction="none")
    head = OutputHead(weight, None, LogitTransform(scale=0.5))
    loss = linear_cross_entropy(hidden, head, targets, index=index, weight=row_weight)
    got, want = (torch.autograd.grad(x, hidden)[0] for x in (loss, (values * row_weight).sum()))
    torch.testing.assert_close(got, want)
    every = linear_cross_entropy(hidden, head, targets, index=index, weight=row_weight, reduction="none")
    torch.testing.assert_close(every, values)
