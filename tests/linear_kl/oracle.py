"""Make problems for the tests of `disc_kernels.linear_kl`, and compare with a float64 oracle in plain torch.

The oracle knows nothing of the package: it writes all logits down, calls `log_softmax`, lets autograd differentiate.
`assert_accurate` compares with it everywhere; `test_mutants.py` proves that it rejects wrong numbers.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from disc_kernels import LogitTransform, fused_suffix_kl

STATS = ("divergence", "student_entropy", "teacher_entropy", "agreement")


@dataclass(frozen=True)
class Problem:
    """Hold the arguments of one call, and the gradient that its result receives."""

    tensors: dict[str, Tensor]  # hidden states, weights, biases
    options: dict[str, Any] = field(default_factory=dict)  # every other argument of fused_suffix_kl
    upstream: float | Tensor = 1.7  # [M] for reduction="none"
    asks: tuple[str, ...] = ("student_hidden", "student_weight", "student_bias")  # what requires a gradient

    def with_options(self, **options: Any) -> "Problem":
        return replace(self, options={**self.options, **options})

    def with_tensors(self, **tensors: Tensor) -> "Problem":
        return replace(self, tensors={**self.tensors, **tensors})

    def on(self, device: str) -> "Problem":
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return replace(self, tensors={k: v.to(device) for k, v in self.tensors.items()}, options=options)

    def leaves(self) -> dict[str, Tensor]:
        """Return the tensors, detached; those that ask for a gradient require one."""
        return {name: t.detach().requires_grad_(name in self.asks) for name, t in self.tensors.items()}


@dataclass(frozen=True)
class Outcome:
    """Hold what one forward and backward gave, on the CPU."""

    loss: Tensor
    gradients: dict[str, Tensor]
    stats: dict[str, Tensor]
    logit_scale: float = 0.0  # the largest |logit / T|; only the oracle says it


def build(
    *,
    rows: int = 6,
    teacher_rows: int | None = None,
    width: int = 24,
    teacher_width: int | None = None,
    vocab: int = 1000,
    teacher_vocab: int | None = None,
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    bias: bool = False,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Draw models whose logits spread over a few nats; lists become the index and weight tensors they stand for."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def model(name: str, rows: int, width: int, vocab: int, dtype: torch.dtype) -> dict[str, Tensor]:
        made = {f"{name}_hidden": normal(rows, width), f"{name}_weight": normal(vocab, width) * 2 / math.sqrt(width)}
        if bias:
            made[f"{name}_bias"] = normal(vocab)
        return {key: value.to(dtype) for key, value in made.items()}

    student = model("student", rows, width, vocab, dtype)
    teacher = model(
        "teacher", teacher_rows or rows, teacher_width or width, teacher_vocab or vocab, teacher_dtype or dtype
    )
    for key in ("student_index", "teacher_index"):
        if isinstance(options.get(key), list):
            options[key] = torch.tensor(options[key], dtype=torch.int64)
    if isinstance(options.get("row_weight"), list):
        options["row_weight"] = torch.tensor(options["row_weight"], dtype=torch.float32)
    problem = Problem(student | teacher, options)
    if options.get("reduction") == "none":
        problem = replace(problem, upstream=normal(count(problem)).float())
    return problem


def count(problem: Problem) -> int:
    """Return M, the number of compared rows."""
    for key in ("student_index", "teacher_index"):
        if problem.options.get(key) is not None:
            return len(problem.options[key])
    return math.prod(problem.tensors["student_hidden"].shape[:-1])


def build_everything(dtype: torch.dtype = torch.float32, **options: Any) -> Problem:
    """Make one problem that uses every option at once."""
    used: dict[str, Any] = {
        "student_index": [4, 0, 2, 2, 5, 1, 3],
        "teacher_index": [3, 3, 0, 1, 1, 2, 0],
        "row_weight": [0.5, 0.0, 2.0, 1.0, 0.25, 1.0, 3.0],
        "student_transform": LogitTransform(scale=1.5, softcap=5.0),
        "teacher_transform": LogitTransform(scale=0.7, softcap=6.0),
        "vocab_size": 995,
        "temperature": 2.0,
        "beta": 0.3,
    }
    used |= {"rows": 6, "teacher_rows": 4, "width": 24, "teacher_width": 16, "vocab": 1000, "teacher_vocab": 1013}
    return build(dtype=dtype, bias=True, **{**used, **options})


# ---------------------------------------------------------------------------------------------------------------------
# The oracle


def _transformed(z: Tensor, transform: LogitTransform | None) -> Tensor:
    if transform is None:
        return z
    z = transform.scale * z
    return z if transform.softcap is None else transform.softcap * torch.tanh(z / transform.softcap)


def _relative_entropy(p_log: Tensor, q_log: Tensor) -> Tensor:
    """Compute sum_v p_v (log p_v - log q_v) in nats, where p_v = 0 counts nothing: [M, V], [M, V] -> [M]."""
    p = p_log.exp()
    return (p * torch.where(p > 0, p_log - q_log, 0.0)).sum(-1)


def _entropy(p_log: Tensor) -> Tensor:
    p = p_log.exp()
    return -(p * torch.where(p > 0, p_log, 0.0)).sum(-1)


def _row_divergence(student_log: Tensor, teacher_log: Tensor, divergence: str, beta: float) -> Tensor:
    """Compute divergences [M] from log-probabilities [M, V] of both models."""
    if divergence == "forward_kl":
        return _relative_entropy(teacher_log, student_log)
    if divergence == "reverse_kl":
        return _relative_entropy(student_log, teacher_log)
    impossible = torch.isinf(student_log) & torch.isinf(teacher_log)  # logaddexp(-inf, -inf) has no gradient
    mixture_log = torch.logaddexp(
        math.log1p(-beta) + student_log.masked_fill(impossible, 0.0),
        math.log(beta) + teacher_log.masked_fill(impossible, 0.0),
    )
    to_mixture = _relative_entropy(teacher_log, mixture_log), _relative_entropy(student_log, mixture_log)
    return beta * to_mixture[0] + (1 - beta) * to_mixture[1]


def _evaluate(
    problem: Problem,
    dtype: torch.dtype,
    *,
    round_logits: bool = False,
    transform: Callable[[Tensor, LogitTransform | None], Tensor] = _transformed,
) -> Outcome:
    """Compute all in plain torch, logits and what follows in `dtype`; `round_logits` and `transform` serve the mutants.

    As in any torch program the operands of the products in the backward have the inputs' own dtype, so the gradient of
    the logits is rounded to it (which does nothing for the oracle, whose inputs were converted to float64 first).
    """
    options = {"temperature": 1.0, "divergence": "forward_kl", "beta": 0.5, "reduction": "mean", **problem.options}
    leaves = problem.leaves()

    def log_probabilities(name: str) -> tuple[Tensor, Tensor]:
        hidden, weight, bias = leaves[f"{name}_hidden"], leaves[f"{name}_weight"], leaves.get(f"{name}_bias")
        rows = hidden.flatten(0, -2)
        if options.get(f"{name}_index") is not None:
            rows = rows[options[f"{name}_index"]]
        z = rows.to(dtype) @ weight.to(dtype).T
        if z.requires_grad:
            z.register_hook(lambda g: g.to(hidden.dtype).to(dtype))
        if bias is not None:
            z = z + bias.to(dtype)
        if round_logits:
            z = z.to(hidden.dtype).to(dtype)
        size = options.get("vocab_size") or len(weight)
        u = transform(z, options.get(f"{name}_transform"))[:, :size] / options["temperature"]
        return u, u.log_softmax(-1)

    student, student_log = log_probabilities("student")
    teacher, teacher_log = log_probabilities("teacher")
    d = _row_divergence(student_log, teacher_log, options["divergence"], options["beta"])
    weight = options.get("row_weight")
    weight = torch.ones_like(d) if weight is None else weight.to(dtype)
    if options["reduction"] == "none":
        loss = d
    else:
        loss = (weight * d).sum()
        if options["reduction"] == "mean":
            loss = loss / weight.sum() if weight.sum() != 0 else 0.0 * d.sum()

    asked = [name for name in problem.asks if name in leaves]
    upstream = torch.as_tensor(problem.upstream, dtype=dtype).expand_as(loss)
    gradients = torch.autograd.grad(loss, [leaves[name] for name in asked], upstream)
    agreement = (student.argmax(-1) == teacher.argmax(-1)).to(dtype)
    stats = (d, _entropy(student_log), _entropy(teacher_log), agreement)
    logits = torch.cat([student.detach().flatten(), teacher.detach().flatten()])
    return Outcome(
        loss.detach(),
        dict(zip(asked, gradients, strict=True)),
        dict(zip(STATS, (s.detach() for s in stats), strict=True)),
        logit_scale=max(1.0, logits[logits.isfinite()].abs().amax().item() if logits.isfinite().any() else 1.0),
    )


def oracle(problem: Problem) -> Outcome:
    """Compute the right answer for the inputs as they are: everything in float64."""
    double = {name: t.double() for name, t in problem.tensors.items()}
    return _evaluate(replace(problem, tensors=double), torch.float64)


def accumulation_dtype(problem: Problem) -> torch.dtype:
    return torch.float64 if problem.tensors["student_hidden"].dtype == torch.float64 else torch.float32


def plain(problem: Problem, **mutation: Any) -> Outcome:
    """Compute what plain torch with float32 logits makes of the same inputs: its error is the yardstick."""
    return _evaluate(problem, accumulation_dtype(problem), **mutation)


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


def assert_accurate(got: Outcome, problem: Problem) -> None:
    """Assert that every part of `got` is as near to the float64 oracle as plain torch with float32 logits is.

    The budget of a part is twice plain torch's own error on it, plus what another order of summation may cost:
    the rounding of `8 * logit_scale` (log-probabilities are differences of numbers of that size), and for a gradient a
    quarter of the last bit of its dtype. A budget not far below the size of the answer would prove nothing, and fails.
    """
    exact, yardstick = oracle(problem), plain(problem)
    accumulation = accumulation_dtype(problem)
    noise = 8 * exact.logit_scale * torch.finfo(accumulation).eps
    if accumulation == torch.float64:
        noise *= 2  # the oracle rounds as much itself, in an order of summation that depends on the processor

    weight = problem.options.get("row_weight")
    total = count(problem) if weight is None else float(weight.sum())
    terms = total if problem.options.get("reduction") == "sum" else 1.0
    _assert_near("loss", got.loss, exact.loss, yardstick.loss, accumulation, absolute=noise * max(terms, 1.0))
    for name, value in got.stats.items():
        _assert_near(name, value, exact.stats[name], yardstick.stats[name], accumulation, absolute=noise)

    assert list(got.gradients) == list(exact.gradients)
    for name, value in got.gradients.items():
        dtype = problem.tensors[name].dtype
        relative = noise + torch.finfo(dtype).eps / 4
        _assert_near(name, value, exact.gradients[name], yardstick.gradients[name], dtype, relative=relative)


def _assert_near(
    name: str,
    got: Tensor,
    exact: Tensor,
    plain: Tensor,
    dtype: torch.dtype,
    absolute: float = 0.0,
    relative: float = 0.0,
) -> None:
    assert got.dtype == dtype, f"{name}: dtype {got.dtype}, expected {dtype}"
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    norms: dict[str, Callable[[Tensor], float]] = {
        "largest entry": lambda t: t.abs().max().item(),
        "norm": lambda t: t.norm().item(),
    }
    for measure, norm in norms.items():
        size, error = norm(exact), norm(got.double() - exact)
        slack = absolute * math.sqrt(exact.numel()) if measure == "norm" else absolute
        budget = 2 * norm(plain.double() - exact) + slack + relative * size
        assert size == 0 or budget < 0.05 * size, (
            f"{name}: a budget of {budget:.2e} for {size:.2e} proves nothing ({measure})"
        )
        assert error <= budget, f"{name}: off by {error:.2e}, budget {budget:.2e}, size {size:.2e} ({measure})"


# ---------------------------------------------------------------------------------------------------------------------
# The call under test


def loss_of(problem: Problem, tensors: dict[str, Tensor], impl: str, **options: Any) -> Any:
    """Call `fused_suffix_kl` on these tensors with the problem's options, which `options` override."""
    arguments: dict[str, Any] = {**tensors, **problem.options, **options}
    return fused_suffix_kl(**arguments, impl=impl)


def run(problem: Problem, impl: str, device: str = "cpu", autocast: torch.dtype | None = None) -> Outcome:
    """Run `fused_suffix_kl` and its backward in memory that starts as NaN: an entry that nobody wrote shows."""
    moved = problem.on(device)
    leaves = moved.leaves()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then fills with NaN
    try:
        with torch.autocast(device, autocast, enabled=autocast is not None):
            loss, stats = loss_of(moved, leaves, impl, return_stats=True)
        asked = [name for name in moved.asks if name in leaves]
        upstream = torch.as_tensor(moved.upstream, dtype=loss.dtype, device=device).expand_as(loss)
        gradients = torch.autograd.grad(loss, [leaves[name] for name in asked], upstream)
    finally:
        torch.use_deterministic_algorithms(False)
    return Outcome(
        loss.detach().cpu(),
        {name: gradient.cpu() for name, gradient in zip(asked, gradients, strict=True)},
        {name: getattr(stats, name).cpu() for name in STATS},
    )


def smallest_workspace(problem: Problem, impl: str) -> int:
    """Return the bytes that one row needs, which the refusal of too small a workspace says."""
    with pytest.raises(ValueError, match="max_workspace_bytes") as refused:
        loss_of(problem, problem.leaves(), impl, max_workspace_bytes=1)
    return max(map(int, re.findall(r"\d+", str(refused.value))))
