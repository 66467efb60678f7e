"""Divide steps over processes in the ways of `cost_model.Plan`, by PyTorch's own engines.

Each function divides the models and returns the call that is a step: it leaves the gradient of the mean loss of all
ranks' documents on the parameters, and gives this rank's part of that mean. `scale` is 1 / all documents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from benchmarks.cost_model import Plan
from disc_kernels import fused_suffix_kl
from disc_train.models.causal_lm import hidden_states
from disc_train.objectives.methods import Settings, batch_loss
from disc_train.packing.collator import PackedBatch

Step = Callable[[], Tensor]
TEMPERATURE = 2.0


def divide(plan: Plan, student: PreTrainedModel, teacher: PreTrainedModel, batch: PackedBatch, scale: float) -> Step:
    """Divide the models as a plan says, and return the call that is a step."""
    way = _divided_vocabulary if plan.vocab > 1 else _data_parallel if plan.shard == 1 else _sharded
    return way(plan, student, teacher, batch, scale)


def prepare_call(student: PreTrainedModel, teacher: PreTrainedModel, batch: PackedBatch) -> None:
    """Let a call of the student give the batch's loss, summed over its documents: DDP works around such calls only."""
    student.forward = lambda: _loss(student, teacher, batch)


def _loss(student: PreTrainedModel, teacher: PreTrainedModel, batch: PackedBatch) -> Tensor:
    return batch_loss("disc", student, teacher, batch, Settings(temperature=TEMPERATURE))


def _data_parallel(
    plan: Plan, student: PreTrainedModel, teacher: PreTrainedModel, batch: PackedBatch, scale: float
) -> Step:
    prepare_call(student, teacher, batch)
    wrapped = DistributedDataParallel(student) if plan.ranks > 1 else student

    def step() -> Tensor:
        loss = scale * wrapped()
        (plan.ranks * loss).backward()  # gradients are averaged over ranks
        return loss.detach()

    return step


def _sharded(plan: Plan, student: PreTrainedModel, teacher: PreTrainedModel, batch: PackedBatch, scale: float) -> Step:
    mesh = _mesh(plan, plan.shard)
    for model in (student, teacher):
        _shard(model, model.get_decoder().layers, mesh, plan)

    def step() -> Tensor:
        loss = scale * _loss(student, teacher, batch)  # which calls both models
        (plan.ranks * loss).backward()
        teacher.reshard()  # type: ignore[operator]  # its head was needed for longer than its forward
        return loss.detach()

    return step


def _divided_vocabulary(
    plan: Plan, student: PreTrainedModel, teacher: PreTrainedModel, batch: PackedBatch, scale: float
) -> Step:
    """Shard decoders over all ranks, and divide heads by vocabulary: a rank has a part, and all rows of its group."""
    mesh, heads = _mesh(plan, plan.shard), _mesh(plan, plan.vocab)
    copies, group = heads.get_group("copies"), heads.get_group("parts")
    for model in (student, teacher):
        part = model.lm_head.weight.chunk(plan.vocab)[group.rank()].detach().clone()
        model.lm_head.weight = nn.Parameter(part, requires_grad=model is student)
        _shard(model.get_decoder(), model.get_decoder().layers, mesh, plan, reshard_root=model is teacher)
    dtype = compute_dtype(plan)

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
        loss = scale * TEMPERATURE**2 * of_group  # type: ignore[operator]  # a tensor, without statistics
        (plan.ranks * loss).backward()
        head = student.lm_head.weight.grad
        if copies.size() > 1:
            dist.all_reduce(head, group=copies)
        head /= plan.ranks
        return loss.detach() / plan.vocab

    return step


class _Gather(torch.autograd.Function):
    """Gather the rows of all ranks, equally many of each; in the backward each has the gradient of all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.own = slice(group.rank() * len(x), (group.rank() + 1) * len(x))
        gathered = x.new_empty(group.size(), *x.shape)
        dist.all_gather(list(gathered), x.contiguous(), group=group)
        return gathered.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.own], None


def compute_dtype(plan: Plan) -> torch.dtype:
    return torch.float32 if plan.compute_bytes == 4 else torch.bfloat16


def _mesh(plan: Plan, parts: int) -> DeviceMesh:
    """Make a mesh of copies: of each, `parts` neighbouring ranks hold a part."""
    return init_device_mesh("cpu", (plan.ranks // parts, parts), mesh_dim_names=("copies", "parts"))


def _shard(
    root: nn.Module, layers: nn.ModuleList, mesh: DeviceMesh, plan: Plan, reshard_root: bool | None = None
) -> None:
    policy = MixedPrecisionPolicy(compute_dtype(plan), torch.float32, cast_forward_inputs=False)
    mesh = mesh if mesh.size(0) > 1 else mesh["parts"]
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_root)
