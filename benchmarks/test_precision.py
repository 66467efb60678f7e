"""Measure how accurate the loss is the closer the student is to its teacher, ours and peers'.

Self-distillation lives at the small end, where two probabilities that nearly agree are subtracted: there a loss that
rounds logits or log-probabilities to 16 bits gives a gradient that is mostly noise. So nothing is "wrong" here; what an
error comes to is the result.
"""

from __future__ import annotations

from functools import lru_cache

from benchmarks import peers
from benchmarks.accuracy import Outcome, Problem
from benchmarks.cases import PRECISION_CASES, Case
from benchmarks.test_linear_kl import DEVICE, forward_backward

CASES = {"cpu": PRECISION_CASES, "cuda": PRECISION_CASES}


@lru_cache(maxsize=1)
def problem_of(case: Case) -> Problem:
    return Problem(case, DEVICE)


def test_precision(benchmark, record, case: Case, system: str) -> None:
    with record(system=system, **case.describe()) as row:
        problem = problem_of(case)
        x = problem.inputs
        run = getattr(peers, system)(x)
        result = benchmark.pedantic(forward_backward, args=(x, run), rounds=1)
        errors = problem.errors(Outcome(result, x.student.grad, x.student_weight.grad))
        if system.startswith("ours"):
            problem.hold_to_plain_torch(errors)
        row |= {"status": "measured", "errors": errors, "float32_logits_errors": problem.float32_logits_errors}
