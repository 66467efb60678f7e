"""Check one argument: raise ValueError or TypeError with what was expected and got. Knows no backend.

Nothing here reads a tensor's values on an accelerator, which would make the host wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from disc_kernels.host import to_device
from disc_kernels.linear_kl.inputs import LogitTransform, OutputHead, Projection

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
REDUCTIONS = ("mean", "sum", "none", "batchmean")
W = TypeVar("W", Tensor, Tensor | None)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_traced(x: Any) -> bool:
    """Return whether a call with this tensor is being recorded, or asked for its shapes, so that it has no values."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor) or (isinstance(x, Tensor) and x.is_meta)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_reduction(value: Any) -> str:
    """Return "mean", "sum" or "none"; "batchmean" is the mean over rows."""
    check_choice("reduction", value, REDUCTIONS)
    return "mean" if value == "batchmean" else value


def check_number(name: str, value: Any) -> float:
    """Return a finite number as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) < math.inf:  # unlike math.isfinite a compiler can trace this
        raise ValueError(f"{name}: expected a finite number, got {number}")
    return number


def check_temperature(value: Any) -> float:
    """Return a positive number, not so small that logits over it overflow, as a float."""
    temperature = check_number("temperature", value)
    if temperature <= 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    if temperature < 1e-30:
        raise ValueError(f"temperature: expected at least 1e-30, got {temperature}")
    return temperature


def check_count(name: str, value: Any) -> int:
    """Return a whole number of at least 1 as an int."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return int(value)


def check_workspace(max_workspace_bytes: Any) -> int | None:
    """Return a number of bytes, or None for the default."""
    return None if max_workspace_bytes is None else check_count("max_workspace_bytes", max_workspace_bytes)


def check_transform(prefix: str, value: Any) -> LogitTransform:
    """Return the transform of a head; None does nothing."""
    if value is None:
        return LogitTransform()
    if not isinstance(value, LogitTransform):
        raise TypeError(f"{prefix}transform: expected a LogitTransform, got {type(value).__name__}")
    return value


def check_head(
    prefix: str, weight: W | OutputHead, bias: Tensor | None, transform: LogitTransform | None
) -> tuple[Tensor | W, Tensor | None, LogitTransform | None, int | None]:
    """Return weight, bias, transform and entries of a head that is given as one argument, or in parts."""
    if not isinstance(weight, OutputHead):
        return weight, bias, transform, None
    for name, value in (("bias", bias), ("transform", transform)):
        if value is not None:
            raise ValueError(
                f"{prefix}{name}: expected None, because {prefix}weight is an OutputHead, which brings its own, "
                f"got {type(value).__name__}"
            )
    return weight


def check_entries(vocab_size: int | None, *entries: int | None) -> int | None:
    """Return `vocab_size`, or for None the fewest `entries` that a head is known to have."""
    known = [each for each in entries if each is not None]
    if not known or vocab_size is None:
        return min(known) if known else vocab_size
    if check_count("vocab_size", vocab_size) > min(known):
        raise ValueError(f"vocab_size: expected at most {min(known)}, as the OutputHead says, got {vocab_size}")
    return vocab_size


def check_projection(
    prefix: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    transform: LogitTransform | None,
    device: torch.device,
    autocast: torch.dtype | None,
    may_be_empty: bool = False,
) -> Projection:
    """Return the model whose arguments begin with `prefix`; only a head that `may_be_empty` has no entries."""
    hidden = check_float_tensor(f"{prefix}hidden", hidden, device)
    weight = check_float_tensor(f"{prefix}weight", weight, device)
    if hidden.dim() < 2:
        raise ValueError(
            f"{prefix}hidden: expected shape [..., D] with at least 2 dimensions, got {list(hidden.shape)}"
        )
    if weight.dim() != 2 or 0 in weight.shape[may_be_empty:]:
        raise ValueError(f"{prefix}weight: expected shape [V, D], neither of them 0, got {list(weight.shape)}")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{prefix}hidden: expected last dimension {weight.shape[1]}, as in {prefix}weight {list(weight.shape)}, "
            f"got shape {list(hidden.shape)}"
        )
    if bias is not None:
        bias = check_float_tensor(f"{prefix}bias", bias, device)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{prefix}bias: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
    transform = check_transform(prefix, transform)
    operand_dtype = _operand_dtype(prefix, hidden, weight, autocast)
    wide = torch.promote_types(operand_dtype, torch.float32)
    if index is not None:
        index = check_index(f"{prefix}index", index, math.prod(hidden.shape[:-1]), f"{prefix}hidden", device)
    return Projection(hidden, weight, bias, index, transform, operand_dtype, wide, vocab_size=weight.shape[0])


def _operand_dtype(prefix: str, hidden: Tensor, weight: Tensor, autocast: torch.dtype | None) -> torch.dtype:
    """Return what a linear layer multiplies in: autocast's dtype (which leaves float64 alone), else the hidden states'.

    A weight that is wider than these (a float32 head behind bfloat16 hidden states) is rounded, as autocast does.
    """
    if autocast is not None and torch.float64 not in (hidden.dtype, weight.dtype):
        return autocast
    if torch.promote_types(hidden.dtype, weight.dtype) != weight.dtype:
        raise TypeError(
            f"{prefix}hidden: expected {weight.dtype}, the dtype of {prefix}weight, or a narrower one, "
            f"got {hidden.dtype}; cast one of them, or call under torch.autocast"
        )
    return hidden.dtype


def check_index(argument: str, index: Any, rows: int, of: str, device: torch.device) -> Tensor:
    """Return the index, [M] int64, on `device`; it chooses among the `rows` rows of the tensor `of`.

    An index may be int32; a bool one, an entry a row, chooses the rows that are True, which waits for its device.
    """
    index = check_tensor(argument, index)
    if index.dtype not in (torch.int64, torch.int32, torch.bool):
        raise TypeError(f"{argument}: expected dtype torch.int64, torch.int32 or torch.bool, got {index.dtype}")
    check_index_device(argument, index, device)
    if index.dtype == torch.bool:
        if index.numel() != rows:
            raise ValueError(f"{argument}: expected {rows} entries, one for each row of {of}, got {list(index.shape)}")
        if is_traced(index):
            raise ValueError(f"{argument}: expected int64 under torch.compile and torch.export, got bool")
        index = index.flatten().nonzero().squeeze(1)
    index = index.to(torch.int64)
    if index.dim() != 1:
        raise ValueError(f"{argument}: expected shape [M], got {list(index.shape)}")
    message = f"{argument}: expected rows from 0 to {rows - 1} of {of}"
    if index.device.type == "meta" or is_traced(index):
        return index.to(device)  # no values to look at; the operator looks when it runs
    if index.device.type == "cpu":
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= rows):
            raise ValueError(f"{message}, got rows from {int(index.min())} to {int(index.max())}")
    else:
        # The device stops with this message; the host does not wait to learn that all is well.
        torch._assert_async(((index >= 0) & (index < rows)).all(), f"{message}, got a row outside")
    return to_device(index, device)


def check_index_device(argument: str, index: Tensor, device: torch.device) -> None:
    """Raise unless an index or a mask is on the CPU or where the hidden states are."""
    if index.device not in (device, torch.device("cpu")):
        raise ValueError(f"{argument}: expected device {device}, as the hidden states, or cpu, got {index.device}")


def check_same_rows(compared: tuple[str, int], chosen: tuple[str, int], indices: str) -> None:
    """Raise unless two arguments, each given as (name, rows), have equally many rows."""
    if compared[1] != chosen[1]:
        raise ValueError(
            f"{chosen[0]}: expected {compared[1]} rows, one for each row of {compared[0]}, got {chosen[1]}; "
            f"{indices} choose the rows that are compared"
        )


def check_vocab_size(vocab_size: Any, heads: dict[str, int], sharded: bool = False) -> int:
    """Return how many entries are compared of heads that have so many vocabulary rows; `sharded` as `check_inputs`."""
    most = min(heads.values())
    if vocab_size is not None:
        vocab_size = check_count("vocab_size", vocab_size)
    if sharded:
        return most
    listed = " and ".join(f"{rows} of {name}" for name, rows in heads.items())
    if vocab_size is None:
        if len(set(heads.values())) > 1:
            raise ValueError(f"vocab_size: expected an int, because the vocabulary rows, {listed}, differ; got None")
        return most
    if vocab_size > most:
        raise ValueError(f"vocab_size: expected at most {most} (vocabulary rows: {listed}), got {vocab_size}")
    return int(vocab_size)


def check_row_weight(row_weight: Tensor | None, student: Projection) -> Tensor | None:
    """Return the weights of the rows that are compared, [M]; given as such, or for all of the hidden states' tokens."""
    if row_weight is None:
        return None
    if check_tensor("row_weight", row_weight).dtype == torch.bool:
        row_weight = row_weight.to(torch.float32)
    row_weight = check_float_tensor("row_weight", row_weight, student.hidden.device)
    if row_weight.requires_grad:
        raise ValueError("row_weight: expected a tensor without requires_grad (no gradient flows to it), got one with")
    tokens = student.hidden.shape[:-1]
    if row_weight.shape == (student.rows,):
        return row_weight
    if row_weight.shape != tokens:
        raise ValueError(
            f"row_weight: expected shape [{student.rows}], one weight a row, or {list(tokens)}, "
            f"one a token of the hidden states, got {list(row_weight.shape)}"
        )
    return row_weight.flatten() if student.index is None else row_weight.flatten().index_select(0, student.index)


def check_float_tensor(name: str, value: Any, device: torch.device) -> Tensor:
    """Return a dense floating-point tensor on the device of the hidden states, as kernels can read it."""
    value = check_tensor(name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested one" if value.is_nested else str(value.layout)
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, as the hidden states, got {value.device}")
    return value.resolve_neg()  # kernels read memory, which does not show that its numbers are negated


def check_tensor(name: str, value: Any) -> Tensor:
    """Return `value` if it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    return value
