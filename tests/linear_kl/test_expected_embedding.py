"""The frozen-head form gives what the full softmaxes of both models give: same oracle, same comparison."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from disc_kernels import LogitTransform, TeacherSummary, expected_embedding_kl, fused_suffix_kl, teacher_summary
from disc_kernels.linear_kl import expected_rows, problem, products, rows_torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SUMMARY_OPTIONS = ("temperature", "teacher_transform", "vocab_size", "max_workspace_bytes")
LOSS_OPTIONS = ("student_index", "row_weight", "temperature", "reduction", "vocab_size", "max_workspace_bytes")


@pytest.fixture(autouse=True)
def new_memory_is_nan():
    """An entry nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def summary_of(problem, impl, tensors=None, **options):
    """Of the teacher's rows, each once; `summary_index` chooses among them."""
    t = tensors or problem.tensors
    biases = {name: t[name] for name in ("teacher_bias", "student_bias") if name in t}
    options = {name: problem.options[name] for name in SUMMARY_OPTIONS if name in problem.options} | biases | options
    return teacher_summary(t["teacher_hidden"], t["teacher_weight"], t["student_weight"], impl=impl, **options)


def loss_of(problem, summary, impl, hidden, **options):
    t, o = problem.tensors, problem.options
    given = {name: o[name] for name in LOSS_OPTIONS if name in o} | {"summary_index": o.get("teacher_index")}
    if "student_transform" in o:
        given["student_scale"] = o["student_transform"].scale
    given |= {"student_bias": t.get("student_bias")} | options
    return expected_embedding_kl(hidden, t["student_weight"], summary, impl=impl, **given)


@pytest.fixture
def run(plain):
    def ran(problem, impl, autocast=None, summary=None, **options):
        """Summary, forward and backward, as the outcome that `assert_accurate` takes."""
        hidden = problem.tensors["student_hidden"].detach().requires_grad_()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            summary = summary or summary_of(problem, impl)
            loss, stats = loss_of(problem, summary, impl, hidden, return_stats=True, **options)
        upstream = torch.as_tensor(problem.upstream, dtype=loss.dtype).expand_as(loss)
        (gradient,) = torch.autograd.grad(loss, [hidden], upstream)
        assert stats.agreement.isnan().all()
        known = {name: value for name, value in stats._asdict().items() if name != "agreement"}
        return replace(plain(problem), loss=loss.detach(), gradients={"student_hidden": gradient}, stats=known)

    return ran


@pytest.fixture
def everything(build_everything):
    def made(dtype=torch.float32, **options):
        made = build_everything(dtype, student_transform=LogitTransform(scale=1.5), **options)
        return replace(made, asks=("student_hidden",))

    return made


@pytest.fixture
def simple(build):
    return lambda **options: replace(build(**options), asks=("student_hidden",))


@pytest.fixture
def tensor_cores(monkeypatch):
    """Products of 16-bit operands with float32 results, as on CUDA; the same numbers, from widened operands."""

    def product_dtype(side):
        return side.operand_dtype if side.accumulate_dtype == torch.float32 else side.accumulate_dtype

    def multiply_into(out, a, b, *, accumulate=False):
        product = a.to(out.dtype) @ b.to(out.dtype)
        out.add_(product) if accumulate else out.copy_(product)

    monkeypatch.setattr(problem.Side, "product_dtype", property(product_dtype))
    for module in (expected_rows, products):
        monkeypatch.setattr(module, "multiply_into", multiply_into)


# ---------------------------------------------------------------------------------------------------------------------
# Values and gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_everything_at_once(everything, run, assert_accurate, impl, dtype, reduction):
    p = everything(dtype, reduction=reduction)
    assert_accurate(run(p, impl), p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_but_defaults(simple, run, assert_accurate, impl, dtype):
    p = simple(dtype=dtype)
    assert_accurate(run(p, impl), p)


@pytest.mark.parametrize("vocab", [2, 31, 2048, 4099])
def test_vocabulary(simple, run, assert_accurate, fused_impl, vocab):
    p = simple(vocab=vocab, bias=True)
    assert_accurate(run(p, fused_impl), p)


def test_vocabulary_of_one_entry(simple, run, impl):
    got = run(simple(vocab=1), impl)
    assert got.loss.item() < 1e-6 and got.gradients["student_hidden"].abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("workspaces", [1, 2.5])
def test_chunks(everything, run, assert_accurate, fused_impl, dtype, workspaces):
    p = everything(dtype)
    summary = summary_of(p, fused_impl, max_workspace_bytes=int(workspaces * smallest(summary_of, p, fused_impl)))
    hidden = p.tensors["student_hidden"]
    workspace = int(workspaces * smallest(loss_of, p, summary, fused_impl, hidden))
    assert_accurate(run(p, fused_impl, summary=summary, max_workspace_bytes=workspace), p)


def smallest(call, *arguments):
    """The bytes one row needs, as the refusal says."""
    with pytest.raises(ValueError, match="max_workspace_bytes: expected at least") as refused:
        call(*arguments, max_workspace_bytes=1)
    return int(re.search(r"at least (\d+)", str(refused.value)).group(1))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_float64_is_the_full_softmaxes(everything, double_impl, reduction):
    p = everything(torch.float64, reduction=reduction)
    leaves = p.leaves()
    expected = fused_suffix_kl(**leaves, **p.options, impl="reference")
    expected.sum().backward()
    hidden = p.tensors["student_hidden"].detach().requires_grad_()
    loss = loss_of(p, summary_of(p, double_impl), double_impl, hidden)
    loss.sum().backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hidden.grad, leaves["student_hidden"].grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(everything, double_impl, reduction):
    p = everything(torch.float64, rows=6, width=4, vocab=23, teacher_vocab=19, vocab_size=17, reduction=reduction)
    hidden = p.tensors["student_hidden"].requires_grad_()
    summary = summary_of(p, double_impl)
    assert torch.autograd.gradcheck(lambda h: loss_of(p, summary, double_impl, h), [hidden])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_summary_is_what_it_says(everything, double_impl, dtype):
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


def test_summary_without_bias_has_zeros(simple, impl):
    assert torch.equal(summary_of(simple(), impl).bias, torch.zeros(6))


def test_rows_of_a_summary_can_be_chosen_and_saved(everything, fused_impl, tmp_path):
    """By its own index, by `summary_index` later, or by hand: the same loss."""
    p = everything()
    hidden, index = p.tensors["student_hidden"], p.options["teacher_index"]
    summary = summary_of(p, fused_impl)
    expected = loss_of(p, summary, fused_impl, hidden)
    torch.save(summary._asdict(), tmp_path / "summary.pt")
    loaded = TeacherSummary(**torch.load(tmp_path / "summary.pt"))
    chosen = (TeacherSummary(*(x[index] for x in loaded)), summary_of(p, fused_impl, teacher_index=index))
    for rows in chosen:
        torch.testing.assert_close(loss_of(p, rows, fused_impl, hidden, summary_index=None), expected)


def test_strided_hidden_states(simple, run, assert_accurate, fused_impl):
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
def test_rows_that_repeat(simple, run, assert_accurate, fused_impl, reduction):
    p = simple(rows=4, vocab=101, student_index=[2, 1] * 12, teacher_index=[0, 1, 2, 3] * 6, reduction=reduction)
    workspace = 3 * smallest(loss_of, p, summary_of(p, fused_impl), fused_impl, p.tensors["student_hidden"])
    got = run(p, fused_impl, max_workspace_bytes=workspace)
    assert_accurate(got, p)
    assert torch.equal(got.gradients["student_hidden"][[0, 3]], torch.zeros(2, 24))


def test_weights_that_cancel(simple, fused_impl):
    """Weights that sum to 0: the mean is zero, not 0/0, and so is its gradient."""
    p = simple(row_weight=[1.0, -1.0, 0.0, 0.0, 2.0, -2.0])
    hidden = p.tensors["student_hidden"].requires_grad_()
    loss = loss_of(p, summary_of(p, fused_impl), fused_impl, hidden)
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_loss_scale_reaches_float16_gradients(simple, run, assert_accurate, impl):
    p = replace(simple(rows=16, vocab=2003, dtype=torch.float16, temperature=4.0), upstream=2.0**14)
    assert_accurate(run(p, impl), p)


def test_a_16_bit_gradient_is_rounded_once(simple, run, fused_impl):
    """Whatever the row weights; rounded twice, one entry in ten or so would differ."""
    p = simple(rows=16, vocab=67, dtype=torch.bfloat16, row_weight=[0.3 + 0.1 * i for i in range(16)])
    p = replace(p, upstream=2.0**-3)
    widened = {name: t.float() for name, t in p.tensors.items()}
    exact = run(p.with_tensors(**widened), fused_impl).gradients["student_hidden"]
    got = run(p, fused_impl).gradients["student_hidden"]
    assert (got != exact.bfloat16()).float().mean() < 0.003  # float32 rounding moves a tie


# ---------------------------------------------------------------------------------------------------------------------
# 16-bit operands on tensor cores


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_16_bit_probabilities(everything, run, assert_accurate, tensor_cores, fused_impl, dtype, reduction):
    p = everything(dtype, reduction=reduction, vocab=4100, teacher_vocab=4100, vocab_size=4099)
    assert_accurate(run(p, fused_impl), p)


def test_probabilities_rounded_once_would_show(simple, run, assert_accurate, tensor_cores, monkeypatch):
    """The value needs the embedding in float32 accuracy."""
    p = simple(dtype=torch.bfloat16)
    assert_accurate(run(p, "torch"), p)
    monkeypatch.setattr(expected_rows, "_splits", lambda head: False)
    with pytest.raises(AssertionError, match=r"^loss: off by"):
        assert_accurate(run(p, "torch"), p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalise_rows_in_place(simple, fused_impl, dtype):
    """Probabilities over the front of their own logits, rounded to half a last bit; nothing is written beside them."""
    vocab, stride = 4099, 4104
    p = simple(rows=5, vocab=vocab, dtype=dtype, bias=True)
    backend = pytest.importorskip(f"disc_kernels.linear_kl.rows_{fused_impl}")
    side = problem.Side(
        *(p.tensors[f"student_{name}"] for name in ("hidden", "weight", "bias")), None,
        LogitTransform(1.3, 4.0), dtype, torch.float32, vocab,
    )  # fmt: skip
    logits = 3 * torch.randn(5, stride)
    u = 4 * torch.tanh(1.3 * (logits[:, :vocab].double() + side.bias.double()) / 4) / 0.8
    log_p = u.log_softmax(-1)
    other = torch.randn(vocab)
    other[7] = -torch.inf
    buffer = logits.clone()
    beyond = buffer.view(dtype)[:, vocab : buffer.view(dtype).shape[1] // 2].clone()
    weights = buffer.view(dtype)[:, :vocab]
    remainder = torch.empty(5, stride, dtype=dtype)[:, :vocab] if dtype != torch.float32 else None
    maximum, log_sum, total, entropy, expected_bias = torch.empty(5, 5)
    backend.normalise_rows(
        buffer[:, :vocab], side, 0.8, 2, maximum=maximum, log_sum=log_sum, entropy=entropy, weights=weights,
        remainder=remainder, total=total, other_bias=other, expected_bias=expected_bias,
    )  # fmt: skip
    torch.testing.assert_close(maximum.double() + log_sum.double(), u.logsumexp(-1), rtol=0, atol=4e-6)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=0, atol=4e-6)
    assert torch.equal(expected_bias, torch.full((5,), -torch.inf))
    stored, size = weights.double(), total.double().unsqueeze(1)
    rounding = (stored / size / log_p.exp() - 1).abs().max()
    assert rounding < torch.finfo(dtype).eps + 1e-5  # half of it on a GPU: the interpreter truncates
    whole = stored if remainder is None else stored + remainder.double()
    assert (whole / size / log_p.exp() - 1).abs().max() < 3e-5
    assert (whole.sum(-1) / total.double() - 1).abs().max() < 1e-6
    assert stored.amax(-1).tolist() == [rows_torch.PEAK] * 5  # the largest is exact
    assert torch.equal(buffer.view(dtype)[:, vocab : vocab + beyond.shape[1]], beyond)


# ---------------------------------------------------------------------------------------------------------------------
# Near, equal, impossible, not a number


def with_teacher_near(p, gap):
    """The student's head for both, hidden states `gap` apart."""
    hidden = p.tensors["student_hidden"]
    return p.with_tensors(
        teacher_hidden=hidden + gap * torch.randn_like(hidden), teacher_weight=p.tensors["student_weight"]
    )


@pytest.mark.parametrize("gap", [0.0, 1e-3, 0.1])
def test_value_is_as_good_as_a_float32_logsumexp(simple, oracle, fused_impl, gap):
    """A few roundings of the largest logit, however small the KL; and never negative."""
    p = with_teacher_near(simple(rows=24, width=64, vocab=2003, reduction="none"), gap)
    exact = oracle(p)
    got = loss_of(p, summary_of(p, fused_impl), fused_impl, p.tensors["student_hidden"])
    assert (got >= 0).all()
    assert (got.double() - exact.loss).abs().max() < 4 * torch.finfo(torch.float32).eps * exact.logit_scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_models(simple, run, fused_impl, dtype):
    p = simple(dtype=dtype, bias=True, temperature=2.0)
    p = with_teacher_near(p, 0.0).with_tensors(teacher_bias=p.tensors["student_bias"])
    got = run(p, fused_impl)
    assert 0 <= got.loss.item() < 4e-6
    assert got.gradients["student_hidden"].abs().max() < 1e-6


@pytest.mark.parametrize("masked", [slice(0, 2500), slice(700, 2900)], ids=str)
def test_entries_masked_in_both_models(simple, run, assert_accurate, impl, masked):
    p = simple(vocab=3000, bias=True)
    for name in ("student_bias", "teacher_bias"):
        p.tensors[name][masked] = -torch.inf
    assert_accurate(run(p, impl), p)


def test_entry_impossible_for_the_student_only(simple, impl):
    p = simple(bias=True)
    p.tensors["student_bias"][7] = -torch.inf
    assert loss_of(p, summary_of(p, impl), impl, p.tensors["student_hidden"]).item() == math.inf


@pytest.mark.parametrize("name", ["student_hidden", "student_bias", "teacher_hidden", "teacher_weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(simple, impl, name, value):
    p = simple(vocab=3000, bias=True)
    p.tensors[name][5] = value
    hidden = p.tensors["student_hidden"].requires_grad_()
    loss = loss_of(p, summary_of(p, impl), impl, hidden)
    loss.backward()
    assert not loss.isfinite() and not hidden.grad.isfinite().all()


def test_a_row_without_any_entry(simple, impl):
    p = simple(bias=True)
    p.tensors["student_bias"][:] = -torch.inf
    assert not loss_of(p, summary_of(p, impl), impl, p.tensors["student_hidden"]).isfinite()


# ---------------------------------------------------------------------------------------------------------------------
# In somebody's graph


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward(everything, impl, reduction):
    p = everything(reduction=reduction)
    hidden = p.tensors["student_hidden"].requires_grad_()
    loss = loss_of(p, summary_of(p, impl), impl, hidden).sum()
    (first,) = torch.autograd.grad(loss, [hidden], retain_graph=True)
    kept = first.clone()
    first.zero_()  # whoever received it may do so
    (second,) = torch.autograd.grad(3 * loss, [hidden])
    assert kept.abs().max() > 0
    torch.testing.assert_close(second, 3 * kept)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss, [hidden])


def test_double_backward_is_refused(simple, fused_impl):
    p = simple()
    hidden = p.tensors["student_hidden"].requires_grad_()
    loss = loss_of(p, summary_of(p, fused_impl), fused_impl, hidden)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.autograd.grad(loss, [hidden], create_graph=True)


def test_summary_made_in_inference_mode(everything, run, assert_accurate, impl):
    p = everything()
    with torch.inference_mode():
        summary = summary_of(p, impl, {name: t.clone() for name, t in p.tensors.items()})
    assert summary.embedding.is_inference()
    assert_accurate(run(p, impl, summary=summary), p)


def test_no_gradient_reaches_a_summary_or_its_makers(everything, impl):
    p = everything()
    t = {name: x.clone().requires_grad_() for name, x in p.tensors.items()}
    summary = summary_of(p, impl, t)
    assert not any(x.requires_grad for x in summary)
    asking = TeacherSummary(*(x.requires_grad_() for x in summary))
    loss_of(p, asking, impl, t["student_hidden"]).backward()
    assert t["student_hidden"].grad.abs().max() > 0
    assert all(x.grad is None for x in asking)


@pytest.mark.parametrize("how", [torch.no_grad, torch.inference_mode])
def test_without_gradients(everything, impl, how):
    p = everything()
    hidden = p.tensors["student_hidden"].requires_grad_()
    summary = summary_of(p, impl)
    expected = loss_of(p, summary, impl, hidden)
    with how():
        silent = loss_of(p, summary, impl, hidden)
    assert expected.requires_grad and not silent.requires_grad
    assert not loss_of(p, summary, impl, hidden.detach()).requires_grad
    torch.testing.assert_close(silent.clone(), expected.detach())


def test_checkpoint(everything, fused_impl):
    p = everything()
    hidden = p.tensors["student_hidden"].requires_grad_()
    summary = summary_of(p, fused_impl)
    (expected,) = torch.autograd.grad(loss_of(p, summary, fused_impl, hidden), [hidden])
    checkpoint(lambda h: loss_of(p, summary, fused_impl, h), hidden, use_reentrant=False).backward()
    torch.testing.assert_close(hidden.grad, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_rounds_the_products_and_nothing_else(everything, run, assert_accurate, impl, reduction):
    p = everything(reduction=reduction)
    half = p.with_tensors(**{n: t if n.endswith("bias") else t.bfloat16() for n, t in p.tensors.items()})
    got = run(p, impl, autocast=torch.bfloat16)
    gradient = got.gradients["student_hidden"]
    assert gradient.dtype == torch.float32
    assert_accurate(replace(got, gradients={"student_hidden": gradient.bfloat16()}), half)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(simple, impl, reduction):
    p = simple(student_index=[], teacher_index=[], reduction=reduction)
    hidden = p.tensors["student_hidden"].requires_grad_()
    loss, stats = loss_of(p, summary_of(p, impl), impl, hidden, return_stats=True)
    assert loss.shape == ((0,) if reduction == "none" else ()) and loss.sum().item() == 0.0
    assert {len(x) for x in stats} == {0}
    loss.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_no_rows_to_summarise(simple, impl):
    p = simple().with_tensors(teacher_hidden=torch.empty(0, 24))
    summary = summary_of(p, impl)
    assert [tuple(x.shape) for x in summary] == [(0, 24), (0,), (0,)]
    hidden = torch.empty(0, 24, requires_grad=True)
    loss_of(p, summary, impl, hidden).backward()
    assert hidden.grad.shape == (0, 24)


def test_statistics_are_nobody_elses_memory(simple, impl):
    p = simple(reduction="none")
    summary = summary_of(p, impl)
    loss, stats = loss_of(p, summary, impl, p.tensors["student_hidden"], return_stats=True)
    entropy = summary.entropy.clone()
    for statistic in stats:
        statistic.zero_()
    assert loss.min() > 0 and torch.equal(summary.entropy, entropy)


# ---------------------------------------------------------------------------------------------------------------------
# What the comparison rejects


def gradient_times(factor):
    def mutated(p, run):
        right = run(p, "torch")
        return replace(right, gradients={"student_hidden": right.gradients["student_hidden"] * factor(p)})

    return mutated


def summary_with(**parts):
    def mutated(p, run):
        summary = summary_of(p, "torch")
        return run(p, "torch", summary=summary._replace(**{n: f(getattr(summary, n)) for n, f in parts.items()}))

    return mutated


def options_with(**options):
    def mutated(p, run):
        made = {name: f(p) if callable(f) else f for name, f in options.items()}
        return run(p, "torch", summary=summary_of(p, "torch"), **made)

    return mutated


LOSS, GRADIENT = "loss", "student_hidden"
MUTANTS = {
    "zero gradient": (gradient_times(lambda p: 0.0), (GRADIENT,)),
    "1/T left out of the gradient": (gradient_times(lambda p: p.options["temperature"]), (GRADIENT,)),
    "scale left out of the gradient": (gradient_times(lambda p: 1 / 1.5), (GRADIENT,)),
    "embedding left out": (summary_with(embedding=torch.zeros_like), (LOSS, GRADIENT)),
    "entropy left out": (summary_with(entropy=torch.zeros_like), (LOSS,)),
    "bias left out": (summary_with(bias=torch.zeros_like), (LOSS,)),
    "summary_index off by one": (
        options_with(summary_index=lambda p: p.options["teacher_index"].roll(1)),
        (LOSS, GRADIENT),
    ),
    "student_index off by one": (
        options_with(student_index=lambda p: p.options["student_index"].roll(1)),
        (LOSS, GRADIENT),
    ),
    "vocabulary tile dropped": (options_with(vocab_size=995 - 128), (LOSS, GRADIENT)),
    "padding counted": (options_with(vocab_size=1000), (LOSS,)),
    "another temperature": (options_with(temperature=1.0), (LOSS, GRADIENT)),
    "scale left out": (options_with(student_scale=1.0), (LOSS, GRADIENT)),
    "row weights ignored": (options_with(row_weight=None), (LOSS, GRADIENT)),
    "sum for mean": (options_with(reduction="sum"), (LOSS, GRADIENT)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_rejected(everything, run, assert_accurate, name, dtype):
    mutated, damages = MUTANTS[name]
    p = everything(dtype)
    right, wrong = run(p, "torch"), mutated(p, run)
    assert_accurate(right, p)  # the control
    for part in damages:
        if part == LOSS:
            damaged = replace(right, loss=wrong.loss)
        else:
            damaged = replace(right, gradients={GRADIENT: wrong.gradients[GRADIENT].to(dtype)})
        with pytest.raises(AssertionError, match=f"^{part}: off by"):
            assert_accurate(damaged, p)
