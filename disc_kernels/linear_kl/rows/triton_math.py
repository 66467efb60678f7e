"""Compute number by number what the Triton kernels need: nothing here knows a model or a pointer."""

from __future__ import annotations

import triton
import triton.language as tl

# The divergences, as constants of a kernel.
DIVERGENCE_CODES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}
FORWARD_KL: tl.constexpr = tl.constexpr(0)
REVERSE_KL: tl.constexpr = tl.constexpr(1)
JSD: tl.constexpr = tl.constexpr(2)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # of finite float32 numbers


@triton.jit
def exp(x):
    """Return exp(x), 0 below the smallest normal number: `tl.exp` takes three more instructions for those."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def one_minus_exp(x):
    """Return 1 - exp(-x) for x >= 0, to full accuracy near 0."""
    series = 1 / 120 - x * (1 / 720 - x * (1 / 5040 - x * (1 / 40320)))
    series = 1 - x * (1 / 2 - x * (1 / 6 - x * (1 / 24 - x * series)))
    return tl.where(x < 0.5, x * series, 1 - exp(-x))


@triton.jit
def expm1(x):
    """Return exp(x) - 1, to full accuracy near 0."""
    shrink = one_minus_exp(tl.abs(x))
    return tl.where(x > 0, exp(x) * shrink, -shrink)


@triton.jit
def log1p(x):
    """Return log(1 + x).

    Rounding in 1 + x is undone by the ratio of x to what of it is left (Kahan; Goldberg 1991, theorem 4).
    """
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / (y - 1.0)))


@triton.jit
def zero_where(a, x):
    """Return x, but 0 where a is 0: 0 log 0 = 0."""
    return tl.where(a == 0, 0.0, x)


@triton.jit
def online_exp(u, maximum):
    """Return the maximum of each lane with its entry `u`, and exp above it of the old maximum and of the entry.

    One of the two is 1, so one exponential is enough. Lanes begin at `LOWEST`: of -inf, which a bias or a mask gives,
    the difference from a maximum of -inf would be NaN.
    """
    difference = u - maximum
    smaller = exp(-tl.abs(difference))
    return tl.maximum(maximum, u), tl.where(difference > 0, smaller, 1.0), tl.where(difference > 0, 1.0, smaller)


@triton.jit
def merge_lanes(maximum):
    """Return the maximum over all lanes, and what each lane's sum is multiplied by."""
    top = tl.max(maximum, axis=0)
    return top, exp(maximum - top)


@triton.jit
def first_maximum(maximum, index):
    """Return the index of the largest lane; the lowest of equals, as `torch.argmax` gives on the CPU."""
    return tl.min(tl.where(maximum == tl.max(maximum, axis=0), index, 2147483647), axis=0)


@triton.jit
def generalised_kl_terms(la, lb, log_ratio):
    """Return (a (la - lb) + (b - a), b - a), where log_ratio = lb - la; b - a = (a + b) tanh(log_ratio / 2) near 0."""
    a = exp(la)
    b = exp(lb)
    x = log_ratio * 0.5
    x2 = x * x
    series = 1 - x2 * (1 / 3 - x2 * (2 / 15 - x2 * (17 / 315 - x2 * (62 / 2835))))
    difference = tl.where(x2 < 0.0625, (a + b) * (x * series), b - a)
    return tl.where(a == 0, difference, difference - a * log_ratio), difference


@triton.jit
def over_mixture(log_ratio, beta):
    """Return log m - max(lp, lq), m = beta p + (1 - beta) q, from log_ratio = lq - lp.

    Nothing cancels where p and q are close.
    """
    return log1p(-one_minus_exp(tl.abs(log_ratio)) * tl.where(log_ratio > 0, beta, 1.0 - beta))


@triton.jit
def tanh(x):
    """Return sign(x) d / (2 - d), d = 1 - exp(-2 |x|): no overflow, accurate near 0, -1 and 1 for -inf and +inf."""
    d = one_minus_exp(2.0 * tl.abs(x))
    t = d / (2.0 - d)
    return tl.where(x < 0, -t, t)


@triton.jit
def divergence_terms(lq, lp, log_ratio, beta, DIVERGENCE: tl.constexpr):
    """Return (what the divergence is the sum of, its score), where log_ratio = lq - lp; see torch_backend.py.

    The score is the gradient itself for forward KL; for the others it is h, of which the mean is yet to be subtracted.
    """
    if DIVERGENCE == FORWARD_KL:
        return generalised_kl_terms(lp, lq, log_ratio)
    elif DIVERGENCE == REVERSE_KL:
        terms, _ = generalised_kl_terms(lq, lp, -log_ratio)
        return terms, log_ratio
    else:
        over = over_mixture(log_ratio, beta)
        lm = tl.maximum(lp, lq) + over
        h = tl.minimum(log_ratio, 0.0) - over  # lq - lm
        terms_t, _ = generalised_kl_terms(lp, lm, over + tl.maximum(log_ratio, 0.0))
        terms_s, _ = generalised_kl_terms(lq, lm, -h)
        return beta * terms_t + (1.0 - beta) * terms_s, (1.0 - beta) * h
