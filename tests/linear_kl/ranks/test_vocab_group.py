"""A vocabulary divided over processes, against one process that has it all, and against the float64 oracle.

How worlds are run says the conftest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from disc_kernels import fused_suffix_kl
from tests.linear_kl.oracle import (
    Outcome,
    accumulation_dtype,
    assert_accurate,
    build,
    build_everything,
    count,
    loss_of,
    oracle,
    run,
)
from tests.linear_kl.ranks import world

pytestmark = pytest.mark.slow


WORLDS = (2, 4)

# ---------------------------------------------------------------------------------------------------------------------
# What is computed


@dataclass(frozen=True)
class Case:
    """A problem and how its vocabulary is divided."""

    build: Callable[..., Any]
    options: dict[str, Any]
    impl: str = "torch"
    division: str = "even"
    worlds: tuple[int, ...] = WORLDS

    def problem(self) -> Any:
        return self.build(**self.options)


def masked(**options: Any) -> Any:
    """Entries that a bias takes out of both models: all of the first shard of two, and some of the next."""
    return world.mask_first_entries(build(bias=True, **options), 540)


def far_from_zero(**options: Any) -> Any:
    problem = build(bias=True, **options)
    return problem.with_tensors(student_bias=problem.tensors["student_bias"] + 1000)


def tied(**options: Any) -> Any:
    """Largest logits that several shards share, and models of one head."""
    problem = build(vocab=40, **options)
    hidden, weight = problem.tensors["student_hidden"], problem.tensors["student_weight"]
    weight = weight.clone()
    weight[[5, 25, 35]] = 3 * hidden[0]
    return problem.with_tensors(
        student_weight=weight, teacher_weight=weight, teacher_hidden=hidden + 0.1 * problem.tensors["teacher_hidden"]
    )


def apart(**options: Any) -> Any:
    """Both models' largest logit of the first shard is one entry, but the teacher's of all is in another shard."""
    problem = build(vocab=40, bias=True, **options)
    bias = {f"{name}_bias": problem.tensors[f"{name}_bias"].clone() for name in ("student", "teacher")}
    bias["student_bias"][5] += 10
    bias["teacher_bias"][[5, 35]] += torch.tensor([10.0, 20.0])
    return problem.with_tensors(**bias)


SHARED = {"teacher_index": [0, 0, 1, 1, 2, 2], "teacher_rows": 3}
CASES: dict[str, Case] = {}
for impl in ("torch", "triton"):
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        name = f"{impl} {divergence}"
        # Triton's interpreter is slow: it has each kind of problem with one divergence, and four ranks once.
        few = (2,) if impl == "triton" else WORLDS
        everything = {"divergence": divergence, "max_workspace_bytes": 80_000}
        beyond = {"divergence": divergence, "vocab_size": 700, "reduction": "none"}
        cases = {
            "everything": Case(build_everything, everything, impl, "ragged", WORLDS if divergence == "jsd" else few),
            "plain": Case(build, {"divergence": divergence}, impl, worlds=few),
            "masked": Case(masked, {"divergence": divergence}, impl, worlds=few),
            "beyond": Case(build_everything, beyond, impl, "beyond", worlds=few),
        }
        if impl == "triton":
            second = {"forward_kl": "plain", "reverse_kl": "masked", "jsd": "beyond"}[divergence]
            cases = {kind: cases[kind] for kind in ("everything", second)}
        CASES |= {f"{name} {kind}": case for kind, case in cases.items()}
for reduction in ("mean", "sum", "none"):
    CASES[f"{reduction} empty"] = Case(build, {"reduction": reduction, "bias": True}, division="empty")
    CASES[f"{reduction} bf16"] = Case(build, {"reduction": reduction, "dtype": torch.bfloat16})
    CASES[f"{reduction} triton bf16"] = Case(
        build, {"reduction": reduction, "dtype": torch.bfloat16}, "triton", worlds=(2,)
    )
for divergence in ("forward_kl", "reverse_kl", "jsd"):
    CASES[f"float64 {divergence}"] = Case(build_everything, {"divergence": divergence, "dtype": torch.float64})
    CASES[f"far from zero {divergence}"] = Case(far_from_zero, {"divergence": divergence}, division="ragged")
    CASES[f"tied {divergence}"] = Case(tied, {"divergence": divergence})
    CASES[f"apart {divergence}"] = Case(apart, {"divergence": divergence, "temperature": 4.0})
CASES |= {
    "float16": Case(build_everything, {"dtype": torch.float16, "reduction": "sum"}),
    "shared": Case(build, SHARED),
    "shared sorted": Case(build, SHARED | {"teacher_index": [2, 0, 1, 0, 2, 1]}, "triton", "ragged"),
    "no rows": Case(build, {"student_index": [], "teacher_index": []}),
}


# ---------------------------------------------------------------------------------------------------------------------
# What each process does


def second_backward(problem: Any, group: Any) -> list[torch.Tensor]:
    """Gradients of the first and of a second backward."""
    leaves = problem.leaves()
    loss = loss_of(problem, leaves, "torch", vocab_group=group)
    asked = [leaves[name] for name in problem.asks if name in leaves]
    return [torch.cat([g.flatten() for g in torch.autograd.grad(loss, asked, retain_graph=True)]) for _ in range(2)]


def compute(rank: int, ranks: int, device: str) -> dict[str, Any]:
    group = dist.group.WORLD
    sent: dict[str, int] = {}
    world.counted(sent)
    answers = {}
    for name, case in CASES.items():
        if ranks in case.worlds and (device == "cpu" or case.impl == "triton"):
            sent |= {"gathered": 0, "added": 0}
            problem = world.shard(case.problem(), case.division, rank, ranks).with_options(vocab_group=group)
            got = run(problem, case.impl, device)
            answers[name] = {"loss": got.loss, "gradients": got.gradients, "stats": got.stats, "sent": dict(sent)}
    results: dict[str, Any] = {"answers": answers}
    if ranks == 2 and device == "cpu":
        problem = world.shard(build(), "even", rank, ranks)
        results["second backward"] = second_backward(problem, group)
        frozen = problem.with_options(vocab_group=group, divergence="jsd")
        sent |= {"gathered": 0, "added": 0}
        loss_of(frozen, frozen.tensors, "torch")
        results["sent without gradients"] = dict(sent)
    return results


# ---------------------------------------------------------------------------------------------------------------------
# What is expected of them


def assembled(answers: list[dict[str, Any]]) -> Any:
    """The answer of one process that these are; what all ranks have must be the same to the bit."""
    first = answers[0]
    for answer in answers[1:]:
        assert torch.equal(answer["loss"], first["loss"])
        for name, value in first["stats"].items():
            assert torch.equal(answer["stats"][name], value), name
        assert torch.equal(answer["gradients"]["student_hidden"], first["gradients"]["student_hidden"])
    gradients = {
        name: value if name == "student_hidden" else torch.cat([answer["gradients"][name] for answer in answers])
        for name, value in first["gradients"].items()
    }
    return Outcome(first["loss"], gradients, first["stats"])


RUNS = [(name, ranks) for name, case in CASES.items() for ranks in case.worlds]


@pytest.mark.parametrize(("name", "ranks"), RUNS, ids=[f"{name}, {ranks} ranks" for name, ranks in RUNS])
def test_ranks_are_as_accurate_as_one_process(worlds, name, ranks):
    assert_as_one_process([result["answers"][name] for result in worlds[ranks]], name)


def assert_as_one_process(answers: list[dict[str, Any]], name: str) -> None:
    got = assembled(answers)
    problem = CASES[name].problem()
    if got.loss.dtype != torch.float64:  # there the oracle is no more accurate than what it would judge
        assert_accurate(got, problem)
    parts = [{"loss": each.loss, **each.stats, **each.gradients} for each in (got, run(problem, "torch"))]
    world.assert_close(*parts, scale=oracle(problem).logit_scale, least=0.0)


@pytest.mark.parametrize(("name", "ranks"), RUNS, ids=[f"{name}, {ranks} ranks" for name, ranks in RUNS])
def test_bytes_sent(worlds, name, ranks):
    problem = CASES[name].problem()
    rows, width = count(problem), problem.tensors["student_hidden"].shape[1]
    size = accumulation_dtype(problem).itemsize
    slope = problem.options.get("divergence", "forward_kl") != "forward_kl"  # whether its mean is needed
    # Numbers a row of each pass besides the hidden gradient. "none" makes that in a second pass, without statistics.
    passes = [(4, 3), (4, 1 + slope)] if problem.options.get("reduction") == "none" else [(4, 3 + slope)]
    for result in worlds[ranks]:
        sent = result["answers"][name]["sent"]
        assert sent["gathered"] == size * rows * sum(gathered for gathered, _ in passes)
        assert sent["added"] == size * rows * (sum(added for _, added in passes) + width)
    assert max(map(sum, passes)) <= 8


def test_bytes_sent_without_gradients_or_statistics(worlds):
    for result in worlds[2]:
        assert result["sent without gradients"] == {"gathered": 4 * 4 * 6, "added": 4 * 6}


def test_second_backward(worlds):
    for result in worlds[2]:
        first, second = result["second backward"]
        assert torch.equal(first, second)


def test_traced_call_is_refused():
    problem = build()

    def call(hidden):
        tensors = {**problem.tensors, "student_hidden": hidden}
        return fused_suffix_kl(**tensors, vocab_group="any")

    with pytest.raises(Exception, match=r"vocab_group: expected None under torch\.compile"):
        torch.compile(call, backend="eager", fullgraph=True)(problem.tensors["student_hidden"])
