"""`fused_suffix_kl` as one operator: what `torch.compile` and `torch.export` record of it.

A compiler cannot follow the loop over chunks, which is planned by sizes and values that are not known while it traces.
So while it does, the public call goes to the operator `disc_kernels::fused_suffix_kl`, which has three parts:
    - the implementation, which is that of an eager call;
    - a fake one, which makes every check that needs no values and says shapes and dtypes, of symbolic sizes too, so
      that another number of rows compiles nothing;
    - a backward of torch operations, which the compiler fuses. Unlike an eager backward it multiplies the sums of
      gradients out of place: a graph may run more than once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from disc_kernels.autocast import autocast_dtype
from disc_kernels.linear_kl.function import (
    Result,
    forward_with_gradients,
    fused_forward,
    prepare,
    refuse_double_backward,
    save_tensors,
    saved_tensors,
)
from disc_kernels.linear_kl.gradients import Wanted
from disc_kernels.linear_kl.inputs import LogitTransform, Problem
from disc_kernels.linear_kl.rows import choose_implementation
from disc_kernels.linear_kl.validation import build_problem, check_tensor, check_transform, check_workspace

_SCHEMA = """(
    Tensor student_hidden, Tensor student_weight, Tensor? student_bias,
    Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias,
    Tensor? student_index, Tensor? teacher_index, Tensor? row_weight,
    float temperature, str divergence, float beta, str reduction,
    float student_scale, float? student_softcap, float teacher_scale, float? teacher_softcap,
    int? vocab_size, int? max_workspace_bytes, bool return_stats, str? impl,
    ScalarType? autocast_dtype, bool[3] wanted
) -> (
    Tensor loss, Tensor divergence, Tensor student_entropy, Tensor teacher_entropy, Tensor agreement,
    Tensor hidden_sum, Tensor weight_sum, Tensor bias_sum, Tensor mantissa, Tensor power
)"""


class Arguments(NamedTuple):
    """What the schema lists: the arguments of `fused_suffix_kl`, and what an eager call finds around it."""

    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    student_index: Tensor | None
    teacher_index: Tensor | None
    row_weight: Tensor | None
    temperature: float
    divergence: str
    beta: float
    reduction: str
    student_scale: float
    student_softcap: float | None
    teacher_scale: float
    teacher_softcap: float | None
    vocab_size: int | None
    max_workspace_bytes: int | None
    return_stats: bool
    impl: str | None
    autocast_dtype: torch.dtype | None  # that of the traced code; its graph runs without autocast
    wanted: Sequence[bool]  # which gradients will be asked for: of student_hidden, student_weight, student_bias


_TENSORS = 9  # the first of the arguments; what follows are options
_RESULT = len(Result._fields)  # the first of the outputs; what follows are sums of gradients


def traced_suffix_kl(
    *, student_transform: LogitTransform | None, teacher_transform: LogitTransform | None, **arguments: Any
) -> Result:
    """`fused_suffix_kl` by the operator; takes its arguments but for `vocab_group`."""
    student_transform = check_transform("student", student_transform)
    teacher_transform = check_transform("teacher", teacher_transform)
    device_type = check_tensor("student_hidden", arguments["student_hidden"]).device.type
    student = [arguments[f"student_{name}"] for name in ("hidden", "weight", "bias")]
    outputs = operator(
        **arguments,
        student_scale=student_transform.scale,
        student_softcap=student_transform.softcap,
        teacher_scale=teacher_transform.scale,
        teacher_softcap=teacher_transform.softcap,
        autocast_dtype=autocast_dtype(device_type),
        wanted=[torch.is_grad_enabled() and x is not None and x.requires_grad for x in student],
    )
    return Result(*outputs[:_RESULT])


@torch.library.custom_op("disc_kernels::fused_suffix_kl", mutates_args=(), schema=_SCHEMA)
def operator(*inputs: Any) -> tuple[Tensor, ...]:
    a = Arguments(*inputs)
    problem, impl = _checked(a)
    call = prepare(problem, a.teacher_index, impl, a.max_workspace_bytes, a.return_stats)
    wanted = _in_forward(a)
    if not any(wanted):
        return _outputs(a, fused_forward(call))
    result, sums = forward_with_gradients(call, wanted)
    hidden = None if sums.hidden is None else sums.hidden.view(a.student_hidden.shape).to(a.student_hidden.dtype)
    return _outputs(a, result, hidden, sums.weight, sums.bias, sums.mantissa, sums.power)


@operator.register_fake
def _fake(*inputs: Any) -> tuple[Tensor, ...]:
    a = Arguments(*inputs)
    (problem, _), wanted = _checked(a), _in_forward(a)
    new, rows = partial(torch.empty, dtype=problem.accumulate_dtype, device=problem.device), problem.rows
    loss = new(rows if a.reduction == "none" else ())
    result = Result(loss, new(rows), new(rows), new(rows), new(rows))
    if not any(wanted):
        return _outputs(a, result)
    hidden, weight = a.student_hidden, a.student_weight
    hidden_sum = hidden.new_empty(hidden.shape) if wanted.hidden else None
    weight_sum = torch.empty_like(weight, dtype=problem.accumulate_dtype) if wanted.weight else None
    bias_sum = new(weight.shape[0]) if wanted.bias else None
    return _outputs(a, result, hidden_sum, weight_sum, bias_sum, mantissa=new(()), power=new(()))


def _in_forward(a: Arguments) -> Wanted:
    """The gradients that the forward computes: those of a scalar that will be asked for."""
    return Wanted(*a.wanted) if a.reduction != "none" else Wanted(False, False, False)


def _checked(a: Arguments) -> tuple[Problem, str]:
    """The problem and its implementation, or what an eager call raises."""
    device_type = a.student_hidden.device.type
    autocast: AbstractContextManager[Any] = nullcontext()
    if device_type != "meta":
        autocast = torch.autocast(device_type, a.autocast_dtype, enabled=a.autocast_dtype is not None)
    with autocast:
        problem = build_problem(
            a.student_hidden,
            a.student_weight,
            a.teacher_hidden,
            a.teacher_weight,
            student_index=a.student_index,
            teacher_index=a.teacher_index,
            row_weight=a.row_weight,
            temperature=a.temperature,
            divergence=a.divergence,
            beta=a.beta,
            reduction=a.reduction,
            student_bias=a.student_bias,
            teacher_bias=a.teacher_bias,
            student_transform=LogitTransform(a.student_scale, a.student_softcap),
            teacher_transform=LogitTransform(a.teacher_scale, a.teacher_softcap),
            vocab_size=a.vocab_size,
        )
    check_workspace(a.max_workspace_bytes)
    return problem, choose_implementation(a.impl, problem.device, problem.accumulate_dtype)


def _outputs(
    a: Arguments,
    result: Result,
    hidden_sum: Tensor | None = None,
    weight_sum: Tensor | None = None,
    bias_sum: Tensor | None = None,
    mantissa: Tensor | None = None,
    power: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """What the schema lists; empty tensors for what was not asked for."""
    stats = result.stats if a.return_stats else (None,) * 4
    optional = (*stats, hidden_sum, weight_sum, bias_sum, mantissa, power)
    return result.loss, *(result.loss.new_empty(0) if x is None else x for x in optional)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    save_tensors(ctx, (*inputs[:_TENSORS], *output[_RESULT:]))
    ctx.options = inputs[_TENSORS:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    nothing = (None,) * (len(Arguments._fields) - len(Wanted._fields))
    if upstream is None:
        return None, None, None, *nothing
    saved: list[Any] = saved_tensors(ctx)
    a, sums = Arguments(*saved[:_TENSORS], *ctx.options), saved[_TENSORS:]
    asked, known = Wanted(*ctx.needs_input_grad[:3]), _in_forward(a)
    if a.reduction == "none":  # a sum, now that its weights are known
        a, upstream = a._replace(reduction="sum", row_weight=upstream.detach()), upstream.new_ones(())
    if any(x and not y for x, y in zip(asked, known, strict=True)):
        sums = operator(*a._replace(wanted=asked, return_stats=False))[_RESULT:]
    hidden_sum, weight_sum, bias_sum, mantissa, power = sums
    factor = power * upstream
    hidden = _multiply(hidden_sum, factor, a.student_hidden) if asked.hidden else None
    weight = _multiply(weight_sum, factor * mantissa, a.student_weight) if asked.weight else None
    bias = _multiply(bias_sum, factor * mantissa, a.student_bias) if asked.bias else None
    return hidden, weight, bias, *nothing


def _multiply(x: Tensor, factor: Tensor, like: Any) -> Tensor:
    """In the factor's dtype, then rounded once."""
    return (x.to(factor.dtype) * factor).to(like.dtype)


operator.register_autograd(_backward, setup_context=_setup_context)
