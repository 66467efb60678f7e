"""Make problems for the tests of `fused_topk_kl`, and compare with an oracle in plain torch.

The oracle takes the student's probabilities of all entries, adds up those that were not named, and lets autograd
differentiate. It knows nothing of the package.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from disc_kernels import LogitTransform, fused_topk_kl

STUDENT = ("student_hidden", "student_weight", "student_bias")


@dataclass(frozen=True)
class Case:
    """Hold the arguments of one call, and the gradient that its result receives."""

    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    upstream: float | Tensor = 1.7

    def but(self, **changed: Any) -> "Case":
        tensors = {name: changed.pop(name) for name in list(changed) if name in (*STUDENT, "topk_ids", "topk_logprobs")}
        return replace(self, tensors={**self.tensors, **tensors}, options={**self.options, **changed})

    def on(self, device: str) -> "Case":
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return replace(self, tensors={k: v.to(device) for k, v in self.tensors.items()}, options=options)

    def leaves(self) -> dict[str, Tensor]:
        return {name: t.detach().requires_grad_(name in STUDENT) for name, t in self.tensors.items()}

    def fused(self, impl: str | None = None) -> list[Tensor]:
        """Return the loss, and the gradients of the student's tensors."""
        leaves = self.leaves()
        loss = fused_topk_kl(**leaves, **self.options, impl=impl)
        return [loss.detach(), *self._gradients(loss, leaves)]

    def plain(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Return the same from plain torch, with the student's tensors in another dtype."""
        changed = {name: t.to(dtype) if name in STUDENT else t for name, t in self.tensors.items()}
        leaves = replace(self, tensors=changed).leaves()
        loss = oracle(**leaves, **self.options)
        return [loss.detach(), *self._gradients(loss, leaves)]

    def _gradients(self, loss: Tensor, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        upstream = torch.as_tensor(self.upstream, dtype=loss.dtype, device=loss.device).expand_as(loss)
        return torch.autograd.grad(loss, [leaves[name] for name in STUDENT if name in leaves], upstream)


def build(
    rows: int = 9,
    vocab: int = 120,
    k: int = 5,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    seed: int = 0,
    spread: float = 2.0,
    **options: Any,
) -> Case:
    """Draw a student, and the K most likely entries of a teacher whose logits have the standard deviation `spread`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made = {"student_hidden": normal(rows, width), "student_weight": normal(vocab, width) * 2 / math.sqrt(width)}
    if bias:
        made["student_bias"] = normal(vocab)
    logprobs, ids = (spread * normal(rows, vocab)).log_softmax(-1).topk(k)
    tensors = {name: t.to(dtype) for name, t in made.items()}
    upstream = normal(rows) if options.get("reduction") == "none" else 1.7
    return Case({**tensors, "topk_ids": ids, "topk_logprobs": logprobs.float()}, options, upstream)


def everything(dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    """Make one case that uses every option at once, with a row of fewer entries, and one of none."""
    used: dict[str, Any] = {"student_index": torch.tensor([4, 0, 2, 6, 8, 1, 3]), "temperature": 1.7, "beta": 0.3}
    used |= {"student_transform": LogitTransform(scale=1.5, softcap=5.0), "vocab_size": 117}
    used["row_weight"] = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.25, 1.0, 3.0])
    case = build(dtype=dtype, **{**used, **options})
    logprobs, ids = case.tensors["topk_logprobs"][:7].clone(), case.tensors["topk_ids"][:7].clone() % 117
    logprobs[1, 2:], ids[1, 2:] = -torch.inf, 10**6
    logprobs[5] = -torch.inf
    upstream = case.upstream if isinstance(case.upstream, float) else case.upstream[:7]
    return replace(case.but(topk_logprobs=logprobs, topk_ids=ids.int()), upstream=upstream)


def oracle(
    student_hidden: Tensor,
    student_weight: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    student_bias: Tensor | float = 0.0,
    tail: str = "bucket",
    student_index: Tensor | None = None,
    row_weight: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    reduction: str = "mean",
    student_transform: LogitTransform | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Compute the loss from probabilities, not their logarithms, one row after the other."""
    hidden, transform = student_hidden.flatten(0, -2), student_transform or LogitTransform()
    ids, logprobs = topk_ids.flatten(0, -2), topk_logprobs.flatten(0, -2)
    if mask is not None:
        hidden, ids, logprobs = (x[mask.flatten()] for x in (hidden, ids, logprobs))
    if student_index is not None:
        hidden = hidden[student_index]
    z = transform.scale * (hidden @ student_weight.T + student_bias)
    z = z if transform.softcap is None else transform.softcap * torch.tanh(z / transform.softcap)
    q = (z[:, :vocab_size] / temperature).softmax(-1)
    values = [_row(*row, tail, divergence, beta) for row in zip(q, ids, logprobs.to(q.dtype), strict=True)]
    d = torch.stack(values) if values else q.sum(-1)
    weight = torch.ones_like(d) if row_weight is None else row_weight.to(d.dtype)
    if reduction == "none":
        return d
    return (weight * d).sum() / (weight.sum() if reduction == "mean" else 1.0)


def _row(q: Tensor, ids: Tensor, logprobs: Tensor, tail: str, divergence: str, beta: float) -> Tensor:
    named = logprobs > -torch.inf
    p, ids = logprobs[named].exp(), ids[named].long()
    others = torch.ones_like(q, dtype=torch.bool)
    others[ids] = False
    outcomes = [q[ids]]
    if tail == "bucket" and others.any():
        p = torch.cat([p, (1 - p.sum()).clamp(min=1e-7 * (divergence == "reverse_kl")).view(1)])
        outcomes.append(q[others].sum().view(1))
    q = torch.cat(outcomes)
    p, q = p / p.sum(), q / q.sum()
    if divergence == "forward_kl":
        return _kl(p, q)
    if divergence == "reverse_kl":
        return _kl(q, p)
    m = beta * p + (1 - beta) * q
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * torch.where(p > 0, p / q, 1.0).log()).sum()


def assert_accurate(got: list[Tensor], case: Case) -> None:
    """Assert that loss and gradients are as near to the float64 oracle as the oracle in float32 is.

    They may also be off by the last bit of their dtype. The budget is a small part of what it judges, so that zeros do
    not pass.
    """
    exact = case.plain()
    dtype = case.tensors["student_hidden"].dtype
    wide = torch.promote_types(dtype, torch.float32)
    yardstick = case.plain(torch.float32) if wide == torch.float32 else exact
    names = ["loss", *(name for name in STUDENT if name in case.tensors)]
    for name, value, right, plain in zip(names, got, exact, yardstick, strict=True):
        kept = wide if name == "loss" else case.tensors[name].dtype
        assert value.dtype == kept and value.shape == right.shape, name
        size = float(right.norm())
        budget = 2 * float((plain.double() - right).norm()) + size * (16 * torch.finfo(wide).eps)
        if name != "loss":
            budget += size * torch.finfo(kept).eps / 2
        error = float((value.double() - right).norm())
        assert size > 0 and budget < 0.01 * size, f"{name}: a budget of {budget:.1e} for {size:.1e} proves nothing"
        assert error <= budget, f"{name}: off by {error:.1e}, budget {budget:.1e}, size {size:.1e}"
