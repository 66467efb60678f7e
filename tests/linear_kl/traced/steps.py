"""Take a small model's step for the tests of traced code, and compare it with the eager call."""

import torch
from torch import nn

from disc_kernels import FusedSuffixKLLoss
from tests.linear_kl.oracle import loss_of

V, D = 37, 8
STATS = ("divergence", "student_entropy", "teacher_entropy", "agreement")


class Step(nn.Module):
    """Compute a model's step in small: embedding, linear layer, loss over the head."""

    def __init__(self, dtype=torch.float32, **options):
        super().__init__()
        self.embedding, self.linear, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V)
        self.loss = FusedSuffixKLLoss(return_stats=True, **options)
        self.to(dtype)

    def forward(self, ids, teacher_hidden, teacher_weight, student_index, teacher_index, row_weight):
        loss, stats = self.loss(
            self.linear(self.embedding(ids)),
            self.head.weight,
            teacher_hidden,
            teacher_weight,
            student_bias=self.head.bias,
            student_index=student_index,
            teacher_index=teacher_index,
            row_weight=row_weight,
        )
        return loss, tuple(stats)  # `torch.export.save` takes no named tuple

    @staticmethod
    def inputs(rows, dtype=torch.float32):
        index = torch.randint(2 * rows, (2, rows))
        teacher = torch.randn(2, rows, D).to(dtype), torch.randn(V, D).to(dtype)
        return torch.randint(V, (2, rows)), *teacher, *index, torch.rand(rows) + 0.1


def step_outcome(step, call, *inputs):
    """Return loss, statistics and gradients of the parameters of `step`, by `call(*inputs)`."""
    step.zero_grad()
    loss, stats = call(*inputs)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in step.named_parameters()}
    return {"loss": loss.detach(), **dict(zip(STATS, stats, strict=True)), **gradients}


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def outcome(call, problem):
    """Return loss, statistics and gradients of `call(leaves)`, by name."""
    leaves = problem.leaves()
    loss, stats, *_ = call(leaves)
    asked = [name for name in problem.asks if name in leaves]
    upstream = torch.as_tensor(problem.upstream, dtype=loss.dtype).expand_as(loss)
    gradients = torch.autograd.grad(loss, [leaves[name] for name in asked], upstream)
    assert not any(x.requires_grad for x in stats)
    return {"loss": loss.detach(), **stats._asdict(), **dict(zip(asked, gradients, strict=True))}


def assert_same(got, expected, ulps=1):
    """Assert that two outcomes agree to `ulps` last bits of the largest entry.

    The operator does what the eager call does, in the same order: a fusing compiler rounds only what is around it in
    another way.
    """
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape, name
        size = value.abs().max().item()
        assert size > 0 or name == "agreement", name
        error = (got[name] - value).abs().max().item()
        assert error <= ulps * torch.finfo(value.dtype).eps * size, f"{name}: off by {error:.2e}, size {size:.2e}"


def compare(problem, impl="torch", ulps=1, **options):
    def call(leaves):
        return loss_of(problem, leaves, impl, return_stats=True, **options)

    assert_same(outcome(compiled(call), problem), outcome(call, problem), ulps)
