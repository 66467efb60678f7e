"""Measure time, peak memory and accuracy of the loss, ours and peers', in one process on the same tensors.

    pytest benchmarks/ [--results DIR]

A measurement is the median of the rounds that fit half a second, at least 3, each between two synchronisations; on
CUDA the L2 cache is overwritten before each. Correctness comes first, on the very call that is timed: a wrong result
has no time. What could not be measured is a row that says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.accuracy import Outcome, Problem
from benchmarks.cases import CPU_CASES, GPU_CASES, Case, Inputs
from benchmarks.memory import peak_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {"cpu": CPU_CASES, "cuda": GPU_CASES}
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 0.5, 3, 10  # of one measurement; the whole suite is to take minutes


@lru_cache(maxsize=1)
def problem_of(case: Case) -> Problem:
    """Make a case's problem once for all systems that run it, whose tests follow each other; keep no other case's."""
    return Problem(case, DEVICE)


def test_linear_kl(benchmark, record, case: Case, system: str) -> None:
    with record(system=system, **case.describe()) as row:
        row |= measure(benchmark, problem_of(case), getattr(peers, system))


def measure(benchmark: Any, problem: Problem, system: Callable[[Inputs], Callable[[], Tensor]]) -> dict[str, Any]:
    x, run = problem.inputs, system(problem.inputs)
    is_limit = system is peers.products
    step = run if is_limit else partial(forward_backward, x, run)
    result = step()
    errors: dict[str, float] = {}
    if not is_limit:
        errors = problem.errors(Outcome(result, x.student.grad, x.student_weight.grad))
        problem.hold_to_bounds(errors)
        if system.__name__.startswith("ours"):
            problem.hold_to_plain_torch(errors)
    x.student.grad = x.student_weight.grad = None  # what is held now does not count in the peak
    cold_cache()
    start = time.perf_counter()
    peak = peak_bytes(step, DEVICE)
    rounds = min(max(int(SECONDS / (time.perf_counter() - start)), LEAST_ROUNDS), MOST_ROUNDS)
    rounds = 1 if problem.case.rehearsal else rounds
    benchmark.pedantic(synchronised, args=(step,), setup=cold_cache, rounds=rounds)
    return {
        "status": "measured",
        "seconds": benchmark.stats.stats.median if benchmark.stats else None,  # None: --benchmark-disable
        "rounds": rounds,
        # The results of the products are made beforehand.
        "bytes_above": None if is_limit else peak - problem.case.gradient_bytes,
        "errors": errors,
        "float32_logits_errors": problem.float32_logits_errors if errors else {},
    }


def forward_backward(x: Inputs, run: Callable[[], Tensor]) -> Tensor:
    x.student.grad = x.student_weight.grad = None
    with torch.set_grad_enabled(x.case.backward):
        loss = run()
    if x.case.backward:
        loss.backward()
    return loss.detach()


def synchronised(run: Callable[[], object]) -> None:
    run()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@cache
def _larger_than_cache() -> Tensor:
    return torch.empty(2**28, dtype=torch.uint8, device=DEVICE)


def cold_cache() -> None:
    if DEVICE == "cuda":
        _larger_than_cache().zero_()
        torch.cuda.synchronize()
