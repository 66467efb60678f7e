"""Normalisers and averages of parts of a vocabulary, merged, against the whole computed at once in float64."""

import itertools

import pytest
import torch

from disc_kernels.linear_kl.ranks.group import expectation, merge_normalisers

ROWS, VOCAB = 5, 60
CUTS = {
    "halves": [30],
    "ragged": [1, 7, 8, 40],
    "empty parts": [0, 0, 25, 25, 60],
    "one entry each": list(range(1, VOCAB)),
    "whole": [],
}


def describe(u):
    """Return maximum, sum of exponentials above it, and entropy of logits [R, n], n may be 0, by the definitions."""
    maximum = u.amax(-1) if u.shape[1] else u.new_full(u.shape[:1], -torch.inf)
    e = (u - torch.where(maximum == -torch.inf, 0.0, maximum).unsqueeze(1)).exp()
    total = e.sum(-1)
    p = e / torch.where(total == 0, 1.0, total).unsqueeze(1)
    return maximum, total, -torch.where(p > 0, p * p.log(), 0.0).sum(-1)


def split(u, cuts):
    edges = [0, *cuts, u.shape[1]]
    parts = [describe(u[:, start:stop]) for start, stop in itertools.pairwise(edges)]
    return [torch.stack(x) for x in zip(*parts, strict=True)]


@pytest.fixture(params=["alike", "far apart", "far from zero", "masked"])
def logits(request):
    u = torch.randn(ROWS, VOCAB, dtype=torch.float64)
    if request.param == "far apart":
        u = 100 * u
    if request.param == "far from zero":
        u = u + 1e4
    if request.param == "masked":  # whole parts of some splits
        u[:, 5:35] = -torch.inf
    return u


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def merged(maximum, total, entropy, dim=0):
    top, whole, log_share = merge_normalisers(maximum, total, dim)
    return top, whole, expectation(log_share, entropy - log_share, dim)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_merged_parts_are_the_whole(logits, cuts):
    for got, expected in zip(merged(*split(logits, cuts)), describe(logits), strict=True):
        assert_same(got, expected)


def test_along_another_dimension(logits):
    parts = split(logits, CUTS["ragged"])
    for got, expected in zip(merged(*(x.T for x in parts), dim=1), merged(*parts), strict=True):
        assert_same(got, expected)


def test_float32_parts_are_merged_in_float64(logits):
    maximum, total, _ = (x.float() for x in split(logits, CUTS["ragged"]))
    _, whole, log_share = merge_normalisers(maximum, total, 0)
    assert whole.dtype == log_share.dtype == torch.float64
    assert_same(log_share.exp().sum(0), torch.ones(ROWS, dtype=torch.float64))


def test_no_possible_entry_is_nan_in_its_row_only(logits):
    logits[2] = -torch.inf
    maximum, total, _ = split(logits, CUTS["ragged"])
    top, whole, log_share = merge_normalisers(maximum, total, 0)
    assert top[2] == -torch.inf and whole[2] == 0
    assert (log_share[:, 2] == -torch.inf).all()
    assert not log_share.isnan().any()


def test_nan_stays_in_its_row(logits):
    logits[2, 50] = torch.nan
    _, whole, _ = merge_normalisers(*split(logits, CUTS["ragged"])[:2], 0)
    assert whole.isnan().tolist() == [row == 2 for row in range(ROWS)]


MUTANTS = {
    "a part dropped": lambda maximum, total, entropy: merged(maximum[1:], total[1:], entropy[1:]),
    "a part counted twice": lambda *x: merged(*(part[[0, 0, 1, 2, 3, 4]] for part in x)),
    "sums not rescaled": lambda maximum, total, entropy: (maximum.amax(0), total.sum(0), entropy),
    "entropies averaged": lambda *x: (*merged(*x)[:2], x[2].mean(0)),
    "shares of equal size": lambda *x: (*merged(*x)[:2], (x[2] + torch.tensor(5.0).log()).mean(0)),
    "without the shares' own entropy": lambda maximum, total, entropy: (
        *merged(maximum, total, entropy)[:2],
        expectation(merge_normalisers(maximum, total, 0)[2], entropy, 0),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_mutant_is_rejected(mutant):
    logits = torch.randn(ROWS, VOCAB, dtype=torch.float64)
    parts, whole = split(logits, [4, 11, 30, 52]), describe(logits)
    for got, expected in zip(merged(*parts), whole, strict=True):  # the control
        assert_same(got, expected)
    with pytest.raises(AssertionError):
        for got, expected in zip(mutant(*parts), whole, strict=True):
            assert_same(got, expected)
