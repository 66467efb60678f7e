"""Run worlds of processes, to test what ranks do together.

The processes of a world are started once and go through every case for that many ranks: a test file has a function
`compute(rank, ranks, device)` that each of them calls, and returns what the tests are to compare.
"""

import datetime
import importlib
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import forkserver

TIMEOUT = 60  # seconds, of any collective, so that nothing waits forever


def run(module: str, ranks: int, folder: Path, device: str = "cpu") -> list[Any]:
    """Return what each of the `ranks` processes of a test module computed."""
    # A process that was forked from one that has asked for a GPU cannot use it.
    context = forkserver.context() if device == "cpu" else multiprocessing.get_context("spawn")
    each = [(module, rank, ranks, folder, device) for rank in range(ranks)]
    processes = [context.Process(target=_rank, args=arguments) for arguments in each]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + 3 * TIMEOUT
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
    for rank, process in enumerate(processes):
        process.join()
        if process.exitcode != 0:
            pytest.fail(f"rank {rank} of {ranks}: {(folder / f'{rank}.txt').read_text()[-4000:]}")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(module: str, rank: int, ranks: int, folder: Path, device: str) -> None:
    """Run what one of those processes does: compute, save, and write all output to a file."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        importlib.import_module("tests.conftest")  # its settings of the interpreter
    torch.set_num_threads(1)
    with (folder / f"{rank}.txt").open("w", buffering=1) as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=TIMEOUT),
        )
        torch.save(importlib.import_module(module).compute(rank, ranks, device), f"{folder}/{rank}.pt")
        dist.barrier()  # none leaves while another may still need it
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# How a vocabulary is divided


def divide(division: str, ranks: int, vocab: int, compared: int) -> list[int]:
    """Return how many vocabulary rows each rank has."""
    if division == "even":
        sizes = [vocab // ranks] * ranks
    elif division == "ragged":
        sizes = [1, *(vocab * (i + 1) // ranks**2 for i in range(ranks - 1))]
    elif division == "beyond":  # the last shard has nothing that is compared, the one before ends inside
        sizes = [compared // (ranks - 1)] * (ranks - 2)
        sizes += [compared - sum(sizes), 0]
    else:
        assert division == "empty"
        sizes = [0, *[vocab // ranks] * (ranks - 1)]
    return [*sizes[:-1], vocab - sum(sizes[:-1])]


def shard(problem: Any, division: str, rank: int, ranks: int) -> Any:
    """Return this rank's part of the problem."""
    weights = [problem.tensors[f"{name}_weight"] for name in ("student", "teacher")]
    compared = problem.options.get("vocab_size") or len(weights[0])
    tensors = {}
    for name, weight in zip(("student", "teacher"), weights, strict=True):
        # Both divided as the smaller vocabulary: the last rank has the rest.
        sizes = divide(division, ranks, min(map(len, weights)), compared)
        start = sum(sizes[:rank])
        stop = len(weight) if rank == ranks - 1 else start + sizes[rank]
        for part in ("weight", "bias"):
            if f"{name}_{part}" in problem.tensors:
                tensors[f"{name}_{part}"] = problem.tensors[f"{name}_{part}"][start:stop].clone()
    return problem.with_tensors(**tensors)


def error_of(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Return what a call raises, as text, to compare it between ranks."""
    try:
        call(*arguments, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], scale: float, least: float) -> None:
    """Compare ranks with one process; `scale` is the logits' size, and no tensor counts as smaller than `least`."""
    for name, x in expected.items():
        # Differences of logits are no more accurate than these.
        rounding = torch.finfo(x.dtype).eps * max(16.0, 2 * scale)
        size = max(x.abs().max().item(), least) if x.numel() else 0.0
        torch.testing.assert_close(
            got[name], x, rtol=4 * rounding, atol=rounding * size, msg=lambda m, name=name: f"{name}: {m}"
        )


def mask_first_entries(problem: Any, entries: int) -> Any:
    """Return the problem without the vocabulary's first entries, which biases take out of both models."""
    bias = {f"{name}_bias": problem.tensors[f"{name}_bias"].clone() for name in ("student", "teacher")}
    for value in bias.values():
        value[:entries] = -torch.inf
    return problem.with_tensors(**bias)


def counted(sent: dict[str, int]) -> None:
    """Add up in `sent`, from now on, the bytes that this rank gives to collectives."""
    all_gather, all_reduce = dist.all_gather, dist.all_reduce

    def counted_gather(outputs: Any, x: torch.Tensor, **options: Any) -> Any:
        sent["gathered"] += x.numel() * x.element_size()
        return all_gather(outputs, x, **options)

    def counted_reduce(x: torch.Tensor, **options: Any) -> Any:
        sent["added"] += x.numel() * x.element_size()
        return all_reduce(x, **options)

    dist.all_gather, dist.all_reduce = counted_gather, counted_reduce
