"""Register `fused_suffix_kl` as one operator: what `torch.compile` and `torch.export` record of it.

A compiler cannot follow the loop over chunks, which is planned by sizes and values that are not known while it traces.
The operator has three parts: the implementation of an eager call; a fake one, which makes every check that needs no
values and says shapes and dtypes, of symbolic sizes too; and a backward of torch operations, which the compiler fuses.
It multiplies the sums of gradients out of place, unlike an eager one, because a graph may run more than once.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from disc_kernels.linear_kl.function import (
    forward_only,
    forward_with_gradients,
    prepare,
    refuse_double_backward,
    save_tensors,
    saved_tensors,
)
from disc_kernels.linear_kl.gradients import Wanted
from disc_kernels.linear_kl.inputs import LogitTransform, SuffixKLInputs, SuffixKLStats
from disc_kernels.linear_kl.problem import check_inputs, check_mask
from disc_kernels.linear_kl.rows import choose_implementation
from disc_kernels.linear_kl.validation import check_tensor, check_transform

# A LogitTransform becomes [scale] or [scale, softcap].
_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "float": "float",
    "str": "str",
    "str | None": "str?",
    "bool": "bool",
    "int | None": "int?",
    "LogitTransform | None": "float[]",
    "torch.dtype | None": "ScalarType?",
}
_FIELDS = {field.name: str(field.type) for field in fields(SuffixKLInputs)}
_TENSORS = sum(kind.startswith("Tensor") for kind in _FIELDS.values())  # the first of the fields
_INPUTS = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in _FIELDS.items())
_RESULTS = ("loss", *SuffixKLStats._fields)
_SUMS = ("hidden_sum", "weight_sum", "bias_sum", "power", "head_factor")
_OUTPUTS = ", ".join(f"Tensor {name}" for name in (*_RESULTS, *_SUMS))
_SCHEMA = f"({_INPUTS}, bool[{len(Wanted._fields)}] wanted) -> ({_OUTPUTS})"


def traced_suffix_kl(inputs: SuffixKLInputs) -> tuple[Tensor, SuffixKLStats]:
    """Compute the loss by the operator."""
    check_tensor("student_hidden", inputs.student_hidden)  # the schema's own complaint would name no argument
    student = (inputs.student_hidden, inputs.student_weight, inputs.student_bias)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in student]
    loss, *outputs = operator(*flatten(inputs), wanted)
    return loss, SuffixKLStats(*outputs[: len(_RESULTS) - 1])


def flatten(inputs: SuffixKLInputs) -> list[Any]:
    """List the arguments in the order of the operator's schema, without `wanted`."""
    values = []
    for name, kind in _FIELDS.items():
        value = getattr(inputs, name)
        if kind == "LogitTransform | None":
            transform = check_transform(name.removesuffix("transform"), value)
            value = [transform.scale] if transform.softcap is None else [transform.scale, transform.softcap]
        values.append(value)
    return values


def unflatten(values: tuple[Any, ...]) -> tuple[SuffixKLInputs, Wanted]:
    """Return the arguments and the wanted gradients from a list in the schema's order."""
    inputs, wanted = SuffixKLInputs(*values[:-1]), values[-1]
    transforms = LogitTransform(*inputs.student_transform), LogitTransform(*inputs.teacher_transform)  # type: ignore[misc]
    return replace(inputs, student_transform=transforms[0], teacher_transform=transforms[1]), Wanted(*wanted)


@torch.library.custom_op("disc_kernels::fused_suffix_kl", mutates_args=(), schema=_SCHEMA)
def operator(*values: Any) -> tuple[Tensor, ...]:
    """Compute the loss, the statistics and the sums of gradients that a backward multiplies."""
    inputs, wanted = unflatten(values)
    problem, plan = prepare(inputs)
    if not _in_forward(inputs, wanted):
        return _outputs(inputs, *forward_only(problem, plan))
    result, sums = forward_with_gradients(problem, plan, wanted)
    hidden = inputs.student_hidden
    hidden_sum = None if sums.hidden is None else sums.hidden.view(hidden.shape).to(hidden.dtype)
    return _outputs(inputs, *result, (hidden_sum, sums.weight, sums.bias, sums.power, sums.head_factor))


@operator.register_fake
def _fake(*values: Any) -> tuple[Tensor, ...]:
    """Return empty tensors of the operator's shapes and dtypes, after every check that needs no values."""
    inputs, wanted = unflatten(values)
    if inputs.mask is not None:
        check_mask(inputs)
        if inputs.reduction == "none" or inputs.return_stats:
            raise ValueError("mask: expected None where the number of rows shapes what a compiled call returns")
    problem = check_inputs(replace(inputs, mask=None))
    choose_implementation(inputs.impl, problem.device, problem.accumulate_dtype)
    new, rows = partial(torch.empty, dtype=problem.accumulate_dtype, device=problem.device), problem.rows
    loss = new(rows if inputs.reduction == "none" else ())
    stats = SuffixKLStats(new(rows), new(rows), new(rows), new(rows))
    if not _in_forward(inputs, wanted):
        return _outputs(inputs, loss, stats)
    hidden, weight = inputs.student_hidden, inputs.student_weight
    hidden_sum = hidden.new_empty(hidden.shape) if wanted.hidden else None
    weight_sum = torch.empty_like(weight, dtype=problem.accumulate_dtype) if wanted.weight else None
    bias_sum = new(weight.shape[0]) if wanted.bias else None
    return _outputs(inputs, loss, stats, (hidden_sum, weight_sum, bias_sum, new(()), new(())))


def _in_forward(inputs: SuffixKLInputs, wanted: Wanted) -> bool:
    """Return whether the forward computes the wanted gradients: those of a scalar."""
    return inputs.reduction != "none" and any(wanted)


def _outputs(
    inputs: SuffixKLInputs, loss: Tensor, stats: SuffixKLStats, sums: tuple[Tensor | None, ...] = (None,) * len(_SUMS)
) -> tuple[Tensor, ...]:
    """List the results in the schema's order; empty tensors for what was not asked for."""
    asked = stats if inputs.return_stats else (None,) * len(stats)
    return loss, *(loss.new_empty(0) if x is None else x for x in (*asked, *sums))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what the backward multiplies, or computes again from."""
    save_tensors(ctx, (*inputs[:_TENSORS], *output[len(_RESULTS) :]))
    ctx.options = inputs[_TENSORS:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of the student's tensors, and None for every other argument."""
    refuse_double_backward()
    nothing = (None,) * (len(_FIELDS) + 1 - len(Wanted._fields))
    if upstream is None:
        return None, None, None, *nothing
    saved: list[Any] = saved_tensors(ctx)
    inputs, wanted = unflatten((*saved[:_TENSORS], *ctx.options))
    sums = saved[_TENSORS:]
    asked = Wanted(*ctx.needs_input_grad[: len(Wanted._fields)])
    known = wanted if inputs.reduction != "none" else Wanted(False, False, False)
    if inputs.reduction == "none":  # a sum, now that its weights are known
        inputs, upstream = replace(inputs, reduction="sum", row_weight=upstream.detach()), upstream.new_ones(())
    if any(x and not y for x, y in zip(asked, known, strict=True)):
        sums = operator(*flatten(replace(inputs, return_stats=False)), asked)[len(_RESULTS) :]
    hidden_sum, weight_sum, bias_sum, power, head_factor = sums
    hidden = _multiply(hidden_sum, power * upstream, inputs.student_hidden) if asked.hidden else None
    weight = _multiply(weight_sum, head_factor * upstream, inputs.student_weight) if asked.weight else None
    bias = _multiply(bias_sum, head_factor * upstream, inputs.student_bias) if asked.bias else None
    return hidden, weight, bias, *nothing


def _multiply(x: Tensor, factor: Tensor, like: Any) -> Tensor:
    """Multiply in the factor's dtype, then round once."""
    return (x.to(factor.dtype) * factor).to(like.dtype)


operator.register_autograd(_backward, setup_context=_setup_context)
