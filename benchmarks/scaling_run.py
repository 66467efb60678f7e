"""Take training steps in a few processes of one machine, divided in every way of `cost_model.Plan`.

They are measured, by what they send and how long they take, only where loss and gradients are those of one process.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, Qwen2Config

from benchmarks.accuracy import Wrong
from benchmarks.cost_model import Model, Plan
from benchmarks.scaling_steps import compute_dtype, divide, prepare_call
from benchmarks.step_cases import TINY, Shape
from benchmarks.step_run import BOUNDS
from disc_train.data.example import NO_IDS, Branch, Context, Example
from disc_train.packing.collator import collator

SHAPE = replace(TINY, name="tiny, head not tied", tie_word_embeddings=False)
TIMEOUT = 300  # seconds that a world may take
COMPARED = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight")


def model_of(shape: Shape) -> Model:
    """Describe a shape to the cost model."""
    return Model(
        shape.name,
        shape.hidden_size,
        shape.intermediate_size,
        shape.num_hidden_layers,
        shape.num_attention_heads,
        shape.num_key_value_heads,
        shape.vocab_size,
        qkv_bias=shape.config is Qwen2Config,
    )


def examples(first: int, count: int, vocab: int) -> list[Example]:
    """Draw documents `first` to `first + count` of those that `cost_model.documents` counts, of random tokens."""
    tokens, suffix = 400, 25
    starts = [tokens - suffix - 2 * suffix * number for number in range(5)]
    made = []
    for number in range(first, first + count):
        ids = np.random.default_rng(number).integers(0, vocab, tokens, dtype=np.int32)
        branches = [Branch(ids[start : start + suffix], Context(start), Context(0)) for start in starts]
        made.append(Example(str(number), ids, NO_IDS, branches))
    return made


class CollectiveBytes(TorchDispatchMode):
    """Count bytes of floating-point tensors that collectives are given, by kind: `cost_model.Collective.payload`."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().partition(".")[0]
        # What is gathered is the first argument, what is scattered the second.
        whole = {
            "c10d::_allgather_base_": ("all_gather", 0),
            "c10d::allgather_": ("all_gather", 0),
            "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
            "c10d::allreduce_": ("all_reduce", 0),
        }
        if name in whole:
            kind, position = whole[name]
            self.bytes[kind] += sum(x.nbytes for x in _tensors(args[position]) if x.is_floating_point())
        return function(*args, **kwargs or {})


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value:
            yield from _tensors(item)


@dataclass(frozen=True)
class World:
    """Describe what the processes of one world measure: the plans, and the steps by which."""

    ranks: int
    plans: list[Plan]
    sizes: dict[str, Any]  # fields of `Shape` that differ from `SHAPE`'s
    documents: int  # that a rank takes in a step
    rounds: int  # timed steps

    @property
    def shape(self) -> Shape:
        return replace(SHAPE, **self.sizes)


def measure(world: World, plan: Plan, rank: int, expected: dict[str, Tensor]) -> dict[str, Any]:
    teacher = world.shape.teacher("cpu")
    student = world.shape.student(teacher)
    teacher = teacher.to(compute_dtype(plan))  # type: ignore[arg-type]
    own = examples(rank * world.documents, world.documents, world.shape.vocab_size)
    batch = collator(student, teacher)(own)
    step = divide(plan, student, teacher, batch, 1 / (world.ranks * world.documents))

    loss = step()
    dist.all_reduce(loss)
    errors = _errors({"loss": loss} | _gradients(student, plan), expected, compute_dtype(plan))
    step()  # DDP arranges its buckets after the first
    with CollectiveBytes() as counter:
        step()
    seconds = []
    for _ in range(world.rounds):
        student.zero_grad()
        dist.barrier()
        start = time.perf_counter()
        step()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    return {
        "plan": asdict(plan),
        "errors": errors,
        "payload": dict(counter.bytes),
        "seconds": statistics.median(seconds) if seconds else None,
    }


def one_process(world: World) -> dict[str, Tensor]:
    """Compute loss and gradients of all ranks' documents in one process."""
    teacher = world.shape.teacher("cpu")
    student = world.shape.student(teacher)
    batch = collator(student, teacher)(examples(0, world.ranks * world.documents, world.shape.vocab_size))
    prepare_call(student, teacher, batch)
    loss = student() / (world.ranks * world.documents)
    loss.backward()
    return {"loss": loss.detach()} | {name: _gradient(student, name) for name in COMPARED}


def _gradients(student: PreTrainedModel, plan: Plan) -> dict[str, Tensor]:
    gradients = {}
    for name in COMPARED:
        gradient = _gradient(student, name)
        gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    if plan.vocab > 1:  # the first group's ranks are this group's in order
        parts = [torch.empty_like(gradients["lm_head.weight"]) for _ in range(plan.ranks)]
        dist.all_gather(parts, gradients["lm_head.weight"])
        gradients["lm_head.weight"] = torch.cat(parts[: plan.vocab])
    return gradients


def _gradient(student: PreTrainedModel, name: str) -> Tensor:
    gradient = student.get_parameter(name).grad
    assert gradient is not None
    return gradient


def _errors(got: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    errors = {}
    for name, value in expected.items():
        errors[name] = ((got[name] - value).norm() / value.norm()).item()
        if not errors[name] <= BOUNDS[dtype]:
            raise Wrong(f"relative error of {name} {errors[name]:.1e}")
    return errors


def run_world(world: World) -> list[dict[str, Any]]:
    """Run the processes of a world; return a row for each plan, as rank 0 measured it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "world.json").write_text(json.dumps(asdict(world)))
        context = multiprocessing.get_context("forkserver")
        processes = [context.Process(target=main, args=(rank, Path(folder))) for rank in range(world.ranks)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + TIMEOUT
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        if any(code != 0 for code in codes):
            raise RuntimeError(f"expected {world.ranks} processes that end well, got exit codes {codes}")
        return json.loads(Path(folder, "rows.json").read_text())


@contextmanager
def _process_group(rank: int, ranks: int, folder: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=TIMEOUT)
    )
    yield
    dist.destroy_process_group()


def main(rank: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    settings = json.loads((folder / "world.json").read_text())
    world = World(**settings | {"plans": [Plan(**plan) for plan in settings["plans"]]})
    expected = one_process(world)
    with _process_group(rank, world.ranks, folder):
        rows = [measure(world, plan, rank, expected) for plan in world.plans]
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
