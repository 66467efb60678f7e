"""`fused_suffix_kl` in `torch.compile`: one operator of the graph, equal to the eager call."""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.testing import CompileCounter

from disc_kernels import LogitTransform, expected_embedding_kl, fused_suffix_kl, teacher_summary
from disc_kernels.linear_kl import compile as compile_module
from tests.linear_kl.oracle import build, build_everything, loss_of
from tests.linear_kl.traced.steps import Step, assert_same, compare, compiled, outcome, step_outcome

V, D = 37, 8
STUDENT = ("student_hidden", "student_weight", "student_bias")


@pytest.fixture(params=["eager", "aot_eager"])
def backend(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_model_step(backend, dtype):
    step = Step(dtype, temperature=2.0)
    inputs = step.inputs(5, dtype)
    assert_same(step_outcome(step, compiled(step, backend), *inputs), step_outcome(step, step, *inputs))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on the CPU")
def test_model_step_by_inductor():
    step = Step()
    inputs = step.inputs(5)
    assert_same(step_outcome(step, compiled(step, "inductor"), *inputs), step_outcome(step, step, *inputs), ulps=32)


def test_every_option(divergence, reduction):
    compare(build_everything(divergence=divergence, reduction=reduction))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(dtype, reduction):
    """To the bit: a factor that is rounded to the gradient's dtype before it is multiplied in would show."""
    once = {"student_index": [4, 0, 2, 5, 1, 3], "teacher_index": [3, 3, 0, 1, 1, 2]}  # no sum in 4 bytes to round
    weight = [0.5, 0.0, 2.0, 1.0, 0.25, 3.0]
    compare(build_everything(dtype, reduction=reduction, row_weight=weight, **once), ulps=0)


def test_implementations(impl):
    """`reference` is traced like any torch code; the others are one operator."""
    problem = build_everything(reduction="sum")
    if impl == "reference":
        call = compiled(lambda leaves: loss_of(problem, leaves, impl, return_stats=True), dynamic=True)
        expected = outcome(lambda leaves: loss_of(problem, leaves, impl, return_stats=True), problem)
        assert_same(outcome(call, problem), expected, ulps=64)
    else:
        compare(problem, impl=impl)


@pytest.mark.parametrize("asks", [*((name,) for name in STUDENT), STUDENT[:2]])
def test_frozen_parts(asks, reduction):
    compare(replace(build_everything(reduction=reduction), asks=asks))


def test_no_gradient_asked():
    problem = build_everything(reduction="mean")
    call = compiled(lambda leaves: loss_of(problem, leaves, "torch"))
    loss = call(problem.leaves())
    with torch.no_grad():
        without = call(problem.leaves())
    assert loss.requires_grad and not without.requires_grad
    assert torch.equal(loss, without)


def test_one_weight_for_both_models():
    problem = build(bias=True)
    problem = problem.with_tensors(teacher_weight=problem.tensors["student_weight"])

    def call(leaves):
        return loss_of(problem, {**leaves, "teacher_weight": leaves["student_weight"]}, "torch", return_stats=True)

    assert_same(outcome(compiled(call), problem), outcome(call, problem))


def test_no_rows():
    problem = build(student_index=[], teacher_index=[])
    leaves = problem.leaves()
    loss = compiled(lambda leaves: loss_of(problem, leaves, "torch"))(leaves)
    loss.backward()
    assert loss == 0
    assert not any(leaves[name].grad.any() for name in STUDENT[:2])


def test_autocast(backend):
    step = Step()
    inputs = step.inputs(5)

    def call(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return step(*inputs)

    expected = step_outcome(step, call, *inputs)
    assert_same(step_outcome(step, compiled(call, backend), *inputs), expected)
    with torch.autocast("cpu", torch.bfloat16):
        around = compiled(step, backend)
        loss, _ = around(*inputs)
    assert torch.equal(loss, expected["loss"])
    assert not torch.equal(step(*inputs)[0], expected["loss"])


def test_second_backward(reduction):
    problem = build_everything(reduction=reduction)
    leaves = problem.leaves()
    loss = compiled(lambda leaves: loss_of(problem, leaves, "torch"))(leaves)
    asked = [leaves[name] for name in STUDENT]
    first = torch.autograd.grad(loss.sum(), asked, retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:
        x.zero_()
    second = torch.autograd.grad(4 * loss.sum(), asked)
    assert_same(dict(zip(STUDENT, second, strict=True)), {n: 4 * x for n, x in zip(STUDENT, kept, strict=True)})


def test_gradients_are_computed_once(monkeypatch):
    """A scalar's in the forward, where the logits are at hand."""
    problem, calls = build_everything(reduction="mean"), []

    def counted(*arguments):
        calls.append(arguments)
        return original(*arguments)

    original = compile_module.forward_with_gradients
    monkeypatch.setattr(compile_module, "forward_with_gradients", counted)
    loss = compiled(lambda leaves: loss_of(problem, leaves, "torch"))(problem.leaves())
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 1


@pytest.mark.parametrize("how", ["dynamic", "mark_dynamic"])
def test_another_number_of_rows_compiles_nothing(how):
    counter, step = CompileCounter(), Step()
    call = compiled(step, counter, dynamic=True if how == "dynamic" else None)
    for rows in (5, 6, 9, 17):
        ids, teacher_hidden, _, *by_row = inputs = step.inputs(rows)
        if how == "mark_dynamic":
            for x, dimension in ((ids, 1), (teacher_hidden, 1), *((x, 0) for x in by_row)):
                torch._dynamo.mark_dynamic(x, dimension)
        assert_same(step_outcome(step, call, *inputs), step_outcome(step, step, *inputs))
    assert counter.frame_count == 1


def test_rows_chosen_in_the_graph():
    """Their number is not known before it runs."""
    hidden, weight = torch.randn(10, D, requires_grad=True), torch.randn(V, D)

    def call(mask, other):
        rows, others = mask.nonzero().squeeze(1), other.nonzero().squeeze(1)
        torch._check(rows.shape[0] == others.shape[0])
        return fused_suffix_kl(hidden, weight, hidden.detach() + 1, weight, student_index=rows, teacher_index=others)

    masks = torch.arange(10) % 3 == 0, torch.arange(10) > 5
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        (got,) = torch.autograd.grad(compiled(call)(*masks), hidden)
    (expected,) = torch.autograd.grad(call(*masks), hidden)
    assert_same({"hidden": got}, {"hidden": expected})


def test_options_given_to_the_graph():
    hidden, weight = torch.randn(6, D), torch.randn(V, D)

    def call(temperature, scale, vocab_size):
        transform = LogitTransform(scale, softcap=10 * scale)
        return fused_suffix_kl(
            hidden,
            weight,
            hidden + 1,
            weight,
            temperature=temperature,
            student_transform=transform,
            vocab_size=vocab_size,
        )

    graph = compiled(call)
    losses = [graph(float(x), x / 2, 30 + x) for x in (1, 2, 3)]
    assert losses == [call(float(x), x / 2, 30 + x) for x in (1, 2, 3)]
    assert len(set(map(float, losses))) == 3


def test_teacher_from_inference_mode(backend):
    problem = build()
    with torch.inference_mode():
        teacher = {name: x.clone() for name, x in problem.tensors.items() if name.startswith("teacher")}
    call = compiled(lambda leaves: loss_of(problem, {**leaves, **teacher}, "torch", return_stats=True), backend)
    assert_same(outcome(call, problem), outcome(lambda x: loss_of(problem, x, "torch", return_stats=True), problem))


WRONG = {
    "row_weight: expected shape [6]": {"row_weight": torch.ones(3)},
    "row_weight: expected a tensor without requires_grad": {"row_weight": torch.ones(6, requires_grad=True)},
    "student_index: expected dtype torch.int64": {"student_index": torch.zeros(6, dtype=torch.int16)},
    "student_index: expected rows from 0 to 5": {"student_index": torch.arange(1, 7)},
    "teacher_index: expected 6 rows": {"teacher_index": torch.arange(2)},
    "student_bias: expected shape [37]": {"student_bias": torch.zeros(3)},
    "temperature: expected a positive number": {"temperature": -1.0},
    "divergence: expected one of": {"divergence": "kl"},
    "student_transform: expected a LogitTransform": {"student_transform": 3.0},
    "impl: expected one of": {"impl": "cuda"},
    "max_workspace_bytes: expected at least": {"max_workspace_bytes": 1},
    "student_hidden: expected a tensor": {"student_hidden": [1.0]},
    "student_hidden: expected torch.float16": {"student_weight": torch.zeros(V, D, dtype=torch.float16)},
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_say_what_they_say_in_eager(message):
    arguments = {"student_hidden": torch.zeros(6, D), "student_weight": torch.zeros(V, D)}
    arguments |= {"teacher_hidden": torch.zeros(6, D), "teacher_weight": torch.zeros(V, D), **WRONG[message]}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        fused_suffix_kl(**arguments)
    # The compiler wraps what is raised while it traces.
    with pytest.raises((TypeError, ValueError, TorchDynamoException), match=re.escape(message)):
        compiled(lambda: fused_suffix_kl(**arguments))()


def test_the_frozen_head_form_breaks_the_graph_and_is_right():
    student, head, teacher = torch.randn(6, 8, requires_grad=True), torch.randn(31, 8), torch.randn(6, 8)
    summary = teacher_summary(teacher, head, head)

    def step(hidden):
        return expected_embedding_kl(hidden * 2, head, summary) + 1

    for call in (step, torch.compile(step, backend="aot_eager")):
        loss = call(student)
        (gradient,) = torch.autograd.grad(loss, [student])
        expected = fused_suffix_kl(student * 2, head, teacher, head) + 1
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, [student])[0], rtol=1e-4, atol=1e-6)
