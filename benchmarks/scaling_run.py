"""Training steps in a few processes of one machine, divided in every way of `cost_model.Plan`: what they send, how long
they take, and only where loss and gradients are one process's.

    python -m benchmarks.scaling_run RANK FOLDER

is one process of a world; `run_world` starts them all.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from benchmarks.accuracy import Wrong
from benchmarks.cost_model import Model, Plan
from benchmarks.step_cases import TINY, Shape
from benchmarks.step_run import BOUNDS
from disc_kernels import fused_suffix_kl
from disc_train.causal_lm import head_of, hidden_states
from disc_train.example import NO_IDS, Branch, Example, Place
from disc_train.objectives import suffix_kl
from disc_train.packing import PackedBatch, collator

SHAPE = replace(TINY, name="tiny, head not tied", tie_word_embeddings=False)
TEMPERATURE = 2.0
TIMEOUT = 300  # s, of a world
COMPARED = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight")


def model_of(shape: Shape) -> Model:
    """The same for the cost model."""
    return Model(
        shape.name,
        shape.hidden_size,
        shape.intermediate_size,
        shape.num_hidden_layers,
        shape.num_attention_heads,
        shape.num_key_value_heads,
        shape.vocab_size,
        qkv_bias=shape.config.model_type == "qwen2",
    )


def examples(first: int, count: int, vocab: int) -> list[Example]:
    """Documents `first` to `first + count` of those that `cost_model.documents` counts: random tokens."""
    tokens, suffix = 400, 25
    starts = [tokens - suffix - 2 * suffix * number for number in range(5)]
    made = []
    for number in range(first, first + count):
        ids = np.random.default_rng(number).integers(0, vocab, tokens, dtype=np.int32)
        branches = [Branch(ids[start : start + suffix], Place(start), Place(0)) for start in starts]
        made.append(Example(str(number), ids, NO_IDS, branches))
    return made


def distillation(student: PreTrainedModel, teacher: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """The batch's loss, summed over its documents; each model reads through its own call."""
    with torch.no_grad():
        teacher_hidden = teacher(batch["teacher_input_ids"], batch["teacher_layout"])
    student_hidden = hidden_states(student, batch["input_ids"], batch["layout"])
    pair = (student_hidden, head_of(student)), (teacher_hidden, head_of(teacher))
    return TEMPERATURE**2 * suffix_kl(*pair, batch, TEMPERATURE, reduction="sum")


# ---------------------------------------------------------------------------------------------------------------------
# Steps. Each function divides the models and returns the call that is a step: it leaves the gradient of the mean loss
# of all ranks' documents on the parameters, and gives this rank's part of that mean. `scale` is 1 / all documents.

Step = Callable[[], Tensor]


def data_parallel(
    plan: Plan, student: PreTrainedModel, teacher: PreTrainedModel, batch: PackedBatch, scale: float
) -> Step:
    teacher.forward = partial(hidden_states, teacher)  # type: ignore[method-assign]
    student.forward = partial(distillation, student, teacher, batch)  # type: ignore[method-assign]
    wrapped = DistributedDataParallel(student) if plan.ranks > 1 else student

    def step() -> Tensor:
        loss = scale * wrapped()
        (plan.ranks * loss).backward()  # gradients are averaged over ranks
        return loss.detach()

    return step


def sharded(plan: Plan, student: PreTrainedModel, teacher: PreTrainedModel, batch: PackedBatch, scale: float) -> Step:
    teacher.forward = partial(hidden_states, teacher)  # type: ignore[method-assign]
    student.forward = partial(distillation, student, teacher, batch)  # type: ignore[method-assign]
    mesh = _mesh(plan, plan.shard)
    for model in (student, teacher):
        _shard(model, model.get_decoder().layers, mesh, plan)

    def step() -> Tensor:
        loss = scale * student()
        (plan.ranks * loss).backward()
        teacher.reshard()  # type: ignore[operator]  # its head was needed for longer than its forward
        return loss.detach()

    return step


def divided_vocabulary(
    plan: Plan, student: PreTrainedModel, teacher: PreTrainedModel, batch: PackedBatch, scale: float
) -> Step:
    """Decoders sharded over all ranks; of the heads each rank has a part, and sees all rows of its group."""
    mesh, heads = _mesh(plan, plan.shard), _mesh(plan, plan.vocab)
    copies, group = heads.get_group("copies"), heads.get_group("parts")
    for model in (student, teacher):
        part = model.lm_head.weight.chunk(plan.vocab)[group.rank()].detach().clone()
        model.lm_head.weight = nn.Parameter(part, requires_grad=model is student)
        _shard(model.get_decoder(), model.get_decoder().layers, mesh, plan, reshard_root=model is teacher)
    dtype = _compute_dtype(plan)

    def rows(hidden: Tensor, index: np.ndarray) -> Tensor:
        return _Gather.apply(hidden.flatten(0, 1)[torch.from_numpy(index)], group)

    def step() -> Tensor:
        with torch.no_grad():
            teacher_rows = rows(
                hidden_states(teacher, batch["teacher_input_ids"], batch["teacher_layout"]), batch["teacher_index"]
            )
        student_rows = rows(hidden_states(student, batch["input_ids"], batch["layout"]), batch["student_index"])
        of_group = fused_suffix_kl(
            student_rows,
            student.lm_head.weight.to(dtype),
            teacher_rows,
            teacher.lm_head.weight.to(dtype),
            row_weight=_Gather.apply(batch["row_weight"], group),
            temperature=TEMPERATURE,
            reduction="sum",
            vocab_group=group,
        )
        loss = scale * TEMPERATURE**2 * of_group
        (plan.ranks * loss).backward()
        head = student.lm_head.weight.grad
        if copies.size() > 1:
            dist.all_reduce(head, group=copies)
        head /= plan.ranks
        return loss.detach() / plan.vocab

    return step


class _Gather(torch.autograd.Function):
    """All ranks' rows, of which each has as many; every rank has the gradient of all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.own = slice(group.rank() * len(x), (group.rank() + 1) * len(x))
        gathered = x.new_empty(group.size(), *x.shape)
        dist.all_gather(list(gathered), x.contiguous(), group=group)
        return gathered.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.own], None


def _compute_dtype(plan: Plan) -> torch.dtype:
    return torch.float32 if plan.compute_bytes == 4 else torch.bfloat16


def _mesh(plan: Plan, parts: int) -> DeviceMesh:
    """Copies of neighbouring ranks that hold a part each."""
    return init_device_mesh("cpu", (plan.ranks // parts, parts), mesh_dim_names=("copies", "parts"))


def _shard(
    root: nn.Module, layers: nn.ModuleList, mesh: DeviceMesh, plan: Plan, reshard_root: bool | None = None
) -> None:
    policy = MixedPrecisionPolicy(_compute_dtype(plan), torch.float32, cast_forward_inputs=False)
    mesh = mesh if mesh.size(0) > 1 else mesh["parts"]
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_root)


# ---------------------------------------------------------------------------------------------------------------------
# Counting and measuring


class CollectiveBytes(TorchDispatchMode):
    """Bytes of the floating-point tensors that collectives are given, by kind: `cost_model.Collective.payload`."""

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
    """What a world's processes do."""

    ranks: int
    plans: list[Plan]
    sizes: dict[str, int]  # of `Shape`, that differ from `SHAPE`'s
    documents: int  # a rank and step
    rounds: int  # that are timed

    @property
    def shape(self) -> Shape:
        return replace(SHAPE, **self.sizes)


def measure(world: World, plan: Plan, rank: int, expected: dict[str, Tensor]) -> dict[str, Any]:
    teacher = world.shape.teacher("cpu")
    student = world.shape.student(teacher)
    teacher = teacher.to(_compute_dtype(plan))  # type: ignore[arg-type]
    own = examples(rank * world.documents, world.documents, world.shape.vocab_size)
    batch = collator(student, teacher)(own)
    divide = divided_vocabulary if plan.vocab > 1 else data_parallel if plan.shard == 1 else sharded
    step = divide(plan, student, teacher, batch, 1 / (world.ranks * world.documents))

    loss = step()
    dist.all_reduce(loss)
    errors = _errors({"loss": loss} | _gradients(student, plan), expected, _compute_dtype(plan))
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
    """Loss and gradients of all ranks' documents."""
    teacher = world.shape.teacher("cpu")
    student = world.shape.student(teacher)
    batch = collator(student, teacher)(examples(0, world.ranks * world.documents, world.shape.vocab_size))
    teacher.forward = partial(hidden_states, teacher)  # type: ignore[method-assign]
    loss = distillation(student, teacher, batch) / (world.ranks * world.documents)
    loss.backward()
    return {"loss": loss.detach()} | {name: student.get_parameter(name).grad for name in COMPARED}


def _gradients(student: PreTrainedModel, plan: Plan) -> dict[str, Tensor]:
    gradients = {}
    for name in COMPARED:
        gradient = student.get_parameter(name).grad
        gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    if plan.vocab > 1:  # the first group's ranks are this group's in order
        parts = [torch.empty_like(gradients["lm_head.weight"]) for _ in range(plan.ranks)]
        dist.all_gather(parts, gradients["lm_head.weight"])
        gradients["lm_head.weight"] = torch.cat(parts[: plan.vocab])
    return gradients


def _errors(got: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    errors = {}
    for name, value in expected.items():
        errors[name] = ((got[name] - value).norm() / value.norm()).item()
        if not errors[name] <= BOUNDS[dtype]:
            raise Wrong(f"relative error of {name} {errors[name]:.1e}")
    return errors


# ---------------------------------------------------------------------------------------------------------------------
# Worlds


def run_world(world: World) -> list[dict[str, Any]]:
    """A row for each plan, as rank 0 measured it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "world.json").write_text(json.dumps(asdict(world)))
        command = [sys.executable, "-m", "benchmarks.scaling_run"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        processes = [
            subprocess.Popen([*command, str(rank), folder], env=environment, cwd=Path(__file__).parent.parent)
            for rank in range(world.ranks)
        ]
        try:
            codes = [process.wait(TIMEOUT) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
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
    settings = json.loads((folder / "world.json").read_text())
    world = World(**settings | {"plans": [Plan(**plan) for plan in settings["plans"]]})
    expected = one_process(world)
    with _process_group(rank, world.ranks, folder):
        rows = [measure(world, plan, rank, expected) for plan in world.plans]
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
