"""Measure documents a second and peak memory of whole training steps: ours, and the authors' loop over split points.

    pytest benchmarks/test_step.py [--results DIR]

A step is both models' forwards, loss, backward and AdamW, from a list of tokenised documents with their splits to new
weights. Correctness comes first: in the first step, from the same weights, ours must give the loop's loss and
gradients, or it has no time. A time is the median of the steps that fit `SECONDS`, at least three (of the loop one: its
steps of many documents are many equal parts anyway), each with other documents, between two synchronisations. What
could not be measured is a row that says why.
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.memory import peak_bytes
from benchmarks.step_cases import CPU_CASES, GPU_CASES, LOOP, Shape, StepCase
from benchmarks.step_run import Outcome, Problem, Run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {"cpu": CPU_CASES, "cuda": GPU_CASES}
SECONDS, MOST_ROUNDS = 1.5, 10  # of one measurement; all of them are to take two minutes on a GPU


@lru_cache(maxsize=1)
def teacher_of(shape: Shape) -> PreTrainedModel:
    return shape.teacher(DEVICE)


@lru_cache(maxsize=1)
def problem_of(case: StepCase) -> Problem:
    """Make a case's problem once for both systems, whose tests follow each other."""
    return Problem(case, teacher_of(case.shape))


def test_step(benchmark, record, case: StepCase, system: str) -> None:
    with record(system=system, **case.describe()) as row:
        row |= measure(benchmark, problem_of(case), system)


def measure(benchmark: Any, problem: Problem, system: str) -> dict[str, Any]:
    if system != LOOP:
        _ = problem.expected  # before this run's student takes its memory
    run = Run(problem, system)
    outcomes: list[Outcome] = []
    # A step holds the most in its backward: AdamW works in place.
    above = peak_bytes(lambda: outcomes.append(run.forward_backward()), DEVICE)
    errors: dict[str, float] = {}
    if system == LOOP:
        problem.expected = outcomes.pop()
    else:
        errors = problem.errors(outcomes.pop())
    run.update()
    for _ in range(2):  # steps of other lengths, for which ours compiles its attention a second and last time
        start = time.perf_counter()
        run.step(documents=1)
        seconds = problem.case.documents * (time.perf_counter() - start)
    least = 1 if system == LOOP else 3  # ours may compile once more for a step of so many documents
    rounds = 1 if problem.case.rehearsal else min(max(int(SECONDS / seconds), least), MOST_ROUNDS)
    benchmark.pedantic(run.step, rounds=rounds)
    return {
        "status": "measured",
        "seconds": benchmark.stats.stats.median if benchmark.stats else None,  # None: --benchmark-disable
        "rounds": rounds,
        "bytes": run.held_bytes() + above,
        "bytes_above": above,
        "errors": errors,
    }
