"""Check, before ranks that share a vocabulary compute anything, that all of them make the same call.

One small exchange of Python objects a call says what each rank was given, and what it found wrong with it. So ranks
that disagree all raise the same error, where collectives that do not fit each other would wait forever. With a group
that has a backend for the CPU (which `init_process_group()` makes) hosts wait for each other only, and a rank that
never calls makes the others raise within the group's timeout; with NCCL alone its watchdog ends the process.

Compared are shapes, dtypes, options, which gradients are asked for, and values of indices on the CPU; not values on a
device or of floating-point tensors.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Number
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from disc_kernels.linear_kl.inputs import LogitTransform, Projection
from disc_kernels.linear_kl.ranks.dtensor import I, Inputs, local_tensors
from disc_kernels.linear_kl.ranks.group import VocabGroup, with_all_ranks
from disc_kernels.linear_kl.validation import check_vocab_size
from disc_kernels.linear_kl.workspace import Plan

S = TypeVar("S", bound=Inputs)  # a checked problem: a dataclass too


@dataclass(frozen=True)
class Rank:
    """Hold what one rank says of its call."""

    arguments: dict[str, Any]  # what must be the same on all ranks
    failure: str | None = None  # what it found wrong
    head_rows: dict[str, int] | None = None  # vocabulary rows of each head, by argument
    chunk_rows: int = 0  # rows a chunk that fit its workspace
    group_rows: int = 0  # rows a group, the same


def agree(vocab_group: Any, inputs: I, prepare: Callable[[I, VocabGroup | None], tuple[S, Plan]]) -> tuple[S, Plan]:
    """Return this rank's part of a call that all ranks of the group make, and its plan.

    DTensors of the inputs are made local before they go to `prepare`, which checks and plans the call of one rank.

    Raises:
        TypeError: the group is none.
        ValueError: this process is no member of it; the ranks disagree, or one of them found something wrong.
        RuntimeError: a rank did not call within the group's timeout.
    """
    group = VocabGroup(_checked_group(vocab_group))
    failure: Exception | None = None
    try:
        inputs = local_tensors(inputs, group.group)
        shard, plan = prepare(inputs, group)
        here = Rank(_described(inputs), None, _head_rows(inputs), plan.chunk_rows, plan.group_rows)
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        failure = error
        here = Rank(_described(inputs), failure=f"{type(error).__name__}: {error}")
    gathered = _exchange(group, here, failure)
    entries = _entries([rank.head_rows for rank in gathered], getattr(inputs, "vocab_size", None))
    # All ranks must divide the rows alike.
    chunk_rows, group_rows = (min(getattr(rank, name) for rank in gathered) for name in ("chunk_rows", "group_rows"))
    rank = group.group.rank()
    group = replace(group, first=sum(entries[:rank]), entries=sum(entries))
    plan = replace(plan, chunk_rows=chunk_rows, group_rows=group_rows, group=group)
    return _with_entries(shard, entries[rank]), plan


def _with_entries(problem: S, entries: int) -> S:
    """Compare the first `entries` entries of a problem's heads."""
    heads = {name: x for name, x in vars(problem).items() if isinstance(x, Projection) and x.ids is None}
    return replace(problem, **{name: replace(head, vocab_size=entries) for name, head in heads.items()})


def divided_vocabulary(vocab_group: Any, check: Callable[[], int], arguments: dict[str, Any]) -> int:
    """Return how many tokens a head has on all ranks together.

    `check` returns how many this rank has, or raises; then all ranks do, as in `agree`, and where `arguments` differ.
    """
    group, failure = VocabGroup(_checked_group(vocab_group)), None
    described = {name: _description(name, value) for name, value in arguments.items()}
    try:
        here = Rank(described, head_rows={"weight": check()})
    except Exception as error:
        failure, here = error, Rank(described, failure=f"{type(error).__name__}: {error}")
    return sum(rank.head_rows["weight"] for rank in _exchange(group, here, failure))


def _exchange(group: VocabGroup, here: Rank, failure: Exception | None) -> list[Any]:
    """Return what every rank says of its call; raise the same error on all of them if they disagree or one failed."""
    gathered: list[Any] = [None] * group.ranks
    with with_all_ranks():
        dist.all_gather_object(gathered, here, group=group.group)
    _check_agreement(gathered, failure)
    return gathered


def _checked_group(group: Any) -> dist.ProcessGroup:
    if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("vocab_group: expected a group that this process is a member of")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"vocab_group: expected a torch.distributed.ProcessGroup, got {type(group).__name__}")
    return group


def _head_rows(inputs: Inputs) -> dict[str, int]:
    heads = ("student_weight", "teacher_weight")
    given = {name: getattr(inputs, name, None) for name in heads}
    return {name: head.shape[0] for name, head in given.items() if head is not None}


def _described(inputs: Inputs) -> dict[str, Any]:
    described = {name: _description(name, getattr(inputs, name)) for name in inputs.__dataclass_fields__}
    if getattr(inputs, "topk_ids", None) is not None:  # which `fused_topk_kl` calls so
        described["topk_logprobs"] = described.pop("teacher_hidden")
    return described


def _description(name: str, value: Any) -> Any:
    """Return what must be the same on all ranks, and what an error shows."""
    if value is None or isinstance(value, int | float | str):
        return value
    if isinstance(value, tuple):  # a TeacherSummary
        return ", ".join(str(_description(f"{name}.{i}", x)) for i, x in enumerate(value))
    if isinstance(value, Number | LogitTransform | torch.dtype):
        return repr(value)
    if not isinstance(value, Tensor):
        return type(value).__name__
    shape = [str(size) for size in value.shape]
    if name.endswith(("_weight", "_bias")) and name != "row_weight":
        shape[:1] = ["shard"]
    gradient = " with a gradient" if torch.is_grad_enabled() and value.requires_grad else ""
    # Values decide how rows are sorted and divided; CRC-32 is the same in all processes, as Python's hash is not.
    # A DTensor is here where it was refused: it has no values to read.
    index = (
        type(value) is Tensor
        and (name.endswith("_index") or name in ("mask", "labels", "topk_ids"))
        and not value.is_floating_point()
    )
    index = index and value.layout == torch.strided
    on_host = index and value.device.type == "cpu"
    values = f", checksum {zlib.crc32(value.contiguous().numpy().tobytes()):08x}" if on_host else ""
    return f"{value.dtype} [{', '.join(shape)}] on {value.device.type}{gradient}{values}"


def _check_agreement(ranks: Sequence[Rank], failure: Exception | None) -> None:
    """Raise the same error on every rank; where all of them found the same, the one that this rank found."""
    for name in ranks[0].arguments:
        values = [rank.arguments.get(name) for rank in ranks]
        if any(repr(value) != repr(values[0]) for value in values):  # NaN is not equal to itself
            listed = ", ".join(f"{value!r} on rank {i}" for i, value in enumerate(values))
            raise ValueError(f"{name}: expected the same on all ranks of vocab_group, got {listed}")
    failures = [(i, rank.failure) for i, rank in enumerate(ranks) if rank.failure is not None]
    if failure is not None and len({rank.failure for rank in ranks}) == 1:
        raise failure
    if failures:
        first, text = failures[0]
        raise ValueError(f"vocab_group: rank {first} cannot take part: {text}") from failure


def _entries(ranks: Sequence[dict[str, int]], vocab_size: int | None) -> list[int]:
    """Return how many entries each rank's shards have below `vocab_size`, which counts over all of them.

    `ranks` are each rank's vocabulary rows, by head; what is compared must be divided alike in all heads.
    """
    heads = {name: [rows[name] for rows in ranks] for name in ranks[0]}
    vocab_size = check_vocab_size(vocab_size, {name: sum(rows) for name, rows in heads.items()})
    first, *others = heads
    compared = {
        name: [min(max(vocab_size - sum(rows[:rank]), 0), rows[rank]) for rank in range(len(ranks))]
        for name, rows in heads.items()
    }
    for other in others:
        if compared[other] != compared[first]:
            raise ValueError(
                f"{other}: expected the vocabulary divided as {first}'s, into {heads[first]} rows, "
                f"as far as vocab_size {vocab_size}, got {heads[other]}"
            )
    return compared[first]
