"""The comparison every other test uses rejects each of these wrong implementations, wherever the fault shows.

A mutant is plain torch on a changed problem, or its outcome changed. It damages one part at a time (the loss, or one
gradient) and leaves the rest right, so nothing is rejected because of its neighbour.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from tests.linear_kl.oracle import assert_accurate, build, build_everything, plain

GRADIENTS = ("student_hidden", "student_weight", "student_bias")
EVERYWHERE = ("loss", *GRADIENTS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Mutant:
    outcome: Callable  # problem -> the wrong outcome
    damages: tuple[str, ...] = EVERYWHERE
    options: tuple[tuple[str, object], ...] = ()  # what the problem must use for the fault to show


def on_changed(**changed):
    """Plain torch on the problem with other options; a callable makes the option from the problem's own."""

    def outcome(problem):
        made = {k: v(problem.options) if callable(v) else v for k, v in changed.items()}
        return plain(problem.with_options(**made))

    return outcome


def times(factor):
    """Loss and gradients multiplied by a number made from the options."""

    def outcome(problem):
        right, f = plain(problem), factor(problem.options)
        return replace(right, loss=right.loss * f, gradients={n: g * f for n, g in right.gradients.items()})

    return outcome


def without_softcap_derivative(problem):
    def straight_through(z, transform):
        z = transform.scale * z
        return z + (transform.softcap * torch.tanh(z / transform.softcap) - z).detach()

    return plain(problem, transform=straight_through)


def accumulated_over_chunks_in_the_input_dtype(problem):
    """The weight's gradient as a sum over chunks of one row, rounded to the inputs' dtype after each."""
    right = plain(problem)
    rows = len(problem.options["student_index"])
    total = torch.zeros_like(right.gradients["student_weight"])
    for row in range(rows):
        only = torch.zeros(rows)
        only[row] = problem.options["row_weight"][row]
        total += plain(problem.with_options(row_weight=only, reduction="sum")).gradients["student_weight"]
    scale = problem.options["row_weight"].sum() if problem.options.get("reduction", "mean") == "mean" else 1.0
    return replace(right, gradients={**right.gradients, "student_weight": total / scale})


def last_tile_dropped(problem):
    """128 entries of the vocabulary never visited in the backward: their part of every gradient is missing."""
    right, start = plain(problem), problem.options["vocab_size"] - 128
    gradients = {n: g.clone() for n, g in right.gradients.items()}
    for name in ("student_weight", "student_bias"):
        gradients[name][start:] = 0
    fewer = plain(problem.with_options(vocab_size=start))
    return replace(right, loss=fewer.loss, gradients={**gradients, "student_hidden": fewer.gradients["student_hidden"]})


MUTANTS = {
    "zero loss": Mutant(times(lambda o: 0.0), ("loss",)),
    "zero gradient": Mutant(times(lambda o: 0.0), GRADIENTS),
    "negated": Mutant(times(lambda o: -1.0)),
    "two per cent too much": Mutant(times(lambda o: 1.02)),
    "directions swapped": Mutant(on_changed(divergence="reverse_kl")),
    "directions swapped back": Mutant(on_changed(divergence="forward_kl"), options=(("divergence", "reverse_kl"),)),
    "vocabulary tile dropped": Mutant(last_tile_dropped),
    "vocabulary tile dropped everywhere": Mutant(on_changed(vocab_size=lambda o: o["vocab_size"] - 128)),
    "vocab_size ignored": Mutant(on_changed(vocab_size=lambda o: 1000)),
    "one entry too few": Mutant(on_changed(vocab_size=lambda o: o["vocab_size"] - 1), ("loss",)),
    "temperature left out": Mutant(on_changed(temperature=1.0)),
    "1/T left out of the gradient": Mutant(times(lambda o: o["temperature"]), GRADIENTS),
    "T^2 put in": Mutant(times(lambda o: o["temperature"] ** 2)),
    "alignment off by one": Mutant(on_changed(teacher_index=lambda o: o["teacher_index"].roll(1))),
    "student alignment off by one": Mutant(on_changed(student_index=lambda o: o["student_index"].roll(1))),
    "beta swapped": Mutant(on_changed(beta=lambda o: 1 - o["beta"]), options=(("divergence", "jsd"),)),
    "beta ignored": Mutant(on_changed(beta=0.5), options=(("divergence", "jsd"),)),
    "row weights ignored": Mutant(on_changed(row_weight=None)),
    "row weights shifted": Mutant(on_changed(row_weight=lambda o: o["row_weight"].roll(1))),
    "mean over M": Mutant(times(lambda o: o["row_weight"].sum().item() / len(o["row_weight"]))),
    "sum for mean": Mutant(on_changed(reduction="sum")),
    "softcap left out": Mutant(on_changed(student_transform=None)),
    "teacher's softcap left out": Mutant(on_changed(teacher_transform=None)),
    "softcap derivative left out": Mutant(without_softcap_derivative, GRADIENTS),
    "scale left out of the gradient": Mutant(times(lambda o: 1 / o["student_transform"].scale), GRADIENTS),
    "logits rounded to the input dtype": Mutant(lambda problem: plain(problem, round_logits=True), ("loss",)),
}
# In float32 rounding to the input dtype is no fault.
CASES = [
    pytest.param(mutant, part, dtype, id=f"{name}-{part}-{str(dtype).removeprefix('torch.')}")
    for name, mutant in MUTANTS.items()
    for part in mutant.damages
    for dtype in DTYPES
    if not (name.startswith("logits rounded") and dtype == torch.float32)
]


def damaged(right, wrong, part):
    if part == "loss":
        return replace(right, loss=wrong.loss)
    gradient = wrong.gradients[part].to(right.gradients[part].dtype)
    return replace(right, gradients={**right.gradients, part: gradient})


@pytest.mark.parametrize("mutant, part, dtype", CASES)
def test_mutant_is_rejected(mutant, part, dtype):
    problem = build_everything(dtype, **dict(mutant.options))
    right = plain(problem)
    assert_accurate(right, problem)  # the control: nothing but the mutation is at fault
    with pytest.raises(AssertionError, match=f"^{part}: off by"):
        assert_accurate(damaged(right, mutant.outcome(problem), part), problem)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_accumulation_in_the_input_dtype_is_rejected(dtype):
    everyone = {"student_index": list(range(96)), "row_weight": [1.0] * 96}
    problem = build(rows=96, vocab=67, dtype=dtype, bias=True, reduction="sum", **everyone)
    right = plain(problem)
    assert_accurate(right, problem)
    with pytest.raises(AssertionError, match=r"^student_weight: off by"):
        assert_accurate(accumulated_over_chunks_in_the_input_dtype(problem), problem)


@pytest.mark.parametrize("part", ["loss", *GRADIENTS])
def test_not_a_number_is_rejected(part):
    problem = build_everything()
    right = plain(problem)
    wrong = {n: g.clone() for n, g in right.gradients.items()}
    for gradient in wrong.values():
        gradient.view(-1)[3] = torch.nan
    with pytest.raises(AssertionError, match=f"^{part}: off by"):
        assert_accurate(damaged(right, replace(right, loss=right.loss * torch.nan, gradients=wrong), part), problem)


@pytest.mark.parametrize("statistic", ["divergence", "student_entropy", "teacher_entropy", "agreement"])
def test_wrong_statistic_is_rejected(statistic):
    problem = build_everything()
    right = plain(problem)
    wrong = {**right.stats, statistic: 0.999 * right.stats[statistic] + 0.001}
    with pytest.raises(AssertionError, match=f"^{statistic}: off by"):
        assert_accurate(replace(right, stats=wrong), problem)


@pytest.mark.parametrize("rows_off", [1, -1])
def test_none_off_by_one_row_is_rejected(rows_off):
    problem = build_everything(reduction="none")
    right = plain(problem)
    with pytest.raises(AssertionError, match=r"^loss: off by"):
        assert_accurate(replace(right, loss=right.loss.roll(rows_off)), problem)


def test_budget_that_proves_nothing_is_rejected():
    """Identical models in bfloat16: the answer is below the rounding, so agreement with it would mean nothing."""
    problem = build(dtype=torch.bfloat16)
    problem = problem.with_tensors(**{f"teacher_{n}": problem.tensors[f"student_{n}"] for n in ("hidden", "weight")})
    with pytest.raises(AssertionError, match="proves nothing"):
        assert_accurate(plain(problem), problem)
