"""Turn heads and hidden states that are DTensors into the plain tensors of this rank; find who shares a vocabulary.

`Shard(0)` heads have two meanings. Under tensor parallelism the ranks read the same tokens and share the vocabulary,
as in `group.py`; under FSDP they read different tokens and each needs the whole head. The name of the mesh's dimension
tells them apart: "tp", as in torchtitan, accelerate and transformers, stays divided. Any other, and one without a name,
is gathered once a call, and the gradient is averaged over the ranks while it is scattered to them, as FSDP2 and DDP do
(`set_gradient_divide_factor` aside, which a parameter does not show). That is right for tensor parallelism too, where
it averages equal gradients and only costs memory and work. A mesh of two dimensions may have both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

TENSOR_PARALLEL = "tp"
HEADS = ("student_weight", "teacher_weight", "student_bias", "teacher_bias")


class Inputs(Protocol):
    """Describe the arguments of a public call: a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


I = TypeVar("I", bound=Inputs)  # noqa: E741


def vocabulary_group(inputs: Any, vocab_group: Any) -> Any:
    """Return `vocab_group`, or where it is None the ranks that share the vocabulary of a head; None where none do."""
    if vocab_group is not None:
        return vocab_group
    groups = (_group_of(getattr(inputs, name, None)) for name in HEADS)
    return next((group for group in groups if group is not None), None)


def local_tensors(inputs: I, vocab_group: dist.ProcessGroup | None) -> I:
    """Replace DTensors by plain tensors: heads by their shard of the `vocab_group`, or without one by the whole head.

    Gradients go back as DTensors of the same placements. Raises ValueError for heads that are not all divided over one
    group, and for another DTensor that is not replicated.
    """
    dtensors = {name: x for name in inputs.__dataclass_fields__ if _is_dtensor(x := getattr(inputs, name))}
    if not dtensors:
        return inputs
    divided = vocab_group is not None and not dtensors.keys().isdisjoint(HEADS)
    for name in inputs.__dataclass_fields__:
        x = getattr(inputs, name)
        if name in HEADS:
            if divided and x is not None:
                _check_divided(name, x, dist.get_process_group_ranks(vocab_group))
        elif name in dtensors:
            topk = name == "teacher_hidden" and getattr(inputs, "topk_ids", None) is not None
            _check_replicated("topk_logprobs" if topk else name, x)
    local = {name: _local_head(name, x) if name in HEADS else _local_replica(x) for name, x in dtensors.items()}
    return replace(inputs, **local)


def _is_dtensor(x: Any) -> bool:
    if not isinstance(x, Tensor) or type(x) in (Tensor, nn.Parameter):
        return False  # and what it costs to import DTensor is spared
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def _tensor_parallel_dim(x: Any) -> int | None:
    names = x.device_mesh.mesh_dim_names or ()
    return names.index(TENSOR_PARALLEL) if TENSOR_PARALLEL in names else None


def _group_of(head: Any) -> dist.ProcessGroup | None:
    """Return the ranks that share the vocabulary of `head`, or None."""
    dim = _tensor_parallel_dim(head) if _is_dtensor(head) else None
    if dim is None or not head.placements[dim].is_shard(0) or head.device_mesh.size(dim) == 1:
        return None
    return head.device_mesh.get_group(dim)


def _check_divided(name: str, head: Any, ranks: list[int]) -> None:
    group = _group_of(head)
    if group is not None and dist.get_process_group_ranks(group) == ranks:
        return
    got = f"{list(head.placements)} over {head.device_mesh}" if _is_dtensor(head) else "a plain tensor"
    raise ValueError(
        f'{name}: expected a DTensor with Shard(0) over a mesh dimension "{TENSOR_PARALLEL}" of the ranks {ranks}, '
        f"because these share the vocabulary of all heads, got {got}; or pass all heads' shards as plain tensors "
        "(`.to_local()`) with a vocab_group"
    )


def _check_replicated(name: str, x: Any) -> None:
    if not all(placement.is_replicate() for placement in x.placements):
        raise ValueError(
            f"{name}: expected a plain tensor, or a DTensor with placements "
            f"{['Replicate()'] * x.device_mesh.ndim} over {x.device_mesh}, got {list(x.placements)}; "
            "redistribute it, or pass `.to_local()` where a mesh's ranks read different tokens"
        )


def _local_head(name: str, head: Any) -> Tensor:
    """Return this rank's shard of the vocabulary, or all of it."""
    from torch.distributed.tensor import Partial, Replicate

    shared = _tensor_parallel_dim(head)
    placements: list[Any] = [Replicate()] * head.device_mesh.ndim
    gradients: list[Any] = [Partial("avg")] * head.device_mesh.ndim
    if shared is not None:
        placements[shared] = head.placements[shared] if _group_of(head) else Replicate()
        gradients[shared] = placements[shared]
    local = head.redistribute(placements=placements).to_local(grad_placements=gradients)
    # Not before: under `torch.inference_mode` a DTensor cannot be detached.
    return local.detach() if name.startswith("teacher") else local


def _local_replica(x: Any) -> Tensor:
    """Return the tensor; its gradient is that of all that the ranks compute together, so equal on each."""
    return x.to_local(grad_placements=x.placements)
