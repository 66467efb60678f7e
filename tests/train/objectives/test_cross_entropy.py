"""Cross-entropy from hidden states: exact for every head and dtype, weighted row by row, in bounded memory."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from disc_kernels import LogitTransform
from disc_kernels.linear_kl import workspace
from disc_train.models.causal_lm import Head
from disc_train.objectives.cross_entropy import linear_cross_entropy

ROWS, HIDDEN = 37, 24
TRANSFORMS = [LogitTransform(), LogitTransform(scale=0.25), LogitTransform(scale=2.0, softcap=3.0)]


class Case:
    """Random rows, every other one of them compared, in an order of their own."""

    def __init__(self, entries=301, dtype=torch.float64, bias=True, transform=TRANSFORMS[0]):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

        self.hidden, self.weight = randn(2, ROWS, HIDDEN), randn(entries, HIDDEN)
        self.bias = randn(entries) if bias else None
        self.head = Head(self.weight, self.bias, transform)
        self.leaves = [leaf for leaf in (self.hidden, self.weight, self.bias) if leaf is not None]
        self.index = torch.randperm(2 * ROWS, generator=generator)[:ROWS]
        self.targets = torch.randint(entries, (ROWS,), generator=generator)
        self.targets[:2] = torch.tensor([0, entries - 1])
        self.row_weight = torch.rand(ROWS, generator=generator)

    def fused(self, **options):
        options = {"index": self.index, "weight": self.row_weight} | options
        return linear_cross_entropy(self.hidden, self.head, self.targets, **options)

    def plain(self):
        """[M] in float64, and its leaves."""
        hidden, weight = (x.detach().double().requires_grad_() for x in (self.hidden, self.weight))
        bias = None if self.bias is None else self.bias.detach().double().requires_grad_()
        z = hidden.flatten(0, 1)[self.index] @ weight.T
        z = self.head.transform.scale * (z if bias is None else z + bias)
        cap = self.head.transform.softcap
        z = z if cap is None else cap * torch.tanh(z / cap)
        return cross_entropy(z, self.targets, reduction="none"), [x for x in (hidden, weight, bias) if x is not None]


def _errors(case):
    """Relative errors of the weighted sum and of each gradient."""
    loss, (values, leaves) = case.fused(), case.plain()
    expected = (values * case.row_weight).sum()
    gradients = torch.autograd.grad(loss, case.leaves), torch.autograd.grad(expected, leaves)
    return [
        float((got - want).detach().norm() / want.detach().norm())
        for got, want in zip((loss, *gradients[0]), (expected, *gradients[1]), strict=True)
    ]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)]
)
def test_loss_and_gradients(dtype, tolerance, transform):
    """Measured: 9e-16, 4e-7 and, where a gradient is rounded to bfloat16 once, 1.7e-3."""
    assert max(_errors(Case(dtype=dtype, transform=transform))) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_has_float32_logits(dtype):
    """Logits rounded to bfloat16 would be off by some 1e-3."""
    assert _errors(Case(dtype=dtype, bias=False))[0] < 1e-6


@pytest.mark.parametrize("entries", [2, 3, 64, 65, 2**17 + 1])
def test_small_vocabularies_and_powers_of_two(entries):
    assert max(_errors(Case(entries))) < 1e-13


def test_row_by_row_the_weights_do_not_count():
    case = Case()
    values, _ = case.plain()
    assert torch.allclose(case.fused(reduction="none"), values, rtol=1e-14, atol=0)


def test_a_frozen_head_gets_no_gradient():
    case = Case()
    case.weight.requires_grad_(False)
    case.bias.requires_grad_(False)
    case.fused().backward()
    assert case.weight.grad is None
    assert case.hidden.grad.abs().sum() > 0


def test_no_rows():
    case = Case()
    none = torch.zeros(0, dtype=torch.int64)
    loss = linear_cross_entropy(case.hidden, case.head, none, index=none)
    loss.backward()
    assert float(loss.detach()) == float(case.hidden.grad.abs().sum()) == 0


def test_a_certain_prediction_and_an_impossible_one():
    """A loss of 0 is 0, and one of 10,000 nats is neither infinite nor capped."""
    head = Head(torch.eye(5), None, LogitTransform(scale=1e4))
    values = linear_cross_entropy(torch.eye(5)[:2], head, torch.tensor([0, 3]), reduction="none")
    assert values.tolist() == [0.0, 1e4]


def test_one_entry():
    case = Case(entries=1)
    loss = case.fused()
    assert [float(x.detach().abs().sum()) for x in (loss, *torch.autograd.grad(loss, case.leaves))] == [0.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entries_that_are_taken_out(dtype):
    case = Case(dtype=dtype)
    with torch.no_grad():
        case.bias[~torch.isin(torch.arange(len(case.bias)), case.targets)] = -torch.inf
    assert max(_errors(case)) < (1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("target", [-100, -1, 301, 2**40])
def test_targets_that_are_no_entries(target):
    case = Case()
    case.targets[3] = target
    with pytest.raises(ValueError, match="targets: expected rows from 0 to 300 of the head's weight, got rows from "):
        case.fused()


def test_a_certainty_that_is_none_would_show(monkeypatch):
    monkeypatch.setattr("disc_train.objectives.cross_entropy.ONE_HOT", LogitTransform(scale=2.0))
    assert _errors(Case())[0] > 1e-4


def _peak_bytes(function):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        kept = function()
    now = peak = 0
    for event in sorted((e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"), key=_start):
        now += event.nbytes()
        peak = max(peak, now)
    del kept
    return peak


def _start(event):
    return event.start_ns()


def test_memory_does_not_grow_with_the_rows(monkeypatch):
    """Workspace, gradients (the weight's once more while it adds up), codes of 10 digits. Measured: 412,024."""
    limit, entries, rows = 2**18, 1000, 2000
    monkeypatch.setitem(workspace.DEFAULT_BYTES, "cpu", limit)
    hidden, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(entries, 8, requires_grad=True)
    targets = torch.randint(entries, (rows,))
    head = Head(weight, None, LogitTransform())

    def fused():
        linear_cross_entropy(hidden, head, targets).backward()

    def plain():
        cross_entropy(hidden @ weight.T, targets, reduction="sum").backward()

    codes = 4 * 10 * (rows + entries)
    gradients = 4 * 8 * (2 * rows + 2 * entries)
    assert _peak_bytes(fused) < limit + gradients + codes < rows * entries < _peak_bytes(plain)
