"""What the comparison rejects: each mutant of the frozen-head form is one mistake."""

from dataclasses import replace

import pytest
import torch

from tests.frozen_head.calls import everything, run, summary_of
from tests.linear_kl.oracle import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gradient_times(factor):
    def mutated(p):
        right = run(p, "torch")
        return replace(right, gradients={"student_hidden": right.gradients["student_hidden"] * factor(p)})

    return mutated


def summary_with(**parts):
    def mutated(p):
        summary = summary_of(p, "torch")
        return run(p, "torch", summary=summary._replace(**{n: f(getattr(summary, n)) for n, f in parts.items()}))

    return mutated


def options_with(**options):
    def mutated(p):
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
def test_mutant_is_rejected(name, dtype):
    mutated, damages = MUTANTS[name]
    p = everything(dtype)
    right, wrong = run(p, "torch"), mutated(p)
    assert_accurate(right, p)  # the control
    for part in damages:
        if part == LOSS:
            damaged = replace(right, loss=wrong.loss)
        else:
            damaged = replace(right, gradients={GRADIENT: wrong.gradients[GRADIENT].to(dtype)})
        with pytest.raises(AssertionError, match=f"^{part}: off by"):
            assert_accurate(damaged, p)
