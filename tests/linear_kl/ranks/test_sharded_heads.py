"""Heads that are DTensors: tensor parallel, FSDP, both; against the plain eager loss through the same modules.

Every rank has the same heads. Ranks that share a vocabulary have the same rows too, all others have rows of their own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from disc_kernels import expected_embedding_kl, fused_suffix_kl, teacher_summary
from tests.linear_kl.oracle import build
from tests.linear_kl.ranks import world

pytestmark = pytest.mark.slow


WORLDS = (2, 4)
VOCAB = 1001  # no multiple of 2 or 4
HEADS = ("student_weight", "student_bias", "teacher_weight", "teacher_bias")


def rows_of(replica: int) -> dict[str, Tensor]:
    """Heads, and the hidden states that the ranks of one replica of the model have."""
    tensors = build(vocab=VOCAB, bias=True).tensors
    other = build(vocab=VOCAB, bias=True, seed=1 + replica).tensors
    return tensors | {name: x for name, x in other.items() if name.endswith("hidden")}


def leaves_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().requires_grad_(name.startswith("student")) for name, x in tensors.items()}


def plain(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def differentiated(loss: Tensor, leaves: Callable[[], dict[str, Tensor]]) -> dict[str, Any]:
    """What is to be compared after a backward, and whether each gradient that is a DTensor lies as its tensor does."""
    loss.backward()
    asked = {name: x for name, x in leaves().items() if x.requires_grad}
    alike = {
        name: (x.grad.placements, x.grad.device_mesh) == (x.placements, x.device_mesh)
        for name, x in asked.items()
        if isinstance(x, DTensor)
    }
    gradients = {name: plain(x.grad).clone() for name, x in asked.items()}
    return {"loss": loss.detach(), "gradients": gradients, "alike": alike}


def one_process(tensors: dict[str, Tensor]) -> dict[str, Any]:
    leaves = leaves_of(tensors)
    loss = fused_suffix_kl(**leaves)
    return differentiated(loss, lambda: leaves)


def fused(tensors: dict[str, Tensor], lay: Callable[[str, Tensor], Tensor], **options: Any) -> dict[str, Any]:
    """`fused_suffix_kl` of tensors laid out as `lay` says."""
    leaves = leaves_of({name: lay(name, x) for name, x in tensors.items()})
    loss = fused_suffix_kl(**leaves, **options)
    return differentiated(loss, lambda: leaves)


def heads(mesh: Any, *placements: Any) -> Callable[[str, Tensor], Tensor]:
    return lambda name, x: distribute_tensor(x, mesh, placements) if name in HEADS else x


def from_summary(tensors: dict[str, Tensor], lay: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    """The frozen-head form of the same."""
    t = {name: lay(name, x).detach() for name, x in tensors.items()}
    hidden = t["student_hidden"].requires_grad_()
    summary = teacher_summary(
        t["teacher_hidden"],
        t["teacher_weight"],
        t["student_weight"],
        teacher_bias=t["teacher_bias"],
        student_bias=t["student_bias"],
    )
    loss = expected_embedding_kl(hidden, t["student_weight"], summary, student_bias=t["student_bias"])
    return differentiated(loss, lambda: {"student_hidden": hidden})


class Model(nn.Module):
    """Two heads, and the eager loss of what they say."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        for name in ("student", "teacher"):
            head = nn.Linear(24, VOCAB)
            head.weight.data, head.bias.data = tensors[f"{name}_weight"].clone(), tensors[f"{name}_bias"].clone()
            self.add_module(name, head.requires_grad_(name == "student"))

    def forward(self, student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
        log_q = self.student(student_hidden).log_softmax(-1)
        log_p = self.teacher(teacher_hidden).log_softmax(-1)
        return nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    def heads(self) -> dict[str, Tensor]:
        return {f"{name.replace('.', '_')}": x for name, x in self.named_parameters()}


def beside_eager(model: Model, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The eager loss through the sharded model, and ours of its parameters as they are outside its forward."""
    results = {}
    for way in ("eager", "ours"):
        model.zero_grad()
        hidden = {name: x.clone().requires_grad_(name == "student_hidden") for name, x in tensors.items()}
        hidden = {name: hidden[name] for name in ("student_hidden", "teacher_hidden")}
        if way == "eager":
            loss = model(**hidden)
        else:
            assert all(isinstance(x, DTensor) for x in model.heads().values())
            loss = fused_suffix_kl(**hidden, **model.heads())
        # After the backward FSDP2 has put its own parameters back, with their gradients.
        results[way] = differentiated(loss, lambda hidden=hidden: {**hidden, **model.heads()})
    return results


def inferred(tensors: dict[str, Tensor], lay: Callable[[str, Tensor], Tensor]) -> Tensor:
    laid = {name: lay(name, x) for name, x in tensors.items()}
    with torch.inference_mode():
        return fused_suffix_kl(**laid)


def refused(mesh: Any, tensors: dict[str, Tensor], rank: int) -> dict[str, str]:
    dtensors = {name: heads(mesh, Shard(0))(name, x) for name, x in tensors.items()}
    scattered = distribute_tensor(tensors["student_hidden"], mesh, [Shard(0)])
    unnamed = distribute_tensor(tensors["student_weight"], init_device_mesh("cpu", (2,)), [Shard(0)])
    local = {name: x.to_local() if isinstance(x, DTensor) else x for name, x in dtensors.items()}
    index = torch.arange(len(tensors["student_hidden"].flatten(0, -2)))
    indices = {f"{name}_index": distribute_tensor(index, mesh, [Shard(0)]) for name in ("student", "teacher")}
    group, error_of = mesh.get_group(), partial(world.error_of, fused_suffix_kl)
    return {
        "scattered": error_of(**{**dtensors, "student_hidden": scattered}),
        "scattered, plain heads": error_of(**{**tensors, "student_hidden": scattered}),
        "plain teacher": error_of(**{**dtensors, "teacher_weight": tensors["teacher_weight"]}),
        "plain bias": error_of(**{**dtensors, "student_bias": tensors["student_bias"]}),
        "scattered index": error_of(**dtensors, **indices),
        "unnamed": error_of(**{**local, "student_weight": unnamed}, vocab_group=group),
        "one rank": error_of(
            **{**dtensors, "teacher_weight": local["teacher_weight"] if rank else dtensors["teacher_weight"]}
        ),
    }


def compute(rank: int, ranks: int, device: str) -> dict[str, Any]:
    return two(rank) if ranks == 2 else four(rank)


def two(rank: int) -> dict[str, Any]:
    together, apart = rows_of(0), rows_of(rank)
    tp, unnamed = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), init_device_mesh("cpu", (2,))
    replicas = lambda name, x: distribute_tensor(x, tp, [Shard(0) if name in HEADS else Replicate()])  # noqa: E731
    local = lambda name, x: x.chunk(2)[rank] if name in HEADS else x  # noqa: E731
    results: dict[str, Any] = {
        "together": one_process(together),
        "apart": one_process(apart),
        "vocab_group": fused(together, local, vocab_group=tp.get_group()),
        "tp": fused(together, heads(tp, Shard(0))),
        "tp, none": fused(together, heads(tp, Shard(0)), reduction="sum", max_workspace_bytes=60_000),
        "tp, replicas": fused(together, replicas),
        "tp, other dimension": fused(
            together,
            lambda name, x: distribute_tensor(x, tp, [Shard(1)]) if name.endswith("_weight") else x,
        ),
        "tp, unnamed": fused(together, heads(unnamed, Shard(0))),
        "tp, inference": inferred(together, heads(tp, Shard(0))),
        "fsdp, inference": inferred(apart, heads(unnamed, Shard(0))),
        "tp, frozen": from_summary(together, heads(tp, Shard(0))),
        "fsdp, frozen": from_summary(apart, heads(unnamed, Shard(0))),
        "refused": refused(tp, together, rank),
    }
    for name in ("fsdp", "dp_shard", None):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=None if name is None else (name,))
        model = Model(apart)
        fully_shard(model, mesh=mesh)
        results[f"fully_shard {name}"] = beside_eager(model, apart)
    leaves = leaves_of({name: heads(unnamed, Shard(0))(name, x) for name, x in apart.items()})
    with CommDebugMode() as collectives:
        fused_suffix_kl(**leaves, max_workspace_bytes=60_000).backward()
    results["collectives"] = {str(name).split(".")[-1]: n for name, n in collectives.get_comm_counts().items()}
    return results


def four(rank: int) -> dict[str, Any]:
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tensors = rows_of(both.get_local_rank("dp"))
    model = Model(tensors)
    column = {
        "student": ColwiseParallel(output_layouts=Replicate()),
        "teacher": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, both["tp"], column)
    fully_shard(model, mesh=both["dp"])
    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    hsdp = Model(rows_of(rank))
    fully_shard(hsdp, mesh=hybrid)
    # Data parallel over all but the ranks of "tp": here the outer dimension, which DTensor divides first.
    inner = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "dp"))
    return {
        "dp x tp": beside_eager(model, tensors),
        "dp x tp alone": one_process(tensors),
        "hsdp": beside_eager(hsdp, rows_of(rank)),
        "tp x dp": fused(rows_of(inner.get_local_rank("dp")), heads(inner, Shard(0), Shard(0))),
        "tp x dp alone": one_process(rows_of(inner.get_local_rank("dp"))),
    }


# ---------------------------------------------------------------------------------------------------------------------
# What is expected


def assert_close(got: Tensor, expected: Tensor, name: str) -> None:
    """To float32 rounding of logits of some nats."""
    size = expected.abs().max().item()
    assert size > 0
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * size, msg=lambda m: f"{name}: {m}")


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert_close(got["loss"], expected["loss"], "loss")
    for name, x in got["gradients"].items():
        assert_close(x, expected["gradients"][name], name)
    assert all(got["alike"].values())


@pytest.mark.parametrize("case", ["tp", "tp, replicas", "tp, other dimension", "tp, unnamed", "tp, frozen"])
def test_tensor_parallel_heads_give_what_one_process_gives(worlds, case):
    for result in worlds[2]:
        assert_same(result[case], result["together"])
    heads_laid = {"tp": 2, "tp, replicas": 3, "tp, other dimension": 1, "tp, unnamed": 2, "tp, frozen": 0}
    assert len(worlds[2][0][case]["alike"]) == heads_laid[case]


def test_inference_mode(worlds):
    for result in worlds[2]:
        assert_close(result["tp, inference"], result["together"]["loss"], "tp")
        assert_close(result["fsdp, inference"], result["apart"]["loss"], "fsdp")


def test_tensor_parallel_heads_are_a_vocab_group(worlds):
    """To the bit: `vocab_group` with the local shards."""
    for rank, result in enumerate(worlds[2]):
        assert torch.equal(result["tp"]["loss"], result["vocab_group"]["loss"])
        for name, x in result["vocab_group"]["gradients"].items():
            shard = result["tp"]["gradients"][name]
            assert torch.equal(shard.chunk(2)[rank] if name in HEADS else shard, x), name


def test_sharded_heads_in_chunks(worlds):
    for result in worlds[2]:
        got, expected = result["tp, none"], result["together"]
        for name, x in got["gradients"].items():
            assert_close(x, 6 * expected["gradients"][name], name)


def averaged(results: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {
        name: sum(result["gradients"][name] for result in results) / len(results)
        for name in results[0]["gradients"]
        if name in HEADS
    }


@pytest.mark.parametrize("name", ["fsdp", "dp_shard", None])
def test_data_parallel_heads_give_what_the_eager_loss_gives(worlds, name):
    """The loss and the hidden gradient are the rank's own, the heads' gradients the ranks' average, as FSDP2's are."""
    average = averaged([result["apart"] for result in worlds[2]])
    for result in worlds[2]:
        eager, ours = result[f"fully_shard {name}"].values()
        assert_same(ours, eager)
        assert_close(ours["loss"], result["apart"]["loss"], "loss")
        assert_close(
            ours["gradients"]["student_hidden"], result["apart"]["gradients"]["student_hidden"], "student_hidden"
        )
        for head, x in average.items():
            assert_close(ours["gradients"][head], x, head)
        assert len(ours["alike"]) == 2
    first, second = (result[f"fully_shard {name}"]["ours"]["loss"] for result in worlds[2])
    assert first != second  # they do have rows of their own


def test_data_parallel_frozen_heads(worlds):
    for result in worlds[2]:
        assert_same(result["fsdp, frozen"], result["apart"])


def test_heads_are_gathered_once_a_call(worlds):
    """Not once a chunk: four heads and biases, and two gradients."""
    for result in worlds[2]:
        assert result["collectives"] == {"all_gather_into_tensor": 4, "reduce_scatter_tensor": 2}


@pytest.mark.parametrize("case", ["dp x tp", "hsdp"])
def test_both_at_once_give_what_the_eager_loss_gives(worlds, case):
    for result in worlds[4]:
        assert_same(result[case]["ours"], result[case]["eager"])
        assert len(result[case]["ours"]["alike"]) == 2


@pytest.mark.parametrize("case", ["dp x tp", "tp x dp"])
def test_both_at_once_give_what_one_process_gives(worlds, case):
    average = averaged([result[f"{case} alone"] for result in worlds[4]])
    for result in worlds[4]:
        got = result[case]["ours"] if case == "dp x tp" else result[case]
        alone = result[f"{case} alone"]
        assert_close(got["loss"], alone["loss"], "loss")
        assert_close(got["gradients"]["student_hidden"], alone["gradients"]["student_hidden"], "student_hidden")
        for head, x in average.items():
            assert_close(got["gradients"][head], x, head)
        assert all(got["alike"].values()) and len(got["alike"]) == 2


REFUSED = {
    "scattered": "ValueError: student_hidden: expected a plain tensor, or a DTensor with placements ",
    "scattered, plain heads": "ValueError: student_hidden: expected a plain tensor, or a DTensor with placements ",
    "scattered index": "ValueError: student_index: expected a plain tensor, or a DTensor with placements ",
    "plain teacher": 'ValueError: teacher_weight: expected a DTensor with Shard(0) over a mesh dimension "tp" of the',
    "plain bias": 'ValueError: student_bias: expected a DTensor with Shard(0) over a mesh dimension "tp" of the',
    "unnamed": 'ValueError: student_weight: expected a DTensor with Shard(0) over a mesh dimension "tp" of the',
    "one rank": "ValueError: vocab_group: rank 1 cannot take part: ValueError: teacher_weight: expected a DTensor",
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(worlds, case):
    first, second = (result["refused"][case] for result in worlds[2])
    assert first.startswith(REFUSED[case]), first
    assert first == second
