"""A teacher of which the K most likely entries are known: values and gradients against plain torch in float64."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from disc_kernels import LogitTransform, fused_suffix_kl, fused_topk_kl
from disc_kernels.linear_kl.reference import SMALLEST_TAIL
from tests.linear_kl.topk_cases import STUDENT, assert_accurate, build, everything, oracle


@pytest.fixture(params=["bucket", "renormalise"])
def tail(request):
    return request.param


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_everything_at_once(impl, divergence, tail, dtype, reduction):
    case = everything(dtype, divergence=divergence, tail=tail, reduction=reduction)
    case = case.but(row_weight=None) if reduction == "none" else case
    assert_accurate(case.fused(impl), case)


@pytest.mark.parametrize("scale", [-0.7, 2.0])
def test_without_a_softcap(fused_impl, divergence, scale):
    """What was named is taken out of the logits before they are scaled."""
    case = build(divergence=divergence, reduction="sum", student_transform=LogitTransform(scale))
    assert_accurate(case.fused(fused_impl), case)


def test_float64(double_impl, divergence, tail):
    case = everything(torch.float64, divergence=divergence, tail=tail)
    assert_accurate(case.fused(double_impl), case)


def test_gradcheck(divergence, tail):
    case = build(
        rows=3, vocab=11, k=3, width=4, dtype=torch.float64, divergence=divergence, tail=tail, reduction="none"
    )
    given = [case.tensors[name] for name in ("topk_ids", "topk_logprobs")]

    def call(hidden, weight, bias):
        return fused_topk_kl(hidden, weight, *given, student_bias=bias, **case.options)

    torch.autograd.gradcheck(call, [case.tensors[name].requires_grad_() for name in STUDENT], fast_mode=True)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 9),
    vocab=st.integers(2, 70),
    k=st.integers(1, 6),
    seed=st.integers(0, 99),
    divergence=st.sampled_from(["forward_kl", "reverse_kl", "jsd"]),
    tail=st.sampled_from(["bucket", "renormalise"]),
    workspace=st.sampled_from([None, 4]),
    spread=st.sampled_from([0.5, 20.0]),
)
@example(rows=1, vocab=2, k=1, seed=0, divergence="reverse_kl", tail="bucket", workspace=None, spread=20.0)
def test_any_shape(rows, vocab, k, seed, divergence, tail, workspace, spread):
    """In float64, one row a chunk or all; teachers that are nearly certain too."""
    k = min(k, vocab)
    case = build(rows, vocab, k, dtype=torch.float64, seed=seed, spread=spread, divergence=divergence, tail=tail)
    if workspace is not None:
        case = case.but(max_workspace_bytes=_smallest(case))
    exact = oracle(**case.tensors, **{k: v for k, v in case.options.items() if k != "max_workspace_bytes"})
    got = fused_topk_kl(**case.tensors, **case.options)
    torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-13)


def _smallest(case):
    with pytest.raises(ValueError, match="max_workspace_bytes") as refused:
        fused_topk_kl(**case.tensors, **{**case.options, "max_workspace_bytes": 1})
    return int(str(refused.value).split("at least ")[1].split()[0])


def test_all_entries_are_the_whole_divergence(impl, divergence, tail):
    """K = V, in any order: `fused_suffix_kl` of the same logits."""
    logits = 2 * torch.randn(6, 40)
    logprobs, ids = logits.log_softmax(-1).sort(-1, descending=True)
    case = build(rows=6, vocab=40, divergence=divergence, reduction="none")
    case = case.but(topk_ids=ids, topk_logprobs=logprobs)
    leaves = case.leaves()
    student = {name: leaves[name] for name in STUDENT}
    whole = fused_suffix_kl(**student, teacher_hidden=logits, teacher_weight=None, **case.options, impl="torch")
    wanted = [whole.detach(), *torch.autograd.grad(whole, student.values(), case.upstream.float())]
    for got, want in zip(case.but(tail=tail).fused(impl), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


def test_a_bucket_is_at_most_the_whole(divergence):
    """Entries put together are told apart no better; and more of them better."""
    logits = 3 * torch.randn(6, 40)
    case = build(rows=6, vocab=40, divergence=divergence, reduction="none")
    student = {name: case.tensors[name] for name in STUDENT}
    whole = fused_suffix_kl(**student, teacher_hidden=logits, teacher_weight=None, **case.options)
    last = torch.zeros(6)
    for k in (1, 5, 20):
        logprobs, ids = logits.log_softmax(-1).topk(k)
        values = fused_topk_kl(**student, topk_ids=ids, topk_logprobs=logprobs, **case.options)
        assert (last <= values + 1e-6).all() and (values <= whole + 1e-6).all()
        last = values


def test_a_student_that_agrees(fused_impl, divergence, tail):
    """A divergence of 0 is 0, and so is its gradient, though all logits are some 50."""
    hidden, weight = torch.randn(4, 16), torch.randn(300, 16) * 3
    logprobs, ids = (hidden.double() @ weight.double().T).log_softmax(-1).topk(7)
    case = build(rows=4, vocab=300, k=7, bias=False, divergence=divergence, tail=tail, reduction="sum")
    case = case.but(student_hidden=hidden, student_weight=weight, topk_ids=ids, topk_logprobs=logprobs)
    loss, *gradients = case.fused(fused_impl)
    assert 0 <= loss < 1e-9
    assert all(g.abs().max() < 1e-3 for g in gradients)


@pytest.mark.parametrize("total", [1 - 1e-9, 1.0, 1.0005])
def test_a_teacher_that_names_all_its_mass(impl, divergence, total):
    """What rounding leaves of the tail, more or less than nothing, makes no divergence infinite."""
    p = torch.tensor([[0.5, 0.3, 0.2]]).double() * total
    case = build(rows=1, vocab=50, k=3, divergence=divergence)
    case = case.but(topk_logprobs=p.log())
    assert_accurate(case.fused(impl), case)


def test_equal_logits_however_large(impl, tail):
    """A uniform student: beside 1e16 the logarithm of how many entries there are is less than a rounding."""
    hidden, weight = torch.full((2, 1), 1e16), torch.ones(40, 1)
    ids, logprobs = torch.tensor([[3, 9], [0, 5]]), torch.full((2, 2), -math.log(40))
    loss = fused_topk_kl(hidden, weight, ids, logprobs, tail=tail, impl=impl)
    assert loss.abs() < 1e-6


def test_an_impossible_entry(impl, tail):
    """One that the teacher expects and the student's bias takes out."""
    case = build(rows=2, vocab=30, tail=tail, reduction="none")
    bias = case.tensors["student_bias"].clone()
    bias[case.tensors["topk_ids"][0, 0]] = -torch.inf
    values = fused_topk_kl(**{**case.tensors, "student_bias": bias}, tail=tail, reduction="none", impl=impl)
    assert values[0] == math.inf and values[1].isfinite()


def test_mask_and_leading_shape(impl, tail):
    case = build(rows=12, tail=tail)
    keep = torch.arange(12).view(3, 4) % 3 != 1
    shaped = {name: case.tensors[name].unflatten(0, (3, 4)) for name in ("student_hidden", "topk_ids", "topk_logprobs")}
    shaped["topk_logprobs"][~keep] = torch.nan  # nothing is known there
    case = case.but(**shaped, mask=keep)
    assert_accurate(case.fused(impl), case)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_mask_that_keeps_nothing(impl, reduction):
    case = build(reduction=reduction, mask=torch.zeros(9, dtype=torch.bool))
    loss, *gradients = replace(case, upstream=1.0).fused(impl)
    assert loss.shape == (() if reduction != "none" else (0,))
    assert float(loss.sum()) == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_small_chunks(fused_impl, divergence):
    case = everything(divergence=divergence)
    small = case.but(max_workspace_bytes=_smallest(case.but(impl=fused_impl)))
    assert_accurate(small.fused(fused_impl), case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_log_probabilities_of_another_dtype(fused_impl, dtype):
    case = build()
    case = case.but(topk_logprobs=case.tensors["topk_logprobs"].to(dtype))
    assert_accurate(case.fused(fused_impl), case)


@pytest.mark.parametrize("reduction, tail", [("mean", "bucket"), ("none", "renormalise")])
def test_in_a_graph(reduction, tail):
    case = everything(reduction=reduction, tail=tail)
    leaves = case.leaves()
    call = torch.compile(fused_topk_kl, fullgraph=True, backend="aot_eager")
    loss = call(**leaves, **case.options)
    upstream = torch.as_tensor(case.upstream, dtype=loss.dtype).expand_as(loss)
    got = [loss.detach(), *torch.autograd.grad(loss, [leaves[name] for name in STUDENT], upstream)]
    for value, eager in zip(got, case.fused(), strict=True):
        torch.testing.assert_close(value, eager, rtol=1e-6, atol=1e-7)
    bad = {**leaves, "topk_ids": leaves["topk_ids"].clone().fill_(3)}
    with pytest.raises(ValueError, match="topk_ids: expected different entries in a row, got 3 in row 0"):
        call(**bad, **case.options)


class Said:
    def __init__(self, logprob):
        self.logprob = logprob


@pytest.mark.parametrize("said", [Said, lambda logprob: {"logprob": logprob, "rank": 1}], ids=["objects", "JSON"])
def test_what_vllm_says_as_two_tensors(said):
    """The function in docs/quickstarts.md: the K most likely, and the token that was there if it is not among them."""
    text = (Path(__file__).parents[2] / "docs" / "quickstarts.md").read_text()
    (code,) = re.findall(r"```python\n(import json\nimport math\n.*?)```", text, re.DOTALL)
    exec(code, names := {})
    case = build(rows=3, k=4)
    ids, logprobs = case.tensors["topk_ids"], case.tensors["topk_logprobs"]
    sizes = (3, 4, 3)  # of the second row the prompt's token is the fourth
    rows = [
        {id: said(p) for id, p in zip(*row, strict=True)} for row in zip(ids.tolist(), logprobs.tolist(), strict=True)
    ]
    server = [None, *(dict(list(row.items())[:size]) for row, size in zip(rows, sizes, strict=True))]
    if said is not Said:
        server = json.loads(json.dumps(server))  # whose keys are texts
    got_ids, got = names["topk_tensors"](server)
    fewer = logprobs.clone()
    fewer[[0, 2], 3] = -torch.inf
    assert torch.equal(got, fewer) and torch.equal(got_ids[1], ids[1])
    case = case.but(topk_ids=got_ids, topk_logprobs=got)
    assert_accurate(case.fused("torch"), case)


MUTANTS = {
    "no gradient": lambda case: [case[0], *(0 * g for g in case[1:])],
    "no loss": lambda case: [0 * case[0], *case[1:]],
    "a row's gradient left out": lambda case: [case[0], torch.cat([0 * case[1][:1], case[1][1:]]), *case[2:]],
    "an entry's gradient left out": lambda case: [*case[:2], case[2] * (torch.arange(120) != 7)[:, None], case[3]],
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_the_comparison_rejects(mutant):
    case = build()
    with pytest.raises(AssertionError, match="off by"):
        assert_accurate(mutant(case.fused()), case)


@pytest.mark.parametrize(
    "other",
    [{"tail": "renormalise"}, {"divergence": "reverse_kl"}, {"temperature": 1.01}, {"vocab_size": 119}],
    ids=str,
)
def test_the_comparison_rejects_other_options(other):
    case = build()
    with pytest.raises(AssertionError, match="off by"):
        assert_accurate(case.but(**other).fused(), case)


def test_a_wrong_tail_would_show(monkeypatch):
    """Were the tail's own gradient left out, or its mass taken from the teacher."""
    monkeypatch.setitem(SMALLEST_TAIL, "forward_kl", 0.5)
    case = build()
    with pytest.raises(AssertionError, match="off by"):
        assert_accurate(case.fused("torch"), case)
