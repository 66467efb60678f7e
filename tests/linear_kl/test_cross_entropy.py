"""Cross-entropy from hidden states: exact for every head and dtype, weighted token by token, in bounded memory."""

import re

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from disc_kernels import LogitTransform, fused_cross_entropy
from disc_kernels.linear_kl import products, workspace
from disc_kernels.linear_kl.reference import SMALLEST_TAIL

TOKENS, HIDDEN = 37, 24
TRANSFORMS = [LogitTransform(), LogitTransform(scale=0.25), LogitTransform(scale=2.0, softcap=3.0)]
IGNORED = -100


class Case:
    """Random tokens of two sequences, one in three of which does not count."""

    def __init__(self, entries=301, dtype=torch.float64, bias=True, transform=TRANSFORMS[0], weight_dtype=None):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape, dtype=dtype):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

        self.hidden, self.weight = randn(2, TOKENS, HIDDEN), randn(entries, HIDDEN, dtype=weight_dtype or dtype)
        self.bias = randn(entries) if bias else None
        self.leaves = [leaf for leaf in (self.hidden, self.weight, self.bias) if leaf is not None]
        self.labels = torch.randint(entries, (2, TOKENS), generator=generator)
        self.labels[0, :2] = torch.tensor([0, entries - 1])
        self.labels[:, 2::3] = IGNORED
        self.row_weight = torch.rand(2, TOKENS, generator=generator, dtype=torch.float64)
        self.transform = transform

    def fused(self, **options):
        options = {"row_weight": self.row_weight, "bias": self.bias, "transform": self.transform} | options
        return fused_cross_entropy(self.hidden, self.weight, self.labels, **options)

    def plain(self, vocab_size=None):
        """Every token's loss in float64, and its leaves."""
        hidden, weight = (x.detach().double().requires_grad_() for x in (self.hidden, self.weight))
        bias = None if self.bias is None else self.bias.detach().double().requires_grad_()
        z = hidden.flatten(0, 1) @ weight.T
        z = self.transform.scale * (z if bias is None else z + bias)
        cap = self.transform.softcap
        z = z if cap is None else cap * torch.tanh(z / cap)
        values = cross_entropy(z[:, :vocab_size], self.labels.flatten(), reduction="none").view(2, TOKENS)
        return values, [x for x in (hidden, weight, bias) if x is not None]

    def counted(self):
        """The weights of the tokens that count."""
        return self.row_weight * (self.labels != IGNORED)


def _errors(case, reduction="sum", **options):
    """Relative errors of the loss and of each gradient."""
    loss, (values, leaves) = case.fused(reduction=reduction, **options), case.plain(options.get("vocab_size"))
    if reduction == "none":
        upstream = case.row_weight  # 0 reaches the tokens that do not count
        loss, expected = (loss * upstream).sum(), (values * upstream).sum()
    else:
        expected = (values * case.counted()).sum()
        expected = expected if reduction == "sum" else expected / case.counted().sum()
    gradients = torch.autograd.grad(loss, case.leaves), torch.autograd.grad(expected, leaves)
    return [
        float((got - want).detach().norm() / want.detach().norm())
        for got, want in zip((loss, *gradients[0]), (expected, *gradients[1]), strict=True)
    ]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)]
)
def test_loss_and_gradients(dtype, tolerance, transform, reduction):
    """Measured: 9e-16, 4e-7 and, where a gradient is rounded to bfloat16 once, 1.7e-3."""
    assert max(_errors(Case(dtype=dtype, transform=transform), reduction)) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton(dtype):
    pytest.importorskip("triton")
    case = Case(dtype=dtype, transform=TRANSFORMS[2])
    # Triton's interpreter truncates where a GPU rounds.
    assert max(_errors(case, "mean", impl="triton")) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_reference():
    assert max(_errors(Case(transform=TRANSFORMS[2]), "mean", impl="reference")) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_has_float32_logits(dtype):
    """Logits rounded to bfloat16 would be off by some 1e-3."""
    assert _errors(Case(dtype=dtype, bias=False))[0] < 1e-6


@pytest.mark.parametrize("entries", [2, 3, 64, 65, 2**17 + 1])
def test_small_vocabularies_and_powers_of_two(entries):
    assert max(_errors(Case(entries))) < 1e-13


def test_every_token_has_its_loss_whatever_the_weights():
    case = Case()
    losses, (values, _) = case.fused(reduction="none"), case.plain()
    assert losses.shape == case.labels.shape
    assert torch.allclose(losses, values, rtol=1e-14, atol=0)
    assert (losses[case.labels == IGNORED] == 0).all()


def test_without_weights_it_is_torch_cross_entropy():
    case = Case(bias=False)
    for reduction in ("mean", "sum"):
        z = case.hidden.flatten(0, 1) @ case.weight.T
        expected = cross_entropy(z, case.labels.flatten(), reduction=reduction)
        for labels in (case.labels, case.labels.int()):
            got = fused_cross_entropy(case.hidden, case.weight, labels, reduction=reduction)
            assert torch.allclose(got, expected, rtol=1e-14, atol=0)


def test_another_ignored_label_and_no_token_that_counts():
    case = Case()
    case.labels[case.labels == 300] = 7
    want = case.fused()
    case.labels[case.labels == IGNORED] = 300  # a token too
    keep = torch.where(case.labels == 300, 0.0, case.row_weight)
    assert torch.allclose(case.fused(ignore_index=300), want)
    assert torch.allclose(case.fused(row_weight=keep), want)
    case.labels[:] = 300
    for reduction in ("mean", "sum", "none"):
        loss = case.fused(ignore_index=300, reduction=reduction).sum()
        assert [float(x.abs().sum()) for x in (loss.detach(), *torch.autograd.grad(loss, case.leaves))] == [0.0] * 4


def test_a_part_of_the_vocabulary():
    case = Case()
    case.labels[case.labels >= 290] = 5
    assert max(_errors(case, vocab_size=290)) < 1e-14
    case.labels[0, 0] = 290
    with pytest.raises(ValueError, match="labels: expected rows from 0 to 289 of the vocabulary"):
        case.fused(vocab_size=290)


def test_ignored_tokens_are_not_computed(monkeypatch):
    """On the CPU, where it can be seen which they are."""
    case, rows, multiply_into = Case(), [], products.multiply_into

    def count_rows(out, *operands, **options):
        rows.append(len(out))
        multiply_into(out, *operands, **options)

    monkeypatch.setattr(products, "multiply_into", count_rows)
    with torch.no_grad():
        case.fused()
    assert sum(rows) == int((case.labels != IGNORED).sum())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_in_a_graph(reduction):
    case = Case()
    call = torch.compile(lambda: case.fused(reduction=reduction).sum(), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(call(), case.leaves)
    for gradient, eager in zip(
        got, torch.autograd.grad(case.fused(reduction=reduction).sum(), case.leaves), strict=True
    ):
        torch.testing.assert_close(gradient, eager, rtol=1e-13, atol=1e-15)
    case.labels[0, 0] = 301
    with pytest.raises(RuntimeError, match="labels: expected rows from 0 to 300 of the vocabulary"):
        call()


BAD = {
    "ignore_index": ({"ignore_index": 0.5}, TypeError, "ignore_index: expected an int, got 0.5"),
    "ignore_index of 70 bits": ({"ignore_index": 2**70}, ValueError, "ignore_index: expected an int of 64 bits"),
    "hidden": ({"hidden": torch.zeros(())}, ValueError, "hidden: expected shape [..., D]"),
    "weight": ({"weight": torch.zeros(5, 3)}, ValueError, "hidden: expected last dimension 3, as in weight [5, 3]"),
    "wide hidden": (
        {"hidden": torch.zeros(2, 4).double()},
        TypeError,
        "hidden: expected torch.float32, the dtype of",
    ),
    "labels of another shape": (
        {"labels": torch.zeros(3).long()},
        ValueError,
        "labels: expected shape [2], as hidden",
    ),
    "labels of floats": ({"labels": torch.zeros(2)}, TypeError, "labels: expected dtype torch.int64 or torch.int32"),
    "labels": ({"labels": [0, 1]}, TypeError, "labels: expected a tensor, got list"),
    "bias": ({"bias": torch.zeros(4)}, ValueError, "bias: expected shape [5], got [4]"),
    "transform": ({"transform": 2.0}, TypeError, "transform: expected a LogitTransform, got float"),
    "row_weight": ({"row_weight": torch.ones(3)}, ValueError, "row_weight: expected shape [2]"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction: expected one of 'mean', 'sum'"),
    "vocab_size": (
        {"vocab_size": 6},
        ValueError,
        "vocab_size: expected at most 5 (vocabulary rows: 5 of weight)",
    ),
    "vocab_group": ({"vocab_group": object()}, TypeError, "vocab_group: expected a torch.distributed.ProcessGroup"),
}


@pytest.mark.parametrize("changed, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input(changed, error, message):
    good = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(2).long()}
    fused_cross_entropy(**good)
    with pytest.raises(error, match=re.escape(message)):
        fused_cross_entropy(**{**good, **changed})


def test_a_frozen_head_gets_no_gradient():
    case = Case()
    case.weight.requires_grad_(False)
    case.bias.requires_grad_(False)
    case.fused().backward()
    assert case.weight.grad is None
    assert case.hidden.grad.abs().sum() > 0


def test_a_certain_prediction_and_an_impossible_one():
    """A loss of 0 is 0, and one of 10,000 nats is neither infinite nor capped."""
    labels, transform = torch.tensor([0, 3]), LogitTransform(scale=1e4)
    values = fused_cross_entropy(torch.eye(5)[:2], torch.eye(5), labels, transform=transform, reduction="none")
    assert values.tolist() == [0.0, 1e4]


def test_impossible_entries_of_the_reference():
    """They are in the tail, of which no teacher expects anything."""
    case = Case(transform=TRANSFORMS[0])
    case.bias.data[7] = -torch.inf
    case.labels[case.labels == 7] = 8
    torch.testing.assert_close(case.fused(impl="reference"), case.fused(impl="torch"), rtol=1e-12, atol=0)


def test_one_entry():
    case = Case(entries=1)
    loss = case.fused()
    assert [float(x.detach().abs().sum()) for x in (loss, *torch.autograd.grad(loss, case.leaves))] == [0.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entries_that_are_taken_out(dtype):
    case = Case(dtype=dtype)
    with torch.no_grad():
        case.bias[~torch.isin(torch.arange(len(case.bias)), case.labels)] = -torch.inf
    assert max(_errors(case)) < (1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("label", [-99, -1, 301, 2**40])
def test_labels_that_are_no_entries(label):
    case = Case()
    case.labels[0, 3] = label
    with pytest.raises(ValueError, match="labels: expected rows from 0 to 300 of the vocabulary, got rows from "):
        case.fused()


def test_a_certainty_that_is_none_would_show(monkeypatch):
    monkeypatch.setitem(SMALLEST_TAIL, "forward_kl", 1e-3)
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
    """Workspace, gradients (the weight's once more while it adds up), tokens and row weights."""
    limit, entries, rows = 2**18, 1000, 2000
    monkeypatch.setitem(workspace.DEFAULT_BYTES, "cpu", limit)
    hidden, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(entries, 8, requires_grad=True)
    labels = torch.randint(entries, (rows,))

    def fused():
        fused_cross_entropy(hidden, weight, labels, reduction="sum").backward()

    def plain():
        cross_entropy(hidden @ weight.T, labels, reduction="sum").backward()

    labels_and_weights = 40 * rows
    gradients = 4 * 8 * (2 * rows + 2 * entries)
    assert _peak_bytes(fused) < limit + gradients + labels_and_weights < rows * entries < _peak_bytes(plain)
