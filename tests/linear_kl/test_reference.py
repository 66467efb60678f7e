"""The oracle against what is known without it: torch's own divergences, closed forms. Then the package's reference."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from disc_kernels import LogitTransform
from tests.linear_kl.oracle import build, build_everything, loss_of, oracle, run


def categoricals(problem, temperature):
    student, teacher = (
        problem.tensors[f"{name}_hidden"] @ problem.tensors[f"{name}_weight"].T / temperature
        for name in ("student", "teacher")
    )
    return Categorical(logits=student), Categorical(logits=teacher)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_oracle_is_the_divergence_of_torch_distributions(temperature):
    problem = build(dtype=torch.float64, vocab=50, temperature=temperature, reduction="none")
    student, teacher = categoricals(problem, temperature)
    mixture = Categorical(probs=0.3 * teacher.probs + 0.7 * student.probs)
    expected = {
        "forward_kl": kl_divergence(teacher, student),
        "reverse_kl": kl_divergence(student, teacher),
        "jsd": 0.3 * kl_divergence(teacher, mixture) + 0.7 * kl_divergence(student, mixture),
    }
    for divergence, value in expected.items():
        got = oracle(problem.with_options(divergence=divergence, beta=0.3))
        torch.testing.assert_close(got.loss, value)
        torch.testing.assert_close(got.stats["divergence"], value)
        torch.testing.assert_close(got.stats["student_entropy"], student.entropy())
        torch.testing.assert_close(got.stats["teacher_entropy"], teacher.entropy())


def test_oracle_is_kl_div_of_torch():
    problem = build(dtype=torch.float64, vocab=50)
    student, teacher = categoricals(problem, 1.0)
    got = oracle(problem)
    torch.testing.assert_close(
        got.loss, F.kl_div(student.logits, teacher.logits, reduction="batchmean", log_target=True)
    )


def test_two_entries_by_hand(double_impl):
    """Student (1/2, 1/2), teacher (3/4, 1/4), weights 1 and 3 on two equal rows, temperature 2."""
    problem = build(rows=2, width=1, vocab=2, dtype=torch.float64, row_weight=[1.0, 3.0], temperature=2.0).with_tensors(
        student_hidden=torch.zeros(2, 1, dtype=torch.float64),
        teacher_hidden=torch.ones(2, 1, dtype=torch.float64),
        teacher_weight=torch.tensor([[2 * math.log(3)], [0.0]], dtype=torch.float64),
    )
    problem = replace(problem, asks=("student_hidden",), upstream=1.0)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    for evaluate in (oracle, lambda p: run(p, double_impl)):
        for reduction, factor in (("mean", 1), ("sum", 4)):
            p = problem.with_options(reduction=reduction)
            got = evaluate(p)
            assert got.loss.item() == pytest.approx(factor * forward, rel=1e-12)
            assert evaluate(p.with_options(divergence="reverse_kl")).loss.item() == pytest.approx(
                factor * reverse, rel=1e-12
            )
            # The forward KL's gradient at a logit is (student - teacher) / T: (-1/8, 1/8) here.
            slope = (problem.tensors["student_weight"][1] - problem.tensors["student_weight"][0]) / 8 * factor
            expected = torch.stack([slope * 1 / 4, slope * 3 / 4])
            torch.testing.assert_close(got.gradients["student_hidden"], expected)
            torch.testing.assert_close(got.stats["student_entropy"], torch.full((2,), math.log(2), dtype=torch.float64))


def test_transform_is_a_capped_tanh_of_the_scaled_logit(double_impl):
    problem = build(rows=1, width=1, vocab=2, dtype=torch.float64).with_tensors(
        student_hidden=torch.ones(1, 1, dtype=torch.float64),
        student_weight=torch.tensor([[4.0], [-1.0]], dtype=torch.float64),
        teacher_hidden=torch.zeros(1, 1, dtype=torch.float64),
    )
    problem = problem.with_options(student_transform=LogitTransform(scale=0.5, softcap=3.0))
    log_q = F.log_softmax(3 * torch.tanh(torch.tensor([2.0, -0.5], dtype=torch.float64) / 3), -1)
    expected = (0.5 * (math.log(0.5) - log_q)).sum().item()
    assert oracle(problem).loss.item() == pytest.approx(expected, rel=1e-12)
    assert run(problem, double_impl).loss.item() == pytest.approx(expected, rel=1e-12)


def test_reference_is_the_oracle_in_float64(divergence):
    problem = build_everything(torch.float64, divergence=divergence)
    exact = oracle(problem)
    leaves = problem.leaves()
    loss = loss_of(problem, leaves, "reference")
    torch.testing.assert_close(loss.detach(), exact.loss, rtol=1e-13, atol=0.0)
    (loss * problem.upstream).backward()
    for name, gradient in exact.gradients.items():
        torch.testing.assert_close(leaves[name].grad, gradient, rtol=1e-11, atol=1e-15)


def test_impl_none_on_the_cpu_is_torch():
    problem = build_everything()
    by_default, by_name = (loss_of(problem, problem.tensors, impl) for impl in (None, "torch"))
    assert torch.equal(by_default, by_name)
