"""Where both models have one head, logits are compared by the difference of hidden states, which cancels nothing."""

from dataclasses import replace

import pytest
import torch

from disc_kernels import LogitTransform
from tests.linear_kl.oracle import assert_accurate, build, oracle, plain, run, smallest_workspace


def one_head(problem, apart=None):
    """The same problem with the student's head for both; hidden states that differ by `apart` of their size."""
    shared = {"teacher_weight": problem.tensors["student_weight"]}
    if "student_bias" in problem.tensors:
        shared["teacher_bias"] = problem.tensors["student_bias"]
    if apart is not None:
        student = problem.tensors["student_hidden"]
        shared["teacher_hidden"] = student + apart * torch.randn_like(student)
    return problem.with_tensors(**shared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_values_and_gradients(fused_impl, divergence, dtype, reduction):
    problem = one_head(
        build(rows=7, bias=True, dtype=dtype, divergence=divergence, reduction=reduction, temperature=2.0)
    )
    assert_accurate(run(problem, fused_impl), problem)


def test_float64(divergence):
    problem = one_head(build(rows=7, dtype=torch.float64, divergence=divergence))
    assert_accurate(run(problem, "torch"), problem)


def test_with_indices_weights_a_scale_and_a_smaller_vocabulary(fused_impl, divergence):
    problem = build(
        rows=6,
        student_index=[4, 0, 2, 2, 5, 1, 3],
        teacher_index=[3, 3, 0, 1, 1, 2, 0],
        row_weight=[0.5, 0.0, 2.0, 1.0, 0.25, 1.0, 3.0],
        vocab_size=995,
        student_transform=LogitTransform(scale=0.7),
        teacher_transform=LogitTransform(scale=0.7),
        divergence=divergence,
    )
    assert_accurate(run(one_head(problem), fused_impl), one_head(problem))


@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("workspace", [None, "smallest"])
def test_gradients_keep_their_digits_however_close_the_models_are(fused_impl, divergence, apart, workspace):
    """Subtracted logits lose a digit for every tenfold that the models come closer; the difference loses none."""
    problem = one_head(build(rows=6, width=64, divergence=divergence), apart)
    if workspace is not None:
        problem = problem.with_options(max_workspace_bytes=smallest_workspace(problem, fused_impl))
    got, exact, yardstick = run(problem, fused_impl), oracle(problem), plain(problem)
    for name in ("student_hidden", "student_weight"):
        size = exact.gradients[name].norm()
        error, plain_error = (
            (x.gradients[name].double() - exact.gradients[name]).norm() / size for x in (got, yardstick)
        )
        assert error < 3e-6, name
        assert error < plain_error / (0.1 / apart), name
    assert abs(got.loss.double() - exact.loss) < 1e-7 / apart * exact.loss


@pytest.mark.parametrize("scale", [30.0, 1e3])
def test_models_far_apart(fused_impl, divergence, scale):
    """The ratio of the normalisers overflows where it is computed as for close models."""
    problem = one_head(build(rows=6, width=8, divergence=divergence))
    problem = problem.with_tensors(student_hidden=problem.tensors["student_hidden"] * scale)
    got = run(problem, fused_impl)
    assert_accurate(replace(got, stats={"divergence": got.stats["divergence"]}), problem)  # entropies are all but 0


def test_impossible_entries(fused_impl, divergence):
    problem = build(rows=5, bias=True, divergence=divergence)
    bias = problem.tensors["student_bias"].clone()
    bias[::3] = -torch.inf
    problem = replace(one_head(problem.with_tensors(student_bias=bias)), asks=("student_hidden", "student_weight"))
    got = run(problem, fused_impl)
    assert_accurate(got, problem)
    assert got.gradients["student_weight"][::3].count_nonzero() == 0


def test_one_model_of_itself_learns_nothing(fused_impl, divergence):
    problem = one_head(build(rows=6, divergence=divergence), apart=0.0)
    got = run(problem, fused_impl)
    assert got.loss == 0.0
    assert got.gradients["student_hidden"].count_nonzero() == 0


@pytest.mark.parametrize(
    "different",
    [
        {"student_transform": LogitTransform(scale=2.0)},
        {"student_transform": LogitTransform(softcap=5.0), "teacher_transform": LogitTransform(softcap=5.0)},
    ],
    ids=["scale", "softcap"],
)
def test_what_the_models_do_to_the_head_s_output_still_counts(fused_impl, different):
    problem = one_head(build(rows=6, **different))
    assert_accurate(run(problem, fused_impl), problem)


@pytest.mark.parametrize("scale", [10.0, 30.0])
def test_models_that_differ_noticeably_at_large_logits(fused_impl, divergence, scale):
    """Not close enough for the normalisers' ratio: no worse than subtracting log-probabilities."""
    problem = one_head(build(rows=5, width=5, vocab=13, divergence=divergence))
    teacher = problem.tensors["teacher_hidden"] * scale
    apart = teacher * (1 + 0.03 * torch.randn_like(teacher))
    problem = problem.with_tensors(student_hidden=apart, teacher_hidden=teacher)
    got, exact, yardstick = run(problem, fused_impl), oracle(problem), plain(problem)
    size = exact.gradients["student_hidden"].norm()
    error, plain_error = (
        (x.gradients["student_hidden"].double() - exact.gradients["student_hidden"]).norm() / size
        for x in (got, yardstick)
    )
    assert error < 2 * plain_error + 1e-6
