"""Where formulas usually break: far apart, nearly equal, equal, impossible entries, numbers that are not numbers."""

from dataclasses import replace

import pytest
import torch

from disc_kernels import LogitTransform
from tests.linear_kl.oracle import assert_accurate, build, loss_of, oracle, run

FLOAT32_EPS = torch.finfo(torch.float32).eps


def with_logits(student, teacher, **options):
    """A problem whose logits are exactly these [M, V] numbers: the hidden states are the identity."""
    identity = torch.eye(len(student), dtype=student.dtype)
    problem = build(rows=len(student), width=len(student), vocab=student.shape[1], **options)
    return problem.with_tensors(
        student_hidden=identity, student_weight=student.T, teacher_hidden=identity, teacher_weight=teacher.T
    )


@pytest.mark.parametrize("vocab", [31, 4099])
def test_logits_ten_thousand_apart(impl, divergence, vocab):
    """Both models certain, in places 10^4 nats apart; then certain of the same entry."""
    student, teacher = torch.randn(2, 4, vocab)
    rows = torch.arange(4)
    student[rows, [0, 5, vocab - 1, 7]] += 1e4
    teacher[rows, [3, vocab - 1, 2, 7]] += 1e4
    problem = with_logits(student, teacher, divergence=divergence, reduction="none")
    got = run(problem, impl)
    assert_accurate(got, problem)
    assert got.loss[:3].min() > 0.6
    assert got.loss[3].item() == 0.0


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_logits_far_from_zero(impl, divergence, offset):
    """A constant added to every logit changes nothing: the same float32 numbers, shifted exactly."""
    student, teacher = torch.randint(-64, 64, (2, 4, 1003)) / 16
    near = with_logits(student, teacher, divergence=divergence, reduction="none")
    far = with_logits(student + offset, teacher - offset, divergence=divergence, reduction="none")
    got = [loss_of(problem, problem.tensors, impl) for problem in (near, far)]
    torch.testing.assert_close(got[1], got[0], rtol=1e-5, atol=0.0)


def test_logits_beyond_float16(impl, divergence):
    """Float16 inputs whose products float16 cannot hold."""
    small = LogitTransform(scale=1e-4)
    problem = build(dtype=torch.float16, divergence=divergence, student_transform=small, teacher_transform=small)
    far = problem.with_tensors(**{name: 200 * t for name, t in problem.tensors.items()})
    assert (far.tensors["student_hidden"].float() @ far.tensors["student_weight"].float().T).abs().max() > 2**17
    far = replace(far, asks=("student_weight",), upstream=1e4)  # above what float16 rounds away
    assert_accurate(run(far, impl), far)


@pytest.mark.parametrize("vocab, temperature", [(1000, 0.5), (1000, 1.0), (32003, 2.0)])
def test_nearly_identical_distributions(fused_impl, divergence, vocab, temperature):
    """A KL of about 10^-10 nats.

    Float32 log-probabilities are off by more than 10^-7, so sum p (log p - log q) says nothing. In a formula without
    that cancellation, what is left is the common rounding of a row's log-normaliser, squared.
    """
    teacher = torch.randn(4, vocab)
    student = teacher + 1.4e-5 * temperature * torch.randn(4, vocab)
    problem = with_logits(student, teacher, divergence=divergence, reduction="none", temperature=temperature)
    exact, got = oracle(problem).loss, run(problem, fused_impl).loss
    assert exact.min() > 1e-11 and exact.max() < 4e-10
    error = (got.double() - exact).abs()
    budget = 0.02 * exact + (4 * FLOAT32_EPS) ** 2
    assert (error <= budget).all(), f"expected {exact.tolist()}, got {got.tolist()}"


@pytest.mark.parametrize("gap", [0.0, 1e-7, 3e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("vocab", [3, 517])
def test_never_negative(fused_impl, divergence, vocab, gap):
    """Rounding alone makes one row in some hundreds negative; the interpreter is too slow for so many."""
    rows = 1500 if fused_impl == "torch" else 6
    teacher = 3 * torch.randn(rows, vocab)
    student = teacher + gap * torch.randn(rows, vocab)
    problem = with_logits(student, teacher, divergence=divergence, reduction="none")
    assert (loss_of(problem, problem.tensors, fused_impl) >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_identical_models(fused_impl, divergence, dtype, temperature):
    """At most the square of the logits' rounding, and no gradient to speak of."""
    problem = build(
        dtype=dtype, vocab=2003, bias=True, divergence=divergence, reduction="none", temperature=temperature
    )
    problem = problem.with_tensors(
        **{f"teacher_{n}": problem.tensors[f"student_{n}"] for n in ("hidden", "weight", "bias")}
    )
    got = run(problem, fused_impl)
    assert (got.loss >= 0).all()
    assert got.loss.max() <= 1e-11
    assert all(gradient.abs().max() <= 1e-6 for gradient in got.gradients.values())
    assert torch.equal(got.stats["agreement"], torch.ones(6))
    assert torch.equal(got.stats["student_entropy"], got.stats["teacher_entropy"])


@pytest.mark.parametrize("masked", [slice(0, 2500), slice(2000, 3000), slice(700, 2900), slice(1, None)], ids=str)
def test_entries_masked_in_both_models(impl, divergence, masked):
    """A bias of -inf takes an entry out of both vocabularies, whole tiles of them too."""
    problem = build(vocab=3000, bias=True, divergence=divergence)
    biases = {name: problem.tensors[name].clone() for name in ("student_bias", "teacher_bias")}
    for bias in biases.values():
        bias[masked] = -torch.inf
    problem = problem.with_tensors(**biases)
    got = run(problem, impl)
    if masked == slice(1, None):
        assert abs(got.loss.item()) < 1e-6  # one entry left: both are certain of it
    else:
        assert_accurate(got, problem)
    for name in ("student_weight", "student_bias"):
        assert torch.equal(got.gradients[name][masked], torch.zeros_like(got.gradients[name][masked]))


@pytest.mark.parametrize(
    "divergence, model", [("forward_kl", "teacher"), ("reverse_kl", "student"), ("jsd", "teacher"), ("jsd", "student")]
)
def test_entries_masked_in_one_model(impl, divergence, model):
    """Where the divergence exists, 0 log 0 counts nothing."""
    problem = build(vocab=3000, bias=True, divergence=divergence, beta=0.3)
    bias = problem.tensors[f"{model}_bias"].clone()
    bias[:2100] = -torch.inf
    problem = problem.with_tensors(**{f"{model}_bias": bias})
    assert_accurate(run(problem, impl), problem)


@pytest.mark.parametrize("divergence, model", [("forward_kl", "student"), ("reverse_kl", "teacher")])
def test_impossible_where_the_other_model_is_not(impl, divergence, model):
    problem = build(bias=True, divergence=divergence)
    problem.tensors[f"{model}_bias"][7] = -torch.inf
    assert not loss_of(problem, problem.tensors, impl).isfinite()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_what_is_not_finite_is_not_hidden(impl, divergence, value, tensor, model):
    problem = build(vocab=3000, bias=True, divergence=divergence, reduction="none")
    problem.tensors[f"{model}_{tensor}"][5] = value
    loss = loss_of(problem, problem.leaves(), impl)
    assert not loss[5].isfinite()
    total = loss_of(problem, problem.leaves(), impl, reduction="mean")
    assert not total.isfinite()


def test_nan_is_not_hidden_by_a_softcap(impl, divergence):
    problem = build(divergence=divergence, student_transform=LogitTransform(softcap=3.0))
    problem.tensors["student_weight"][999] = torch.nan
    assert not loss_of(problem, problem.tensors, impl).isfinite()


def test_gradient_is_not_finite_where_the_loss_is_not(impl, divergence):
    problem = build(divergence=divergence)
    problem.tensors["teacher_hidden"][2, 3] = torch.nan
    leaves = problem.leaves()
    loss_of(problem, leaves, impl).backward()
    assert not leaves["student_hidden"].grad.isfinite().all()
    assert not leaves["student_weight"].grad.isfinite().all()


def test_what_is_left_out_may_hold_anything(impl, divergence):
    """Rows no index names and entries beyond vocab_size are never read into a result, NaN or not."""
    problem = build(bias=True, vocab_size=900, student_index=[1, 3], teacher_index=[0, 4], divergence=divergence)
    poisoned = {name: t.clone() for name, t in problem.tensors.items()}
    for name, t in poisoned.items():
        t[[2, 5] if name.endswith("hidden") else slice(900, None)] = torch.nan
    got = run(problem.with_tensors(**poisoned), impl)
    assert_accurate(got, problem)
    assert torch.equal(got.gradients["student_weight"][900:], torch.zeros(100, 24))
    assert torch.equal(got.gradients["student_bias"][900:], torch.zeros(100))
    assert torch.equal(got.gradients["student_hidden"][[0, 2, 4, 5]], torch.zeros(4, 24))
