"""Parts of a vocabulary merged, against the whole computed at once in float64."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from disc_kernels.linear_kl.vocab_parallel import VocabPart, finish, merge

ROWS, VOCAB = 5, 60
CUTS = {
    "halves": [30],
    "ragged": [1, 7, 8, 40],
    "empty parts": [0, 0, 25, 25, 60],
    "one entry each": list(range(1, VOCAB)),
    "whole": [],
}


def describe(u_s, u_t, divergence):
    """The part that holds these logits [R, n], n may be 0, by the definitions."""

    def model(u):
        maximum = u.amax(-1) if u.shape[1] else u.new_full(u.shape[:1], -torch.inf)
        base = torch.where(maximum == -torch.inf, 0.0, maximum).unsqueeze(1)
        e = (u - base).exp()
        total = e.sum(-1)
        p = e / torch.where(total == 0, 1.0, total).unsqueeze(1)
        return maximum, total, p

    max_s, sum_s, q = model(u_s)
    max_t, sum_t, p = model(u_t)
    a, b = (p, q) if divergence == "forward_kl" else (q, p)
    kl = torch.where(a > 0, a * (a.log() - b.log()), 0.0).sum(-1)
    entropies = (-torch.where(x > 0, x * x.log(), 0.0).sum(-1) for x in (q, p))
    if u_s.shape[1]:
        agreement = (u_s.argmax(-1) == u_t.argmax(-1)).to(u_s.dtype)
    else:
        agreement = torch.zeros_like(sum_s)
    # Without an entry of the model it is averaged over, a divergence of a part is undefined, and must not matter.
    kl = torch.where((sum_s == 0) | (sum_t == 0), 7.0, kl)
    return VocabPart(max_s, sum_s, max_t, sum_t, kl, *entropies, agreement)


def split(u_s, u_t, cuts, divergence):
    edges = [0, *cuts, u_s.shape[1]]
    parts = [describe(u_s[:, start:stop], u_t[:, start:stop], divergence) for start, stop in pairwise(edges)]
    return VocabPart(*(torch.stack(x) for x in zip(*parts, strict=True)))


def take(parts, which):
    return VocabPart(*(x[which] for x in parts))


def cat(*parts):
    return VocabPart(*(torch.stack(x) for x in zip(*parts, strict=True)))


def assert_same(got, expected, tolerance=1e-13):
    for name, x, y in zip(VocabPart._fields, got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@dataclass
class Logits:
    student: torch.Tensor  # [ROWS, VOCAB] float64
    teacher: torch.Tensor


@pytest.fixture(params=["alike", "far apart", "far from zero", "masked"])
def logits(request):
    student, teacher = torch.randn(2, ROWS, VOCAB, dtype=torch.float64)
    if request.param == "far apart":
        student, teacher = 100 * student, 100 * teacher
    if request.param == "far from zero":
        student, teacher = student + 1e4, teacher - 1e4
    if request.param == "masked":  # whole parts of some splits, in one model or both; never the model averaged over
        student[:, 5:35] = teacher[:, 5:35] = -torch.inf
    return Logits(student, teacher)


@pytest.fixture(params=["forward_kl", "reverse_kl"])
def direction(request):
    return request.param


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_merge_is_the_whole(logits, direction, cuts):
    parts = split(logits.student, logits.teacher, cuts, direction)
    assert_same(merge(parts, direction), describe(logits.student, logits.teacher, direction))


def test_merge_along_another_dimension(logits, direction):
    parts = split(logits.student, logits.teacher, CUTS["ragged"], direction)
    moved = VocabPart(*(x.movedim(0, 1) for x in parts))
    assert_same(merge(moved, direction, dim=1), merge(parts, direction), tolerance=1e-15)


def test_merge_is_associative(logits, direction):
    parts = split(logits.student, logits.teacher, [4, 11, 30, 52], direction)
    at_once = merge(parts, direction)
    left, right = merge(take(parts, slice(2)), direction), merge(take(parts, slice(2, None)), direction)
    assert_same(merge(cat(left, right), direction), at_once)
    one_by_one = take(parts, 0)
    for i in range(1, 5):
        one_by_one = merge(cat(one_by_one, take(parts, i)), direction)
    assert_same(one_by_one, at_once)


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_masked_in_one_model(direction, model):
    """Where the divergence exists: the mask is on the model that is averaged over."""
    student, teacher = torch.randn(2, ROWS, VOCAB, dtype=torch.float64)
    {"student": student, "teacher": teacher}[model][:, 5:35] = -torch.inf
    merged = finish(merge(split(student, teacher, [7, 30], direction), direction))
    if (model == "student") == (direction == "forward_kl"):
        assert (merged.divergence == torch.inf).all()
    else:
        expected = describe(student, teacher, direction)
        torch.testing.assert_close(merged.divergence, expected.divergence, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(merged.student_entropy, expected.student_entropy, rtol=1e-13, atol=1e-13)


def test_no_possible_entry_is_nan_at_the_end_and_not_before(direction):
    student = torch.full((ROWS, VOCAB), -torch.inf, dtype=torch.float64)
    teacher = torch.randn(ROWS, VOCAB, dtype=torch.float64)
    for u_s, u_t in ((student, teacher), (student, student)):
        merged = merge(split(u_s, u_t, CUTS["ragged"], direction), direction)
        assert not any(x.isnan().any() for x in merged)
        assert finish(merged).divergence.isnan().all()


def test_nan_stays_in_its_row(direction):
    student, teacher = torch.randn(2, ROWS, VOCAB, dtype=torch.float64)
    student[2, 50] = torch.nan
    merged = finish(merge(split(student, teacher, CUTS["ragged"], direction), direction))
    assert merged.divergence.isnan().tolist() == [row == 2 for row in range(ROWS)]


@pytest.mark.parametrize("cuts", [[10, 20], [20], [15, 25]], ids=str)
def test_first_of_equal_maxima(direction, cuts):
    """Entries 12 and 22 are both the student's largest: agreement is with the first."""
    student, teacher = torch.zeros(2, 2, 30, dtype=torch.float64)
    student[:, [12, 22]] = 1.0
    teacher[0, 12] = teacher[1, 22] = 1.0
    assert merge(split(student, teacher, cuts, direction), direction).agreement.tolist() == [1.0, 0.0]


def test_nearly_identical_models_in_float32(direction):
    """A divergence of 5e-11 survives merging parts whose numbers are float32."""
    teacher = torch.randn(ROWS, VOCAB, dtype=torch.float64)
    student = teacher + 1e-5 * torch.randn(ROWS, VOCAB, dtype=torch.float64)
    parts = VocabPart(*(x.float() for x in split(student, teacher, CUTS["ragged"], direction)))
    merged = merge(parts, direction)
    assert all(x.dtype == torch.float32 for x in merged)
    exact = describe(student, teacher, direction).divergence
    assert 1e-11 < exact.min() < exact.max() < 2e-10
    assert ((merged.divergence - exact).abs() <= 0.02 * exact + (4 * torch.finfo(torch.float32).eps) ** 2).all()


def test_without_statistics(direction):
    student, teacher = torch.randn(2, ROWS, VOCAB, dtype=torch.float64)
    parts = split(student, teacher, CUTS["ragged"], direction)
    bare = merge(VocabPart(*parts[:5]), direction)
    assert bare[5:] == (None, None, None)
    assert_same(VocabPart(*bare[:5]), VocabPart(*merge(parts, direction)[:5]))
    stats = finish(bare)
    assert stats.divergence.isfinite().all()
    assert all(x.isnan().all() for x in stats[1:])


def test_never_negative_at_the_end():
    whole = describe(*torch.randn(2, ROWS, VOCAB), "forward_kl")._replace(divergence=torch.tensor([-1e-9] * ROWS))
    assert finish(whole).divergence.tolist() == [0.0] * ROWS


def test_jsd_does_not_merge():
    parts = split(*torch.randn(2, ROWS, VOCAB), [30], "forward_kl")
    with pytest.raises(ValueError, match=r"divergence: expected one of forward_kl, reverse_kl.* got 'jsd'"):
        merge(parts, "jsd")


def scaled(parts, direction):
    shares = [
        torch.log_softmax(maximum + total.log(), 0)
        for maximum, total in ((parts.teacher_maximum, parts.teacher_sum), (parts.student_maximum, parts.student_sum))
    ]
    return shares if direction == "forward_kl" else shares[::-1]


def without(term):
    """The chain rule with one of its parts left out."""

    def mutant(parts, direction):
        a, b = scaled(parts, direction)
        value = {
            "the share of the other model": parts.divergence + a,
            "what the parts' shares differ by": parts.divergence,
            "the parts' own divergences": a - b,
        }[term]
        return merge(parts, direction)._replace(divergence=(a.exp() * value).sum(0))

    return mutant


def of_other_direction(parts, direction):
    a, b = scaled(parts, direction)
    return merge(parts, direction)._replace(divergence=(b.exp() * (parts.divergence + a - b)).sum(0))


def models_swapped(parts, direction):
    return merge(VocabPart(*(parts[i] for i in (2, 3, 0, 1, 4, 6, 5, 7))), direction)


def sums_not_rescaled(parts, direction):
    return merge(parts, direction)._replace(student_sum=parts.student_sum.sum(0))


def agreement_anywhere(parts, direction):
    return merge(parts, direction)._replace(agreement=parts.agreement.amax(0))


MUTANTS = {
    "a part dropped": lambda parts, direction: merge(take(parts, slice(1, None)), direction),
    "a part counted twice": lambda parts, direction: merge(take(parts, [0, 0, 1, 2, 3, 4]), direction),
    "models swapped": lambda parts, direction: merge(
        VocabPart(*(parts[i] for i in (2, 3, 0, 1, 4, 6, 5, 7))), direction
    ),
    "direction swapped": of_other_direction,
    "sums not rescaled": sums_not_rescaled,
    "agreement of any part": agreement_anywhere,
    "entropies averaged": lambda parts, direction: merge(parts, direction)._replace(
        student_entropy=parts.student_entropy.mean(0)
    ),
    "the share of the other model": without("the share of the other model"),
    "what the parts' shares differ by": without("what the parts' shares differ by"),
    "the parts' own divergences": without("the parts' own divergences"),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_mutant_is_rejected(direction, mutant):
    student, teacher = torch.randn(2, ROWS, VOCAB, dtype=torch.float64)
    teacher[:, 3] = student[:, 3] = 1.0  # the first part's models agree; their largest entries are elsewhere
    student[:, :3] = teacher[:, :3] = -5.0
    teacher[:, 50], student[:, 20] = 6.0, 6.0
    parts, whole = split(student, teacher, [4, 11, 30, 52], direction), describe(student, teacher, direction)
    assert_same(merge(parts, direction), whole)  # the control
    with pytest.raises(AssertionError):
        assert_same(mutant(parts, direction), whole)
