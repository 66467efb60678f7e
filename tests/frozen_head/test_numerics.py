"""Where formulas usually break: models near and equal, impossible entries, numbers that are not numbers."""

import math

import pytest
import torch

from tests.frozen_head.calls import loss_from_summary, run, simple, summary_of
from tests.linear_kl.oracle import assert_accurate, oracle


def with_teacher_near(p, gap):
    """The student's head for both, hidden states `gap` apart."""
    hidden = p.tensors["student_hidden"]
    return p.with_tensors(
        teacher_hidden=hidden + gap * torch.randn_like(hidden), teacher_weight=p.tensors["student_weight"]
    )


@pytest.mark.parametrize("gap", [0.0, 1e-3, 0.1])
def test_value_is_as_good_as_a_float32_logsumexp(fused_impl, gap):
    """A few roundings of the largest logit, however small the KL; and never negative."""
    p = with_teacher_near(simple(rows=24, width=64, vocab=2003, reduction="none"), gap)
    exact = oracle(p)
    got = loss_from_summary(p, summary_of(p, fused_impl), fused_impl, p.tensors["student_hidden"])
    assert (got >= 0).all()
    assert (got.double() - exact.loss).abs().max() < 4 * torch.finfo(torch.float32).eps * exact.logit_scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_models(fused_impl, dtype):
    p = simple(dtype=dtype, bias=True, temperature=2.0)
    p = with_teacher_near(p, 0.0).with_tensors(teacher_bias=p.tensors["student_bias"])
    got = run(p, fused_impl)
    assert 0 <= got.loss.item() < 4e-6
    assert got.gradients["student_hidden"].abs().max() < 1e-6


@pytest.mark.parametrize("masked", [slice(0, 2500), slice(700, 2900)], ids=str)
def test_entries_masked_in_both_models(impl, masked):
    p = simple(vocab=3000, bias=True)
    for name in ("student_bias", "teacher_bias"):
        p.tensors[name][masked] = -torch.inf
    assert_accurate(run(p, impl), p)


def test_entry_impossible_for_the_student_only(impl):
    p = simple(bias=True)
    p.tensors["student_bias"][7] = -torch.inf
    assert loss_from_summary(p, summary_of(p, impl), impl, p.tensors["student_hidden"]).item() == math.inf


@pytest.mark.parametrize("name", ["student_hidden", "student_bias", "teacher_hidden", "teacher_weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(impl, name, value):
    p = simple(vocab=3000, bias=True)
    p.tensors[name][5] = value
    hidden = p.tensors["student_hidden"].requires_grad_()
    loss = loss_from_summary(p, summary_of(p, impl), impl, hidden)
    loss.backward()
    assert not loss.isfinite() and not hidden.grad.isfinite().all()


def test_a_row_without_any_entry(impl):
    p = simple(bias=True)
    p.tensors["student_bias"][:] = -torch.inf
    assert not loss_from_summary(p, summary_of(p, impl), impl, p.tensors["student_hidden"]).isfinite()
