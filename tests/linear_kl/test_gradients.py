"""Who gets a gradient, and that it is right where rows repeat, weights vanish, and rounding adds up."""

import re
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from disc_kernels import LogitTransform, expected_embedding_kl, fused_suffix_kl, teacher_summary
from tests.linear_kl.oracle import assert_accurate, build, build_everything, loss_of, oracle, run, smallest_workspace

STUDENT = ("student_hidden", "student_weight", "student_bias")


@pytest.mark.parametrize("asks", [c for n in (1, 2) for c in combinations(STUDENT, n)], ids="+".join)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_whoever_asks(impl, reduction, asks):
    problem = replace(build_everything(reduction=reduction), asks=asks)
    got = run(problem, impl)
    assert tuple(got.gradients) == asks
    assert_accurate(got, problem)


def test_nobody_asks(impl):
    problem = replace(build_everything(), asks=())
    assert not loss_of(problem, problem.leaves(), impl).requires_grad


def test_inference_mode(impl):
    problem = build_everything()
    expected = loss_of(problem, problem.leaves(), impl).detach()
    with torch.inference_mode():
        got = loss_of(problem, problem.leaves(), impl)
    torch.testing.assert_close(got.clone(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_grad_gives_the_same_value(impl, reduction):
    problem = build_everything(reduction=reduction)
    leaves = problem.leaves()
    with torch.no_grad():
        silent = loss_of(problem, leaves, impl)
    loss = loss_of(problem, leaves, impl)
    assert not silent.requires_grad
    torch.testing.assert_close(silent, loss.detach(), rtol=1e-6, atol=0.0)


def test_teacher_gets_no_gradient(impl):
    problem = build_everything()
    leaves = {name: t.detach().requires_grad_() for name, t in problem.tensors.items()}
    loss_of(problem, leaves, impl).backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == name.startswith("teacher"), name


def test_only_the_teacher_asks(impl):
    problem = replace(build_everything(), asks=("teacher_hidden", "teacher_weight", "teacher_bias"))
    assert not loss_of(problem, problem.leaves(), impl).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(impl, divergence, reduction):
    """Zero, still part of the graph; every gradient is zero."""
    problem = build(bias=True, student_index=[], teacher_index=[], divergence=divergence, reduction=reduction)
    leaves = problem.leaves()
    loss, stats = loss_of(problem, leaves, impl, return_stats=True)
    assert loss.dtype == torch.float32
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert loss.sum().item() == 0.0
    assert stats.divergence.shape == stats.agreement.shape == (0,)
    (2 * loss.sum()).backward()
    for name in STUDENT:
        assert torch.equal(leaves[name].grad, torch.zeros_like(leaves[name])), name


def test_no_rows_of_hidden_states(impl):
    problem = build(dtype=torch.bfloat16)
    problem = problem.with_tensors(
        **{f"{m}_hidden": problem.tensors[f"{m}_hidden"][:0] for m in ("student", "teacher")}
    )
    leaves = problem.leaves()
    loss = loss_of(problem, leaves, impl)
    loss.backward()
    assert loss.item() == 0.0
    assert leaves["student_hidden"].grad.shape == (0, 24)
    assert torch.equal(leaves["student_weight"].grad, torch.zeros_like(leaves["student_weight"]))


def test_all_rows_masked(impl, divergence):
    """Weights that sum to zero: the mean is zero, not 0/0, and so is its gradient."""
    problem = build(bias=True, row_weight=[0.0] * 6, divergence=divergence)
    leaves = problem.leaves()
    loss = loss_of(problem, leaves, impl)
    loss.backward()
    assert loss.item() == 0.0
    for name in STUDENT:
        assert torch.equal(leaves[name].grad, torch.zeros_like(leaves[name])), name


def test_row_weight_does_not_scale_none(impl):
    problem = build(reduction="none")
    weighted = problem.with_options(row_weight=torch.tensor([0.5, 0.0, 2.0, 0.0, 0.25, 1.0]))
    got, expected = run(weighted, impl), run(problem, impl)
    assert torch.equal(got.loss, expected.loss)
    assert all(torch.equal(got.gradients[name], gradient) for name, gradient in expected.gradients.items())


def test_rows_of_weight_zero_have_no_gradient(impl):
    got = run(build(row_weight=[0.5, 0.0, 2.0, 0.0, 0.25, 1.0]), impl)
    empty = (got.gradients["student_hidden"] == 0).all(-1)
    assert empty.tolist() == [False, True, False, True, False, False]


def test_upstream_gradient_that_misses_rows(impl):
    problem = replace(build(reduction="none", bias=True), upstream=torch.tensor([0.0, -2.0, 0.0, 1.0, 0.5, 0.0]))
    got = run(problem, impl)
    assert_accurate(got, problem)
    assert (got.gradients["student_hidden"] == 0).all(-1).tolist() == [True, False, True, False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_student_row_repeated_across_chunks(fused_impl, dtype, reduction):
    problem = build(
        rows=4, vocab=101, dtype=dtype, student_index=[2, 1] * 24, teacher_index=[0, 1, 2, 3] * 12, reduction=reduction
    )
    problem = problem.with_options(max_workspace_bytes=2 * smallest_workspace(problem, fused_impl))
    assert_accurate(run(problem, fused_impl), problem)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_weight_gradient_is_not_accumulated_in_bfloat16(fused_impl, reduction):
    problem = build(rows=96, vocab=67, dtype=torch.bfloat16, bias=True, reduction=reduction)
    problem = problem.with_options(max_workspace_bytes=2 * smallest_workspace(problem, fused_impl))
    assert_accurate(run(problem, fused_impl), problem)


def test_loss_scaling_reaches_float16_gradients(impl):
    """A GradScaler's factor arrives with the backward: gradients that only it lifts into float16's range survive."""
    problem = replace(build(rows=48, vocab=2003, dtype=torch.float16, temperature=4.0), upstream=2.0**14)
    assert_accurate(run(problem, impl), problem)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(double_impl, divergence, reduction):
    """Finite differences in float64, with repeated rows, weights, biases, temperature and softcap."""
    problem = build(
        rows=3, width=4, vocab=7, dtype=torch.float64, bias=True,
        student_index=[2, 0, 2, 1], teacher_index=[0, 0, 1, 2], row_weight=[0.5, 1.0, 2.0, 0.0],
        divergence=divergence, reduction=reduction, temperature=1.5, beta=0.3, vocab_size=6,
        student_transform=LogitTransform(scale=0.8, softcap=4.0),
    )  # fmt: skip
    leaves = problem.leaves()

    def loss(*asked):
        return fused_suffix_kl(
            **{**leaves, **dict(zip(STUDENT, asked, strict=True))}, **problem.options, impl=double_impl
        )

    assert torch.autograd.gradcheck(loss, [leaves[name] for name in STUDENT])


# Gradients are summed outside the row functions, so Triton's interpreter, which is slow, need not do it twice.
@pytest.mark.parametrize(
    "fused_impl, reduction, dtype",
    [
        ("torch", "mean", torch.bfloat16),
        ("torch", "mean", torch.float16),
        ("torch", "none", torch.bfloat16),
        ("torch", "none", torch.float16),
        ("triton", "mean", torch.bfloat16),
    ],
    indirect=["fused_impl"],
    ids=str,
)
def test_a_row_that_repeats_often(fused_impl, dtype, reduction):
    """In many chunks; a sum of 16-bit numbers is off by ten roundings and more after two hundred of them."""
    rows = 300 if fused_impl == "torch" else 200  # the interpreter is slow
    problem = build(rows=2, width=8, vocab=31, dtype=dtype, student_index=[0] * rows, teacher_index=[1] * rows)
    problem = replace(problem.with_options(reduction=reduction), asks=("student_hidden",))
    if reduction == "none":
        problem = replace(problem, upstream=torch.ones(rows))
    problem = problem.with_options(max_workspace_bytes=smallest_workspace(problem, fused_impl))
    got, exact = run(problem, fused_impl).gradients["student_hidden"], oracle(problem).gradients["student_hidden"]
    assert (got.double() - exact).norm() < torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_row_that_repeats_often_behind_a_frozen_head(dtype):
    """All upstream gradients of one sign, so that their sum grows."""
    generator = torch.Generator().manual_seed(0)
    student, head, teacher = (torch.randn(n, 8, generator=generator).to(dtype) for n in (2, 31, 2))
    index = torch.zeros(600, dtype=torch.int64)
    summary = teacher_summary(teacher, head, head)
    student.requires_grad_()

    def loss(workspace):
        rows = {"student_index": index, "summary_index": index, "reduction": "sum"}
        return expected_embedding_kl(student, head, summary, max_workspace_bytes=workspace, **rows)

    with pytest.raises(ValueError, match="max_workspace_bytes") as refused:
        loss(1)
    smallest = max(map(int, re.findall(r"\d+", str(refused.value))))  # a row at a time
    (got,) = torch.autograd.grad(loss(smallest), [student])
    hidden, w, t = (x.detach().double() for x in (student, head, teacher))
    exact = 600 * ((hidden[0] @ w.T).softmax(-1) - (t[0] @ w.T).softmax(-1)) @ w
    assert (got[0].double() - exact).norm() < 2 * torch.finfo(dtype).eps * exact.norm()
    assert got[1].count_nonzero() == 0
