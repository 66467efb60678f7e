"""What the tests of the frozen-head form share: its two calls on a `Problem` of the folder above, run as an `Outcome`.

`run` here takes the place of the `run` above, so both are compared with the same oracle by the same `assert_accurate`.
"""

import re
from dataclasses import replace

import pytest
import torch

from disc_kernels import LogitTransform, expected_embedding_kl, teacher_summary

SUMMARY_OPTIONS = ("temperature", "teacher_transform", "vocab_size", "max_workspace_bytes")
LOSS_OPTIONS = ("student_index", "row_weight", "temperature", "reduction", "vocab_size", "max_workspace_bytes")


@pytest.fixture(autouse=True)
def new_memory_is_nan():
    """An entry nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _summary_of(problem, impl, tensors=None, **options):
    """Of the teacher's rows, each once; `summary_index` chooses among them."""
    t = tensors or problem.tensors
    biases = {name: t[name] for name in ("teacher_bias", "student_bias") if name in t}
    options = {name: problem.options[name] for name in SUMMARY_OPTIONS if name in problem.options} | biases | options
    return teacher_summary(t["teacher_hidden"], t["teacher_weight"], t["student_weight"], impl=impl, **options)


def _loss_from_summary(problem, summary, impl, hidden, **options):
    t, o = problem.tensors, problem.options
    given = {name: o[name] for name in LOSS_OPTIONS if name in o} | {"summary_index": o.get("teacher_index")}
    if "student_transform" in o:
        given["student_scale"] = o["student_transform"].scale
    given |= {"student_bias": t.get("student_bias")} | options
    return expected_embedding_kl(hidden, t["student_weight"], summary, impl=impl, **given)


def _smallest(call, *arguments):
    """The bytes one row needs, as the refusal says."""
    with pytest.raises(ValueError, match="max_workspace_bytes: expected at least") as refused:
        call(*arguments, max_workspace_bytes=1)
    return int(re.search(r"at least (\d+)", str(refused.value)).group(1))


@pytest.fixture
def summary_of():
    return _summary_of


@pytest.fixture
def loss_from_summary():
    return _loss_from_summary


@pytest.fixture
def smallest():
    return _smallest


@pytest.fixture
def run(plain):
    def ran(problem, impl, autocast=None, summary=None, **options):
        """Summary, forward and backward, as the outcome that `assert_accurate` takes."""
        hidden = problem.tensors["student_hidden"].detach().requires_grad_()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            summary = summary or _summary_of(problem, impl)
            loss, stats = _loss_from_summary(problem, summary, impl, hidden, return_stats=True, **options)
        upstream = torch.as_tensor(problem.upstream, dtype=loss.dtype).expand_as(loss)
        (gradient,) = torch.autograd.grad(loss, [hidden], upstream)
        assert stats.agreement.isnan().all()
        known = {name: value for name, value in stats._asdict().items() if name != "agreement"}
        return replace(plain(problem), loss=loss.detach(), gradients={"student_hidden": gradient}, stats=known)

    return ran


@pytest.fixture
def everything(build_everything):
    def made(dtype=torch.float32, **options):
        made = build_everything(dtype, student_transform=LogitTransform(scale=1.5), **options)
        return replace(made, asks=("student_hidden",))

    return made


@pytest.fixture
def simple(build):
    return lambda **options: replace(build(**options), asks=("student_hidden",))
