"""A teacher given as logits, without a head: what an identity head would give, and exact where logits are -inf."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from disc_kernels import LogitTransform, fused_suffix_kl
from tests.linear_kl.oracle import assert_accurate, build, build_everything, run, smallest_workspace

VOCAB = 120


def with_identity(problem, dtype):
    """The same student and rows of logits for the teacher, behind a head that changes nothing."""
    entries = problem.tensors["teacher_bias"].numel() if "teacher_bias" in problem.tensors else VOCAB
    logits = 2 * torch.randn(len(problem.tensors["teacher_hidden"]), entries).to(dtype)
    return problem.with_tensors(teacher_hidden=logits, teacher_weight=torch.eye(entries, dtype=dtype))


def test_everything_at_once(impl, divergence):
    p = build_everything(vocab=VOCAB, teacher_vocab=VOCAB + 13, vocab_size=VOCAB - 3, divergence=divergence)
    p = with_identity(p, torch.bfloat16)
    assert_accurate(run(p.with_options(teacher_weight=None), impl), p)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_rows_of_the_lowest_numbers(impl):
    """What masks put in the place of -inf: a row of nothing else is uniform."""
    lowest = torch.finfo(torch.float32).min
    logits = torch.tensor([[lowest] * 3, [0.6 * lowest, 0.6 * lowest, lowest]])
    got = fused_suffix_kl(torch.ones(2, 3), torch.eye(3), logits, None, reduction="none", impl=impl)
    torch.testing.assert_close(got, torch.tensor([0.0, math.log(1.5)]), atol=1e-6, rtol=0)


def test_small_chunks_and_rows_of_a_batch():
    """hidden[:, :-1] and logits[:, :-1], in the smallest workspace."""
    p = with_identity(build(rows=12, vocab=VOCAB, reduction="none"), torch.float32)
    shaped = {name: p.tensors[name].view(3, 4, -1)[:, :-1] for name in ("student_hidden", "teacher_hidden")}
    p = p.with_tensors(**shaped)
    p = replace(p, upstream=torch.arange(1.0, 10.0))
    given = p.with_options(teacher_weight=None)
    given = given.with_options(max_workspace_bytes=smallest_workspace(given, "torch"))
    assert_accurate(run(given, "torch"), p)


def test_logits_are_not_rounded_under_autocast():
    p = with_identity(build(vocab=VOCAB), torch.float32)
    rounded = p.with_tensors(**{k: p.tensors[k].bfloat16() for k in ("student_hidden", "student_weight")})
    got = run(p.with_options(teacher_weight=None), "torch", autocast=torch.bfloat16)
    assert torch.equal(got.loss, run(rounded.with_options(teacher_weight=None), "torch").loss)


class Masked:
    """Float64 values of a teacher with entries of -inf."""

    def __init__(self):
        self.hidden, self.weight = torch.randn(5, 16).double(), torch.randn(VOCAB, 16).double()
        self.logits = torch.randn(5, VOCAB).double()
        self.logits[:, 1::3] = -torch.inf
        self.logits[2, 1:] = -torch.inf  # all on one entry

    def exact(self, divergence):
        leaves = [x.clone().requires_grad_() for x in (self.hidden, self.weight)]
        q, p = (leaves[0] @ leaves[1].T).softmax(-1), self.logits.softmax(-1)
        m = q if divergence == "forward_kl" else (q + p) / 2
        here = p > 0
        value = torch.where(here, p * (torch.where(here, p, 1).log() - m.log()), 0).sum(-1)
        if divergence == "jsd":
            value = (value + (q * (q / m).log()).sum(-1)) / 2
        return value, torch.autograd.grad(value.sum(), leaves)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_entries_of_minus_infinity(impl, divergence):
    case = Masked()
    value, gradients = case.exact(divergence)
    leaves = [x.float().requires_grad_() for x in (case.hidden, case.weight)]
    call = partial(fused_suffix_kl, *leaves, case.logits.float(), None, divergence=divergence, impl=impl)
    torch.testing.assert_close(call(reduction="none").double(), value, rtol=2e-6, atol=1e-6)
    for got, want in zip(torch.autograd.grad(call(reduction="sum"), leaves), gradients, strict=True):
        assert (got - want).norm() < 2e-6 * want.norm()


def test_reverse_kl_is_infinite_where_only_the_student_expects_something(impl):
    case = Masked()
    call = partial(fused_suffix_kl, case.hidden.float(), case.weight.float(), case.logits.float(), None, impl=impl)
    assert (call(divergence="reverse_kl", reduction="none") == math.inf).all()
    taken_out = torch.where(case.logits[0] == -torch.inf, -torch.inf, 0.0).float()
    values = call(divergence="reverse_kl", reduction="none", student_bias=taken_out)
    assert values[[0, 1, 3, 4]].isfinite().all()
    assert values[2] == math.inf


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_rows_that_are_no_logits(impl, broken):
    case = Masked()
    tensors = [case.hidden.float(), case.weight.float(), case.logits.float(), None]
    tensors[2][3, 7] = broken
    with pytest.raises(
        ValueError, match=f"teacher_hidden: expected logits of which none is NaN.*got {broken} .* row 3"
    ):
        fused_suffix_kl(*tensors, impl=impl)
    kept = torch.arange(5) != 3
    assert fused_suffix_kl(*tensors, mask=kept, impl=impl).isfinite()
    if impl == "torch" and broken == math.inf:
        call = torch.compile(fused_suffix_kl, fullgraph=True, backend="eager")
        assert call(*tensors, teacher_index=torch.zeros(5).long(), impl=impl).isfinite()
        with pytest.raises(ValueError, match="teacher_hidden: expected logits of which none is NaN"):
            call(*tensors, impl=impl)


def test_a_row_that_excludes_everything():
    logits = torch.full((2, 9), -torch.inf)
    with pytest.raises(ValueError, match="got -inf as the largest in row 0"):
        fused_suffix_kl(torch.randn(2, 4), torch.randn(9, 4), logits, None)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        (
            {"teacher_hidden": torch.zeros(9)},
            ValueError,
            r"teacher_hidden: expected logits \[..., V\].*got shape \[9\]",
        ),
        ({"teacher_hidden": torch.zeros(2, 0)}, ValueError, r"teacher_hidden: expected logits.*got shape \[2, 0\]"),
        (
            {"teacher_hidden": torch.zeros(2, 8)},
            ValueError,
            "9 of student_weight and 8 of teacher_hidden \\(logits.*differ",
        ),
        ({"teacher_hidden": torch.zeros(2, 9).long()}, TypeError, "teacher_hidden: expected float16.*got torch.int64"),
        ({"teacher_hidden": torch.zeros(3, 9)}, ValueError, "teacher_hidden: expected 2 rows"),
        ({"teacher_bias": torch.zeros(8)}, ValueError, r"teacher_bias: expected shape \[9\], got \[8\]"),
        ({"teacher_transform": LogitTransform, "teacher_bias": None}, TypeError, "teacher_transform: expected a Logit"),
    ],
)
def test_bad_input(changed, error, message):
    good = {"student_hidden": torch.zeros(2, 4), "student_weight": torch.zeros(9, 4)}
    good |= {"teacher_hidden": torch.zeros(2, 9), "teacher_weight": None}
    fused_suffix_kl(**good)
    with pytest.raises(error, match=message):
        fused_suffix_kl(**{**good, **changed})


def test_not_with_a_group(lonely_group):
    with pytest.raises(ValueError, match="teacher_weight: expected a tensor with a vocab_group, got None"):
        fused_suffix_kl(torch.zeros(2, 4), torch.zeros(9, 4), torch.zeros(2, 9), None, vocab_group=lonely_group)
