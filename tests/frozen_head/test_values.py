"""The frozen-head form gives what the full softmaxes of both models give: same oracle, same comparison."""

from dataclasses import replace

import pytest
import torch

from disc_kernels import TeacherSummary, fused_suffix_kl
from tests.frozen_head.calls import everything, loss_from_summary, run, simple, smallest, summary_of
from tests.linear_kl.oracle import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_everything_at_once(impl, dtype, reduction):
    p = everything(dtype, reduction=reduction)
    assert_accurate(run(p, impl), p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_but_defaults(impl, dtype):
    p = simple(dtype=dtype)
    assert_accurate(run(p, impl), p)


@pytest.mark.parametrize("vocab", [2, 31, 2048, 4099])
def test_vocabulary(fused_impl, vocab):
    p = simple(vocab=vocab, bias=True)
    assert_accurate(run(p, fused_impl), p)


def test_vocabulary_of_one_entry(impl):
    got = run(simple(vocab=1), impl)
    assert got.loss.item() < 1e-6 and got.gradients["student_hidden"].abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("workspaces", [1, 2.5])
def test_chunks(fused_impl, dtype, workspaces):
    p = everything(dtype)
    summary = summary_of(p, fused_impl, max_workspace_bytes=int(workspaces * smallest(summary_of, p, fused_impl)))
    hidden = p.tensors["student_hidden"]
    workspace = int(workspaces * smallest(loss_from_summary, p, summary, fused_impl, hidden))
    assert_accurate(run(p, fused_impl, summary=summary, max_workspace_bytes=workspace), p)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_float64_is_the_full_softmaxes(double_impl, reduction):
    p = everything(torch.float64, reduction=reduction)
    leaves = p.leaves()
    expected = fused_suffix_kl(**leaves, **p.options, impl="reference")
    expected.sum().backward()
    hidden = p.tensors["student_hidden"].detach().requires_grad_()
    loss = loss_from_summary(p, summary_of(p, double_impl), double_impl, hidden)
    loss.sum().backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hidden.grad, leaves["student_hidden"].grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(double_impl, reduction):
    p = everything(torch.float64, rows=6, width=4, vocab=23, teacher_vocab=19, vocab_size=17, reduction=reduction)
    hidden = p.tensors["student_hidden"].requires_grad_()
    summary = summary_of(p, double_impl)
    assert torch.autograd.gradcheck(lambda h: loss_from_summary(p, summary, double_impl, h), [hidden])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_summary_is_what_it_says(double_impl, dtype):
    p = everything(dtype)
    t = {name: x.double() for name, x in p.tensors.items()}
    z = t["teacher_hidden"][[2, 0, 2]] @ t["teacher_weight"].T + t["teacher_bias"]
    log_p = (6 * torch.tanh(0.7 * z / 6))[:, :995].div(2.0).log_softmax(-1)
    got = summary_of(p, double_impl, teacher_index=torch.tensor([2, 0, 2]))
    p_all, entropy = log_p.exp(), -(log_p.exp() * log_p).sum(-1)
    exact = p_all @ t["student_weight"][:995], entropy, p_all @ t["student_bias"][:995]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for mine, right in zip(got, exact, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), right, rtol=tolerance, atol=tolerance)


def test_summary_without_bias_has_zeros(impl):
    assert torch.equal(summary_of(simple(), impl).bias, torch.zeros(6))


def test_rows_of_a_summary_can_be_chosen_and_saved(fused_impl, tmp_path):
    """By its own index, by `summary_index` later, or by hand: the same loss."""
    p = everything()
    hidden, index = p.tensors["student_hidden"], p.options["teacher_index"]
    summary = summary_of(p, fused_impl)
    expected = loss_from_summary(p, summary, fused_impl, hidden)
    torch.save(summary._asdict(), tmp_path / "summary.pt")
    loaded = TeacherSummary(**torch.load(tmp_path / "summary.pt"))
    chosen = (TeacherSummary(*(x[index] for x in loaded)), summary_of(p, fused_impl, teacher_index=index))
    for rows in chosen:
        torch.testing.assert_close(loss_from_summary(p, rows, fused_impl, hidden, summary_index=None), expected)


def test_strided_hidden_states(fused_impl):
    """`hidden[:, :-1]` of a batch, and every other column of something wider."""
    flat = simple(rows=8, row_weight=[0.5, 0.0, 2.0, 1.0, 1.0, -0.25, 1.0, 3.0])
    hidden = flat.tensors["student_hidden"]
    batch = torch.cat([hidden.view(2, 4, -1), torch.full((2, 1, 24), torch.nan)], 1)[:, :-1]
    wide = torch.stack([hidden, torch.full_like(hidden, torch.nan)], -1).flatten(-2)[:, ::2]
    for strided in (batch, wide):
        assert not strided.is_contiguous()
        got = run(flat.with_tensors(student_hidden=strided), fused_impl)
        gradient = got.gradients["student_hidden"]
        assert gradient.shape == strided.shape
        assert_accurate(replace(got, gradients={"student_hidden": gradient.reshape(8, 24)}), flat)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_that_repeat(fused_impl, reduction):
    p = simple(rows=4, vocab=101, student_index=[2, 1] * 12, teacher_index=[0, 1, 2, 3] * 6, reduction=reduction)
    workspace = 3 * smallest(loss_from_summary, p, summary_of(p, fused_impl), fused_impl, p.tensors["student_hidden"])
    got = run(p, fused_impl, max_workspace_bytes=workspace)
    assert_accurate(got, p)
    assert torch.equal(got.gradients["student_hidden"][[0, 3]], torch.zeros(2, 24))


def test_weights_that_cancel(fused_impl):
    """Weights that sum to 0: the mean is zero, not 0/0, and so is its gradient."""
    p = simple(row_weight=[1.0, -1.0, 0.0, 0.0, 2.0, -2.0])
    hidden = p.tensors["student_hidden"].requires_grad_()
    loss = loss_from_summary(p, summary_of(p, fused_impl), fused_impl, hidden)
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_loss_scale_reaches_float16_gradients(impl):
    p = replace(simple(rows=16, vocab=2003, dtype=torch.float16, temperature=4.0), upstream=2.0**14)
    assert_accurate(run(p, impl), p)


def test_a_16_bit_gradient_is_rounded_once(fused_impl):
    """Whatever the row weights; rounded twice, one entry in ten or so would differ."""
    p = simple(rows=16, vocab=67, dtype=torch.bfloat16, row_weight=[0.3 + 0.1 * i for i in range(16)])
    p = replace(p, upstream=2.0**-3)
    widened = {name: t.float() for name, t in p.tensors.items()}
    exact = run(p.with_tensors(**widened), fused_impl).gradients["student_hidden"]
    got = run(p, fused_impl).gradients["student_hidden"]
    assert (got != exact.bfloat16()).float().mean() < 0.003  # float32 rounding moves a tie
