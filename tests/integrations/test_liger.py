"""Liger's distillation losses and the modules that replace them: the same values and gradients."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

from disc_kernels.integrations import liger as ours

M, V, D_S, D_T = 9, 37, 8, 12


def inputs(dtype=torch.float32, teacher_entries=V):
    """Make hidden states and heads of two models, labels of which two do not count, and biases."""
    student = [torch.randn(M, D_S, dtype=dtype), torch.randn(V, D_S, dtype=dtype)]
    teacher = [torch.randn(M, D_T, dtype=dtype), torch.randn(teacher_entries, D_T, dtype=dtype)]
    labels = torch.randint(0, V, (M,)).index_fill(0, torch.tensor([2, 7]), -100)
    biases = [torch.randn(V, dtype=dtype), torch.randn(teacher_entries, dtype=dtype)]
    return [x.requires_grad_() for x in student], teacher, labels, [biases[0].requires_grad_(), biases[1]]


def assert_same(ours, theirs, wanted):
    """Compare losses, and their gradients scaled by a factor that is not 1."""
    torch.testing.assert_close(ours, theirs, check_dtype=False, rtol=1e-5, atol=1e-6)
    for got, expected in zip(*(torch.autograd.grad(3 * x, wanted) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def generalised_jsd(student, teacher, beta):
    """Compute each row's divergence as the papers write it; 0 and 1 are the two KLs."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta in (0, 1):
        log_q, log_p = (log_q, log_p) if beta == 0 else (log_p, log_q)
        return kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    mixture = ((1 - beta) * log_q.exp() + beta * log_p.exp()).log()
    of_teacher, of_student = (kl_div(mixture, x, reduction="none", log_target=True).sum(-1) for x in (log_p, log_q))
    return beta * of_teacher + (1 - beta) * of_student


@pytest.fixture
def liger():
    """Import what needs Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    return pytest.importorskip("liger_kernel.transformers")


CASES = [(0.0, 1.0), (0.3, 2.0), (0.5, 1.0), (1.0, 0.7)]  # beta, temperature


@pytest.mark.parametrize(("beta", "temperature"), CASES)
@pytest.mark.parametrize("labelled", [True, False])
def test_jsd_in_float64(beta, temperature, labelled):
    student, teacher, labels, _ = inputs(torch.float64)
    loss = ours.LigerFusedLinearJSD(beta, temperature=temperature)(*student, *teacher, labels if labelled else None)
    rows = generalised_jsd(student[0] @ student[1].T / temperature, teacher[0] @ teacher[1].T / temperature, beta)
    assert_same(loss, rows[labels != -100].mean() if labelled else rows.mean(), student)


@pytest.mark.parametrize(("beta", "temperature"), CASES)
def test_jsd(liger, beta, temperature, ignore_index=5):
    student, teacher, labels, _ = inputs()
    options = {"jsd_beta": beta, "temperature": temperature, "ignore_index": ignore_index}
    labels = labels.masked_fill(labels == -100, ignore_index)
    losses = (module.LigerFusedLinearJSD(**options)(*student, *teacher, labels) for module in (ours, liger))
    assert_same(*losses, student)


@pytest.mark.parametrize(("reduction", "temperature"), [("batchmean", 1.0), ("mean", 2.0), ("sum", 0.7)])
def test_kl_to_given_probabilities(liger, reduction, temperature):
    student, teacher, labels, _ = inputs()
    target = (teacher[0] @ teacher[1].T).softmax(-1)
    target[:, 3] = 0
    target /= target.sum(-1, keepdim=True)
    for shift_labels in (labels, None):
        kinds = (module.LigerFusedLinearKLDivLoss for module in (ours, liger))
        losses = (kind(reduction, temperature=temperature)(*student, target, shift_labels) for kind in kinds)
        assert_same(*losses, student)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_rows_of_any_mass(liger, reduction):
    """A row of zeros is one that a data set of soft labels leaves out; it still counts in the mean."""
    student, teacher, labels, _ = inputs()
    mass = torch.tensor([1, 0, 0, 0.5, 1, 1.7, 1, 1, 1])
    target = mass.unsqueeze(1) * (teacher[0] @ teacher[1].T).softmax(-1)
    losses = (m.LigerFusedLinearKLDivLoss(reduction)(*student, target, labels) for m in (ours, liger))
    assert_same(*losses, student)
    student, target = [x.detach().double().requires_grad_() for x in student], target.double()
    loss = ours.LigerFusedLinearKLDivLoss(reduction, temperature=2.0)(*student, target)
    expected = kl_div((student[0] @ student[1].T / 2).log_softmax(-1), target, reduction="sum")
    expected = expected / {"batchmean": M, "mean": M * V, "sum": 1}[reduction]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(x, student) for x in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_what_reduces_to_no_scalar_is_refused():
    with pytest.raises(ValueError, match=r"reduction: expected 'batchmean', 'mean' or 'sum', got 'none'"):
        ours.LigerFusedLinearKLDivLoss("none")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize(("beta", "temperature"), CASES)
def test_chunked_jsd(bias, weights, beta, temperature):
    """Chunks of Liger's are of three rows, so that the last is not full."""
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    student, teacher, labels, biases = inputs()
    biases = biases if bias else [None, None]
    options = {"beta": beta, "temperature": temperature, "compiled": False, "chunk_size": 3}
    modules = (module.LigerFusedLinearJSDLoss(*weights, **options) for module in (ours, chunked_loss))
    losses = (module(*student, *teacher, labels, *biases) for module in modules)
    assert_same(*losses, [*student, *biases[: int(bias)]])


@pytest.mark.parametrize("bias", [True, False])
def test_chunked_jsd_in_float64(bias):
    student, teacher, labels, biases = inputs(torch.float64)
    module = ours.LigerFusedLinearJSDLoss(0.3, 0.7, beta=0.2, temperature=2.0, return_soft_hard_loss=True)
    loss, soft, hard = module(*student, *teacher, labels, *(biases if bias else ()))
    logits = [h @ w.T + (b if bias else 0) for (h, w), b in zip((student, teacher), biases, strict=True)]
    expected = cross_entropy(logits[0], labels)
    torch.testing.assert_close(hard, expected)
    expected_soft = generalised_jsd(logits[0] / 2, logits[1] / 2, 0.2)[labels != -100].mean()
    torch.testing.assert_close(soft, expected_soft)
    assert_same(loss, 0.3 * expected + 0.7 * expected_soft, [*student, *biases[: int(bias)]])


@pytest.mark.parametrize("bias", [True, False])
def test_a_padded_teacher(bias):
    """Liger gives a student's missing entries logits of 0."""
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    student, teacher, labels, biases = inputs(teacher_entries=V + 3)
    biases = biases if bias else [None, None]
    modules = (module.LigerFusedLinearJSDLoss(compiled=False) for module in (ours, chunked_loss))
    assert_same(*(module(*student, *teacher, labels, *biases) for module in modules), [*student, *biases[: int(bias)]])


def test_where_all_labels_are_ignored_the_loss_is_zero():
    student, teacher, labels, _ = inputs()
    target = (teacher[0] @ teacher[1].T).softmax(-1)
    labels = torch.full_like(labels, -100)
    for loss in (
        ours.LigerFusedLinearJSD()(*student, *teacher, labels),
        ours.LigerFusedLinearJSDLoss()(*student, *teacher, labels),
        ours.LigerFusedLinearKLDivLoss()(*student, target, labels),
    ):
        assert loss == 0
        assert all(not x.any() for x in torch.autograd.grad(loss, student))


def test_under_autocast():
    """Weights stay in float32, products take 16 bits, and gradients come back in float32."""
    student, teacher, labels, biases = inputs()
    exact = ours.LigerFusedLinearJSDLoss()(*student, *teacher, labels, *biases)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours.LigerFusedLinearJSDLoss()(*student, *teacher, labels, *biases)
    assert 0 < abs(loss - exact) < 0.02 * exact
    for got, expected in zip(*(torch.autograd.grad(x, student) for x in (loss, exact)), strict=True):
        assert got.dtype == torch.float32
        assert (got - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("name", ["LigerFusedLinearJSD", "LigerFusedLinearKLDivLoss", "LigerFusedLinearJSDLoss"])
def test_arguments_are_those_of_liger(liger, name):
    """Whatever is given by place or by name means the same."""
    home = pytest.importorskip("liger_kernel.chunked_loss") if name.endswith("JSDLoss") else liger
    mine, theirs = getattr(ours, name), getattr(home, name)
    assert issubclass(mine, nn.Module)
    for method in ("__init__", "forward"):
        signatures = (inspect.signature(getattr(kind, method)).parameters.values() for kind in (mine, theirs))
        names, expected = ([(p.name, p.default) for p in signature] for signature in signatures)
        assert [n for n, _ in names] == [n for n, _ in expected]
        if method == "__init__":
            assert names == expected
