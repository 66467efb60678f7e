"""One node among others in somebody's graph: used twice, shared, hooked, checkpointed, under autocast."""

import functools
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from disc_kernels import fused_suffix_kl
from tests.linear_kl.oracle import assert_accurate, build, build_everything, loss_of, oracle, run

STUDENT = ("student_hidden", "student_weight", "student_bias")


@pytest.fixture(params=["mean", "none"])
def reduction(request):
    return request.param


def gradients_of(leaves):
    return {name: leaves[name].grad.clone() for name in STUDENT if name in leaves}


def assert_same(got, expected, rtol=1e-5):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error, size = (got[name] - value).abs().max().item(), value.abs().max().item()
        assert size > 0, name
        assert error <= rtol * size, f"{name}: off by {error:.2e}, size {size:.2e}"


@pytest.fixture
def call(impl, reduction):
    """The problem, and the function that gives its loss from leaves."""
    problem = build_everything(reduction=reduction)

    def loss(leaves):
        return loss_of(problem, leaves, impl).sum()

    return problem, loss


@pytest.fixture
def expected(impl, reduction):
    """The gradients of one backward, which no test changes."""
    return _expected(impl, reduction)


@functools.cache
def _expected(impl, reduction):
    leaves = build_everything(reduction=reduction).leaves()
    loss_of(build_everything(reduction=reduction), leaves, impl).sum().backward()
    return gradients_of(leaves)


def test_second_backward_is_the_same_or_refused(call, expected):
    problem, loss = call
    leaves = problem.leaves()
    value = loss(leaves)
    value.backward(retain_graph=True)
    assert_same(gradients_of(leaves), expected)
    for leaf in leaves.values():
        leaf.grad = None
    try:
        (3 * value).backward()
    except RuntimeError:
        return
    assert_same(gradients_of(leaves), {name: 3 * g for name, g in expected.items()})


def test_gradients_received_stay_what_they_were(call, expected):
    """Scaling a received gradient in place must not reach what a second backward gives."""
    problem, loss = call
    leaves = problem.leaves()
    value = loss(leaves)
    asked = [leaves[name] for name in STUDENT]
    for gradient in torch.autograd.grad(value, asked, retain_graph=True):
        gradient.zero_()
    try:
        again = torch.autograd.grad(value, asked)
    except RuntimeError:
        return
    assert_same(dict(zip(STUDENT, again, strict=True)), expected)


def test_double_backward_is_refused(fused_impl, reduction):
    problem = build_everything(reduction=reduction)
    leaves = problem.leaves()
    loss = loss_of(problem, leaves, fused_impl).sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.autograd.grad(loss, [leaves["student_hidden"]], create_graph=True)


def test_freed_graph_is_refused(call):
    problem, loss = call
    value = loss(problem.leaves())
    value.backward()
    with pytest.raises(RuntimeError):
        value.backward()


def test_input_changed_between_forward_and_backward(call, expected):
    """Either the gradient of the forward that ran, or an error: what autograd promises for saved tensors."""
    problem, loss = call
    leaves = {name: t.detach().clone().requires_grad_(name in STUDENT) for name, t in problem.tensors.items()}
    value = loss(leaves)
    with torch.no_grad():
        for leaf in leaves.values():
            leaf.mul_(3.0)
    try:
        value.backward()
    except RuntimeError:
        return
    assert_same(gradients_of(leaves), expected)


def test_gradients_accumulate_over_backward_calls(call, expected):
    problem, loss = call
    leaves = problem.leaves()
    for _ in range(2):
        loss(leaves).backward()
    assert_same(gradients_of(leaves), {name: 2 * g for name, g in expected.items()})


def test_two_calls_in_one_graph(call, expected):
    problem, loss = call
    leaves = problem.leaves()
    first, second = loss(leaves), loss(leaves)
    (first - 0.25 * second).backward()
    assert_same(gradients_of(leaves), {name: 0.75 * g for name, g in expected.items()})


def test_weight_used_elsewhere_too(call, expected):
    """A head tied to the embeddings, say."""
    problem, loss = call
    leaves = problem.leaves()
    (loss(leaves) + leaves["student_weight"].square().sum()).backward()
    tied = expected["student_weight"] + 2 * leaves["student_weight"].detach()
    assert_same(gradients_of(leaves), {**expected, "student_weight": tied})


def test_one_weight_for_both_models(impl, reduction):
    """The same parameter on both sides learns as the student's only."""
    problem = build(reduction=reduction, bias=True)
    shared = {f"teacher_{part}": problem.tensors[f"student_{part}"] for part in ("weight", "bias")}
    problem = replace(problem.with_tensors(**shared), upstream=1.0)
    leaves = problem.leaves()
    leaves |= {f"teacher_{part}": leaves[f"student_{part}"] for part in ("weight", "bias")}
    loss_of(problem, leaves, impl).sum().backward()
    exact = oracle(problem).gradients
    assert_same(gradients_of(leaves), {name: gradient.float() for name, gradient in exact.items()}, rtol=1e-4)


def test_hooks_see_the_gradients(call, expected):
    problem, loss = call
    leaves = problem.leaves()
    seen: list[torch.Tensor] = []
    leaves["student_hidden"].register_hook(seen.append)
    value = loss(leaves)
    value.register_hook(lambda g: 0.5 * g)
    value.backward()
    (hidden,) = seen
    assert_same({**gradients_of(leaves), "student_hidden": hidden}, {name: 0.5 * g for name, g in expected.items()})


def test_inputs_that_are_not_leaves(call, expected):
    problem, loss = call
    leaves = problem.leaves()
    loss({name: 2 * t if name in STUDENT else t for name, t in leaves.items()}).backward()
    doubled = problem.with_tensors(**{name: 2 * problem.tensors[name] for name in STUDENT}).leaves()
    loss(doubled).backward()
    assert_same(gradients_of(leaves), {name: 2 * g for name, g in gradients_of(doubled).items()})


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(call, expected, use_reentrant):
    problem, loss = call
    leaves = problem.leaves()
    names = list(leaves)

    def segment(*tensors):
        return loss(dict(zip(names, tensors, strict=True)))

    checkpoint(segment, *leaves.values(), use_reentrant=use_reentrant).backward()
    assert_same(gradients_of(leaves), expected)


def test_autocast_rounds_the_products_and_nothing_else(impl, divergence, reduction):
    """Float32 parameters under bfloat16 autocast: the bfloat16 problem, with float32 gradients."""
    problem = build_everything(divergence=divergence, reduction=reduction)
    half = problem.with_tensors(**{n: t if n.endswith("bias") else t.bfloat16() for n, t in problem.tensors.items()})
    got = run(problem, impl, autocast=torch.bfloat16)
    assert all(gradient.dtype == torch.float32 for gradient in got.gradients.values())
    rounded = {name: gradient.to(half.tensors[name].dtype) for name, gradient in got.gradients.items()}
    assert_accurate(replace(got, gradients=rounded), half)


def test_autocast_allows_hidden_states_of_its_dtype_with_float32_weights(impl):
    """What a model under autocast returns."""
    problem = build(dtype=torch.bfloat16)
    float_weights = {n: problem.tensors[n].float() for n in ("student_weight", "teacher_weight")}
    got = run(problem.with_tensors(**float_weights), impl, autocast=torch.bfloat16)
    assert got.gradients["student_weight"].dtype == torch.float32
    assert got.gradients["student_hidden"].dtype == torch.bfloat16
    rounded = {name: gradient.bfloat16() for name, gradient in got.gradients.items()}
    assert_accurate(replace(got, gradients=rounded), problem)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_teacher_from_inference_mode(reduction):
    """The usual way to run a frozen teacher; its tensors are not ones that autograd saves."""
    problem = build(reduction=reduction)
    leaves = problem.leaves()
    with torch.inference_mode():
        leaves |= {name: leaves[name].clone() for name in ("teacher_hidden", "teacher_weight")}
    fused_suffix_kl(**leaves, **problem.options, impl="torch").sum().backward()
    expected = problem.leaves()
    fused_suffix_kl(**expected, **problem.options, impl="reference").sum().backward()
    assert_same({n: leaves[n].grad for n in STUDENT[:2]}, {n: expected[n].grad for n in STUDENT[:2]})


def test_teacher_may_change_before_the_first_backward():
    """A moving-average teacher is updated in place; the gradients were computed in the forward."""
    problem = build(reduction="mean")
    leaves = problem.leaves()
    loss = fused_suffix_kl(**leaves, **problem.options, impl="torch")
    leaves["teacher_weight"].mul_(0.5)
    loss.backward()
    unchanged = problem.leaves()
    unchanged["teacher_weight"] = problem.tensors["teacher_weight"] * 2  # `leaves` shared its memory
    fused_suffix_kl(**unchanged, **problem.options, impl="torch").backward()
    assert_same(gradients_of(leaves), gradients_of(unchanged))
