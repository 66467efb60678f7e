"""Make the two calls of the frozen-head form on a `Problem` of `tests/linear_kl/oracle.py`, run as an `Outcome`.

So both forms are compared with the same oracle by the same `assert_accurate`.
"""

import re
from dataclasses import replace

import pytest
import torch

from disc_kernels import LogitTransform, expected_embedding_kl, teacher_summary
from tests.linear_kl.oracle import build, build_everything, plain

SUMMARY_OPTIONS = ("temperature", "teacher_transform", "vocab_size", "max_workspace_bytes")
LOSS_OPTIONS = ("student_index", "row_weight", "temperature", "reduction", "vocab_size", "max_workspace_bytes")


def summary_of(problem, impl, tensors=None, **options):
    """Summarise the teacher's rows, each once; `summary_index` chooses among them later."""
    t = tensors or problem.tensors
    biases = {name: t[name] for name in ("teacher_bias", "student_bias") if name in t}
    options = {name: problem.options[name] for name in SUMMARY_OPTIONS if name in problem.options} | biases | options
    return teacher_summary(t["teacher_hidden"], t["teacher_weight"], t["student_weight"], impl=impl, **options)


def loss_from_summary(problem, summary, impl, hidden, **options):
    t, o = problem.tensors, problem.options
    given = {name: o[name] for name in LOSS_OPTIONS if name in o} | {"summary_index": o.get("teacher_index")}
    if "student_transform" in o:
        given["student_scale"] = o["student_transform"].scale
    given |= {"student_bias": t.get("student_bias")} | options
    return expected_embedding_kl(hidden, t["student_weight"], summary, impl=impl, **given)


def smallest(call, *arguments):
    """Return the bytes that one row needs, as the refusal of too small a workspace says."""
    with pytest.raises(ValueError, match="max_workspace_bytes: expected at least") as refused:
        call(*arguments, max_workspace_bytes=1)
    return int(re.search(r"at least (\d+)", str(refused.value)).group(1))


def run(problem, impl, autocast=None, summary=None, device="cpu", **options):
    """Run summary, forward and backward, and return the outcome that `assert_accurate` takes."""
    moved = problem.on(device)
    hidden = moved.tensors["student_hidden"].detach().requires_grad_()
    with torch.autocast(device, autocast, enabled=autocast is not None):
        summary = summary or summary_of(moved, impl)
        loss, stats = loss_from_summary(moved, summary, impl, hidden, return_stats=True, **options)
    upstream = torch.as_tensor(problem.upstream, dtype=loss.dtype, device=device).expand_as(loss)
    (gradient,) = torch.autograd.grad(loss, [hidden], upstream)
    assert stats.agreement.isnan().all()
    known = {name: value.cpu() for name, value in stats._asdict().items() if name != "agreement"}
    gradients = {"student_hidden": gradient.cpu()}
    return replace(plain(problem), loss=loss.detach().cpu(), gradients=gradients, stats=known)


def everything(dtype=torch.float32, **options):
    made = build_everything(dtype, student_transform=LogitTransform(scale=1.5), **options)
    return replace(made, asks=("student_hidden",))


def simple(**options):
    return replace(build(**options), asks=("student_hidden",))
