"""In somebody's graph: backward passes, autocast, checkpoints, no gradient at all, no rows at all."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from disc_kernels import TeacherSummary
from tests.frozen_head.calls import everything, loss_from_summary, run, simple, summary_of
from tests.linear_kl.oracle import assert_accurate


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward(impl, reduction):
    p = everything(reduction=reduction)
    hidden = p.tensors["student_hidden"].requires_grad_()
    loss = loss_from_summary(p, summary_of(p, impl), impl, hidden).sum()
    (first,) = torch.autograd.grad(loss, [hidden], retain_graph=True)
    kept = first.clone()
    first.zero_()  # whoever received it may do so
    (second,) = torch.autograd.grad(3 * loss, [hidden])
    assert kept.abs().max() > 0
    torch.testing.assert_close(second, 3 * kept)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss, [hidden])


def test_double_backward_is_refused(fused_impl):
    p = simple()
    hidden = p.tensors["student_hidden"].requires_grad_()
    loss = loss_from_summary(p, summary_of(p, fused_impl), fused_impl, hidden)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.autograd.grad(loss, [hidden], create_graph=True)


def test_summary_made_in_inference_mode(impl):
    p = everything()
    with torch.inference_mode():
        summary = summary_of(p, impl, {name: t.clone() for name, t in p.tensors.items()})
    assert summary.embedding.is_inference()
    assert_accurate(run(p, impl, summary=summary), p)


def test_no_gradient_reaches_a_summary_or_its_makers(impl):
    p = everything()
    t = {name: x.clone().requires_grad_() for name, x in p.tensors.items()}
    summary = summary_of(p, impl, t)
    assert not any(x.requires_grad for x in summary)
    asking = TeacherSummary(*(x.requires_grad_() for x in summary))
    loss_from_summary(p, asking, impl, t["student_hidden"]).backward()
    assert t["student_hidden"].grad.abs().max() > 0
    assert all(x.grad is None for x in asking)


@pytest.mark.parametrize("how", [torch.no_grad, torch.inference_mode])
def test_without_gradients(impl, how):
    p = everything()
    hidden = p.tensors["student_hidden"].requires_grad_()
    summary = summary_of(p, impl)
    expected = loss_from_summary(p, summary, impl, hidden)
    with how():
        silent = loss_from_summary(p, summary, impl, hidden)
    assert expected.requires_grad and not silent.requires_grad
    assert not loss_from_summary(p, summary, impl, hidden.detach()).requires_grad
    torch.testing.assert_close(silent.clone(), expected.detach())


def test_checkpoint(fused_impl):
    p = everything()
    hidden = p.tensors["student_hidden"].requires_grad_()
    summary = summary_of(p, fused_impl)
    (expected,) = torch.autograd.grad(loss_from_summary(p, summary, fused_impl, hidden), [hidden])
    checkpoint(lambda h: loss_from_summary(p, summary, fused_impl, h), hidden, use_reentrant=False).backward()
    torch.testing.assert_close(hidden.grad, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_rounds_the_products_and_nothing_else(impl, reduction):
    p = everything(reduction=reduction)
    half = p.with_tensors(**{n: t if n.endswith("bias") else t.bfloat16() for n, t in p.tensors.items()})
    got = run(p, impl, autocast=torch.bfloat16)
    gradient = got.gradients["student_hidden"]
    assert gradient.dtype == torch.float32
    assert_accurate(replace(got, gradients={"student_hidden": gradient.bfloat16()}), half)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(impl, reduction):
    p = simple(student_index=[], teacher_index=[], reduction=reduction)
    hidden = p.tensors["student_hidden"].requires_grad_()
    loss, stats = loss_from_summary(p, summary_of(p, impl), impl, hidden, return_stats=True)
    assert loss.shape == ((0,) if reduction == "none" else ()) and loss.sum().item() == 0.0
    assert {len(x) for x in stats} == {0}
    loss.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_no_rows_to_summarise(impl):
    p = simple().with_tensors(teacher_hidden=torch.empty(0, 24))
    summary = summary_of(p, impl)
    assert [tuple(x.shape) for x in summary] == [(0, 24), (0,), (0,)]
    hidden = torch.empty(0, 24, requires_grad=True)
    loss_from_summary(p, summary, impl, hidden).backward()
    assert hidden.grad.shape == (0, 24)


def test_statistics_are_nobody_elses_memory(impl):
    p = simple(reduction="none")
    summary = summary_of(p, impl)
    loss, stats = loss_from_summary(p, summary, impl, p.tensors["student_hidden"], return_stats=True)
    entropy = summary.entropy.clone()
    for statistic in stats:
        statistic.zero_()
    assert loss.min() > 0 and torch.equal(summary.entropy, entropy)
