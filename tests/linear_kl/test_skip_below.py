"""`skip_below` leaves small columns out of the gradient's products, no others, and says how much that was."""

from dataclasses import replace

import pytest
import torch

BOTH = ("student_hidden", "student_weight")


@pytest.fixture
def skipping(loss_of):
    def call(problem, impl, skip_below, **options):
        leaves = problem.leaves()
        loss, *_, skipped = loss_of(problem, leaves, impl, skip_below=skip_below, **options)
        loss.backward()
        return loss.detach(), {name: leaves[name].grad for name in problem.asks if name in leaves}, skipped

    return call


def logit_gradient(problem):
    """[M, V] float64: q - p of each row, times its weight over the largest."""
    t, options = {name: x.double() for name, x in problem.tensors.items()}, problem.options
    student, teacher = (
        (t[f"{name}_hidden"] @ t[f"{name}_weight"].T).div(options.get("temperature", 1.0)).softmax(-1)
        for name in ("student", "teacher")
    )
    weight = options.get("row_weight", torch.ones(len(student))).double()
    return (student - teacher) * (weight / weight.max())[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_small_columns_are_left_out_and_counted(build, skipping, fused_impl, dtype, temperature):
    """Two rows are two chunks: a column counts in the one and is left out in the other."""
    problem = build(rows=2, width=64, dtype=dtype, temperature=temperature, row_weight=[1.0, 0.5])
    problem = replace(problem, asks=BOTH)
    g = logit_gradient(problem)
    threshold = g.abs().quantile(0.7).item()
    nearest = (g.abs() - threshold).abs().min() / threshold  # no column is in doubt
    assert nearest > 1e-5
    kept = g * (g.abs() >= threshold)
    assert 0.6 < (kept == 0).double().mean() < 0.8

    _, gradients, skipped = skipping(problem, fused_impl, threshold)
    scale = 1.0 / 1.5 / temperature
    t = {name: x.double() for name, x in problem.tensors.items()}
    expected = {
        "student_hidden": kept @ t["student_weight"] * scale,
        "student_weight": kept.T @ t["student_hidden"] * scale,
    }
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    for name in BOTH:
        error = (gradients[name].double() - expected[name]).norm() / expected[name].norm()
        assert error < tolerance, name
        left_out = (g - kept).norm() / g.norm()
        assert tolerance < left_out / 4  # or leaving nothing out would pass as well
    assert skipped.item() == pytest.approx(((g - kept).abs().sum() / g.abs().sum()).item(), rel=1e-4)


def test_a_column_stays_for_one_row_of_its_chunk(build, skipping, fused_impl):
    problem = replace(build(rows=8, width=64), asks=BOTH)
    g = logit_gradient(problem)
    threshold = g.abs().quantile(0.7).item()
    kept = torch.cat([part * (part.abs().amax(0) >= threshold) for part in g.split(4)])  # two chunks of half the rows
    _, gradients, skipped = skipping(problem, fused_impl, threshold)
    expected = kept.T @ problem.tensors["student_hidden"].double() / 8
    assert (gradients["student_weight"].double() - expected).norm() / expected.norm() < 1e-5
    assert skipped.item() == pytest.approx(((g - kept).abs().sum() / g.abs().sum()).item(), rel=1e-4)


def test_nothing_below_a_tiny_threshold(build_everything, run, skipping, fused_impl, divergence):
    problem = replace(build_everything(divergence=divergence), upstream=1.0)
    exact = run(problem, fused_impl)
    loss, gradients, skipped = skipping(problem, fused_impl, 1e-30)
    assert skipped.item() < 1e-20
    torch.testing.assert_close(loss, exact.loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, exact.gradients[name], rtol=1e-5, atol=1e-9)


def test_all_below_a_large_one(build, skipping, fused_impl):
    loss, gradients, skipped = skipping(build(rows=4, bias=True), fused_impl, 2.0)
    assert loss > 0
    assert skipped.item() == pytest.approx(1.0)
    assert all(gradients[name].count_nonzero() == 0 for name in BOTH)
    assert gradients["student_bias"].count_nonzero() > 0  # no product: nothing to save


def test_statistics_come_first(build, loss_of, fused_impl):
    problem = build(rows=4)
    loss, stats, skipped = loss_of(problem, problem.leaves(), fused_impl, skip_below=1e-3, return_stats=True)
    assert (loss.shape, stats.divergence.shape, skipped.shape) == ((), (4,), ())
    assert not skipped.requires_grad


def test_no_gradient_skips_nothing(build, loss_of, fused_impl):
    problem = replace(build(rows=4), asks=())
    assert loss_of(problem, problem.leaves(), fused_impl, skip_below=1.0)[1].item() == 0.0


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0.0, ValueError, "skip_below: expected a positive number"),
        (-1e-3, ValueError, "skip_below: expected a positive number"),
        (float("nan"), ValueError, "skip_below: expected a finite number"),
        ("1e-3", TypeError, "skip_below: expected a number"),
    ],
)
def test_bad_values(build, loss_of, impl, value, error, message):
    problem = build(rows=4)
    with pytest.raises(error, match=message):
        loss_of(problem, problem.leaves(), impl, skip_below=value)


def test_not_for_rows_one_by_one_nor_the_reference(build, loss_of):
    problem = build(rows=4)
    with pytest.raises(ValueError, match='skip_below: expected reduction "mean" or "sum"'):
        loss_of(problem, problem.leaves(), "torch", skip_below=1e-3, reduction="none")
    with pytest.raises(ValueError, match='skip_below: expected None for impl="reference"'):
        loss_of(problem, problem.leaves(), "reference", skip_below=1e-3)
