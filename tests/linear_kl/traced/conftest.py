"""What the tests of traced code share: a model's step in small, and one comparison with the eager call."""

import pytest
import torch
from torch import nn

from disc_kernels import FusedSuffixKLLoss

V, D = 37, 8
STATS = ("divergence", "student_entropy", "teacher_entropy", "agreement")


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()


@pytest.fixture(params=["mean", "sum", "none"])
def reduction(request):
    return request.param


class _Step(nn.Module):
    """A model's step in small: embedding, linear layer, loss over the head."""

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


def _step_outcome(step, call, *inputs):
    """Loss, statistics and gradients of the parameters of `step`, by `call(*inputs)`."""
    step.zero_grad()
    loss, stats = call(*inputs)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in step.named_parameters()}
    return {"loss": loss.detach(), **dict(zip(STATS, stats, strict=True)), **gradients}


def _compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def _outcome(call, problem):
    """Loss, statistics and gradients of `call(leaves)`, by name."""
    leaves = problem.leaves()
    loss, stats, *_ = call(leaves)
    asked = [name for name in problem.asks if name in leaves]
    upstream = torch.as_tensor(problem.upstream, dtype=loss.dtype).expand_as(loss)
    gradients = torch.autograd.grad(loss, [leaves[name] for name in asked], upstream)
    assert not any(x.requires_grad for x in stats)
    return {"loss": loss.detach(), **stats._asdict(), **dict(zip(asked, gradients, strict=True))}


def _assert_same(got, expected, ulps=1):
    """The operator does what the eager call does, in the same order: a fusing compiler rounds only what is around it
    in another way."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape, name
        size = value.abs().max().item()
        assert size > 0 or name == "agreement", name
        error = (got[name] - value).abs().max().item()
        assert error <= ulps * torch.finfo(value.dtype).eps * size, f"{name}: off by {error:.2e}, size {size:.2e}"


def _compare(problem, loss_of, impl="torch", ulps=1, **options):
    def call(leaves):
        return loss_of(problem, leaves, impl, return_stats=True, **options)

    _assert_same(_outcome(_compiled(call), problem), _outcome(call, problem), ulps)


# A conftest cannot be imported from, so what the test files use of it comes as fixtures.


@pytest.fixture
def build_step():
    """Called like the class it is."""
    return _Step


@pytest.fixture
def step_outcome():
    return _step_outcome


@pytest.fixture
def assert_same():
    return _assert_same


@pytest.fixture
def compiled():
    return _compiled


@pytest.fixture
def outcome():
    return _outcome


@pytest.fixture
def compare():
    return _compare
