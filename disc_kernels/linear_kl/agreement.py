"""Ranks that share a vocabulary learn, before a call, that they mean the same call.

One small exchange of Python objects a call: what each rank was given, and what it found wrong with it. So ranks that
disagree all raise the same error, where collectives that do not fit each other would wait forever. With a group that
has a backend for the CPU ("gloo", or "cpu:gloo,cuda:nccl", which is what `init_process_group()` makes) hosts wait for
each other only; with NCCL alone they wait for their devices too.

Compared are shapes, dtypes, options, which gradients are asked for, and values of indices on the CPU. Not compared
are values on a device and of floating-point tensors: ranks whose hidden states differ compute something meaningless.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from disc_kernels.linear_kl.function import Call, prepare
from disc_kernels.linear_kl.implementations import choose_implementation
from disc_kernels.linear_kl.validation import build_problem, check_options
from disc_kernels.linear_kl.vocab_group import VocabGroup


@dataclass(frozen=True)
class Rank:
    """What one rank says of its call."""

    arguments: dict[str, Any]  # what must be the same on all ranks
    failure: str | None  # what it found wrong
    shard_rows: tuple[int, int] = (0, 0)  # of student_weight and teacher_weight
    chunk_rows: int = 0  # that fit its workspace


def prepare_shard(
    vocab_group: Any,
    arguments: dict[str, Any],  # of `build_problem`
    *,
    max_workspace_bytes: int | None,
    return_stats: bool,
    skip_below: float | None,
    impl: str | None,
) -> Call:
    """This rank's part of a call that all ranks of the group make.

    Raises:
        TypeError: the group is none.
        ValueError: this process is no member of it; the ranks disagree, or one of them found something wrong.
    """
    group = VocabGroup(_checked_group(vocab_group))
    call: Call | None = None
    failure: Exception | None = None
    try:
        check_options(max_workspace_bytes, skip_below, impl, arguments["reduction"])
        if skip_below is not None:
            raise ValueError("skip_below: expected None with a vocab_group, which skips nothing")
        if impl == "reference":
            raise ValueError('impl: expected "triton" or "torch" with a vocab_group, got "reference"')
        problem = build_problem(**arguments, sharded=True)
        impl = choose_implementation(impl, problem.device, problem.accumulate_dtype)
        call = prepare(
            problem, arguments["teacher_index"], impl, max_workspace_bytes, return_stats, skip_below=None, group=group
        )
    except (TypeError, ValueError) as error:
        failure = error
    options = {"max_workspace_bytes": max_workspace_bytes, "return_stats": return_stats, "impl": impl}
    described = _described({**arguments, **options})
    if call is None:
        here = Rank(described, failure=f"{type(failure).__name__}: {failure}")
    else:
        sides = call.problem.student, call.problem.teacher
        shard_rows = sides[0].weight.shape[0], sides[1].weight.shape[0]
        here = Rank(described, None, shard_rows, call.plan.chunk_rows)
    ranks: list[Any] = [None] * group.ranks
    dist.all_gather_object(ranks, here, group=group.group)
    _check_agreement(ranks, failure)
    assert call is not None
    entries = _entries(ranks, arguments["vocab_size"])[group.group.rank()]
    problem = replace(
        call.problem,
        student=replace(call.problem.student, vocab_size=entries),
        teacher=replace(call.problem.teacher, vocab_size=entries),
    )
    # All ranks must divide the rows alike.
    return replace(call, problem=problem, plan=replace(call.plan, chunk_rows=min(rank.chunk_rows for rank in ranks)))


def _checked_group(group: Any) -> dist.ProcessGroup:
    if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("vocab_group: expected a group that this process is a member of")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"vocab_group: expected a torch.distributed.ProcessGroup, got {type(group).__name__}")
    return group


def _described(arguments: dict[str, Any]) -> dict[str, Any]:
    described = {name: _description(name, value) for name, value in arguments.items()}
    hidden = arguments["student_hidden"]
    if isinstance(hidden, Tensor) and torch.amp.is_autocast_available(hidden.device.type):
        enabled = torch.is_autocast_enabled(hidden.device.type)
        described["autocast"] = str(torch.get_autocast_dtype(hidden.device.type)) if enabled else None
    return described


def _description(name: str, value: Any) -> Any:
    """What must be the same on all ranks, and what an error shows."""
    if value is None or isinstance(value, int | float | str):
        return value
    if not isinstance(value, Tensor):
        return repr(value)
    shape: list[Any] = list(value.shape)
    if name.endswith(("_weight", "_bias")) and name != "row_weight":
        shape[:1] = ["shard"]
    gradient = " with a gradient" if torch.is_grad_enabled() and value.requires_grad else ""
    # Values decide how rows are sorted and divided; CRC-32 is the same in all processes, as Python's hash is not.
    on_host = name.endswith("_index") and value.device.type == "cpu"
    values = f", checksum {zlib.crc32(value.contiguous().numpy().tobytes()):08x}" if on_host else ""
    return f"{value.dtype} {shape} on {value.device.type}{gradient}{values}"


def _check_agreement(ranks: Sequence[Rank], failure: Exception | None) -> None:
    """Raise the same on every rank; where all of them found the same, what this one found."""
    for name in ranks[0].arguments:
        values = [rank.arguments.get(name) for rank in ranks]
        if any(value != values[0] for value in values):
            listed = ", ".join(f"{value!r} on rank {i}" for i, value in enumerate(values))
            raise ValueError(f"{name}: expected the same on all ranks of vocab_group, got {listed}")
    failures = [(i, rank.failure) for i, rank in enumerate(ranks) if rank.failure is not None]
    if failure is not None and len({rank.failure for rank in ranks}) == 1:
        raise failure
    if failures:
        first, text = failures[0]
        raise ValueError(f"vocab_group: rank {first} cannot take part: {text}") from failure


def _entries(ranks: Sequence[Rank], vocab_size: int | None) -> list[int]:
    """How many entries each rank's shards have below `vocab_size`, which counts over all of them."""
    student, teacher = ([rank.shard_rows[model] for rank in ranks] for model in (0, 1))
    if vocab_size is None:
        if student != teacher:
            raise ValueError(
                f"vocab_size: expected an int, because the shards of student_weight have {student} vocabulary rows "
                f"and those of teacher_weight {teacher}; got None"
            )
        return student
    most = min(sum(student), sum(teacher))
    if vocab_size > most:
        raise ValueError(
            f"vocab_size: expected at most {most}, the vocabulary rows that the shards of student_weight ({student}) "
            f"and of teacher_weight ({teacher}) both have, got {vocab_size}"
        )
    compared = [
        [min(max(vocab_size - sum(rows[:rank]), 0), rows[rank]) for rank in range(len(ranks))]
        for rows in (student, teacher)
    ]
    if compared[0] != compared[1]:
        raise ValueError(
            f"teacher_weight: expected the vocabulary divided as student_weight's, into {student} rows, "
            f"as far as vocab_size {vocab_size}, got {teacher}"
        )
    return compared[0]
