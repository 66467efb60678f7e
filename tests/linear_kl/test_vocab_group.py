"""A vocabulary divided over processes, against one process that has it all, and against the float64 oracle.

The processes of a world are started once and go through every case of that world's; this file is also their program.
"""

import datetime
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from disc_kernels import fused_suffix_kl

pytestmark = pytest.mark.slow

TIMEOUT = 60  # seconds, of any collective, so that nothing waits forever


def _conftest() -> Any:
    spec = importlib.util.spec_from_file_location("linear_kl_conftest", Path(__file__).with_name("conftest.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


helpers = _conftest()

# ---------------------------------------------------------------------------------------------------------------------
# What is computed


@dataclass(frozen=True)
class Case:
    """A problem and how its vocabulary is divided."""

    build: Callable[..., Any]
    options: dict[str, Any]
    impl: str = "torch"
    division: str = "even"
    worlds: tuple[int, ...] = (2, 4)

    def problem(self) -> Any:
        return self.build(**self.options)


def divide(division: str, ranks: int, vocab: int, compared: int) -> list[int]:
    """Vocabulary rows of each rank."""
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


def shard(case: Case, rank: int, ranks: int) -> Any:
    """This rank's part of the problem."""
    problem = case.problem()
    weights = [problem.tensors[f"{name}_weight"] for name in ("student", "teacher")]
    compared = problem.options.get("vocab_size") or len(weights[0])
    tensors = {}
    for name, weight in zip(("student", "teacher"), weights, strict=True):
        # Both divided as the smaller vocabulary: the last rank has the rest.
        sizes = divide(case.division, ranks, min(map(len, weights)), compared)
        start = sum(sizes[:rank])
        stop = len(weight) if rank == ranks - 1 else start + sizes[rank]
        for part in ("weight", "bias"):
            if f"{name}_{part}" in problem.tensors:
                tensors[f"{name}_{part}"] = problem.tensors[f"{name}_{part}"][start:stop].clone()
    return problem.with_tensors(**tensors)


def masked(**options: Any) -> Any:
    """Entries that a bias takes out of both models: all of the first shard of two, and some of the next."""
    problem = helpers._build(bias=True, **options)
    bias = {f"{name}_bias": problem.tensors[f"{name}_bias"].clone() for name in ("student", "teacher")}
    for value in bias.values():
        value[:540] = -torch.inf
    return problem.with_tensors(**bias)


def far_from_zero(**options: Any) -> Any:
    problem = helpers._build(bias=True, **options)
    return problem.with_tensors(student_bias=problem.tensors["student_bias"] + 1000)


def tied(**options: Any) -> Any:
    """Largest logits that several shards share, and models of one head."""
    problem = helpers._build(vocab=40, **options)
    hidden, weight = problem.tensors["student_hidden"], problem.tensors["student_weight"]
    weight = weight.clone()
    weight[[5, 25, 35]] = 3 * hidden[0]
    return problem.with_tensors(
        student_weight=weight, teacher_weight=weight, teacher_hidden=hidden + 0.1 * problem.tensors["teacher_hidden"]
    )


def apart(**options: Any) -> Any:
    """Both models' largest logit of the first shard is one entry, but the teacher's of all is in another shard."""
    problem = helpers._build(vocab=40, bias=True, **options)
    bias = {f"{name}_bias": problem.tensors[f"{name}_bias"].clone() for name in ("student", "teacher")}
    bias["student_bias"][5] += 10
    bias["teacher_bias"][[5, 35]] += torch.tensor([10.0, 20.0])
    return problem.with_tensors(**bias)


SHARED = {"teacher_index": [0, 0, 1, 1, 2, 2], "teacher_rows": 3}
CASES: dict[str, Case] = {}
for impl in ("torch", "triton"):
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        name = f"{impl} {divergence}"
        everything = {"divergence": divergence, "max_workspace_bytes": 80_000}
        few = (2,) if impl == "triton" else (2, 4)
        CASES |= {
            f"{name} everything": Case(helpers._everything, everything, impl, "ragged"),
            f"{name} plain": Case(helpers._build, {"divergence": divergence}, impl, worlds=few),
            f"{name} masked": Case(masked, {"divergence": divergence}, impl, worlds=few),
            f"{name} beyond": Case(
                helpers._everything,
                {"divergence": divergence, "vocab_size": 700, "reduction": "none"},
                impl,
                "beyond",
                worlds=few,
            ),
        }
for reduction in ("mean", "sum", "none"):
    CASES[f"{reduction} empty"] = Case(helpers._build, {"reduction": reduction, "bias": True}, division="empty")
    CASES[f"{reduction} bf16"] = Case(helpers._build, {"reduction": reduction, "dtype": torch.bfloat16})
    CASES[f"{reduction} triton bf16"] = Case(
        helpers._build, {"reduction": reduction, "dtype": torch.bfloat16}, "triton", worlds=(2,)
    )
for divergence in ("forward_kl", "reverse_kl", "jsd"):
    CASES[f"float64 {divergence}"] = Case(helpers._everything, {"divergence": divergence, "dtype": torch.float64})
    CASES[f"far from zero {divergence}"] = Case(far_from_zero, {"divergence": divergence}, division="ragged")
    CASES[f"tied {divergence}"] = Case(tied, {"divergence": divergence})
    CASES[f"apart {divergence}"] = Case(apart, {"divergence": divergence, "temperature": 4.0})
CASES |= {
    "float16": Case(helpers._everything, {"dtype": torch.float16, "reduction": "sum"}),
    "shared": Case(helpers._build, SHARED),
    "shared sorted": Case(helpers._build, SHARED | {"teacher_index": [2, 0, 1, 0, 2, 1]}, "triton", "ragged"),
    "no rows": Case(helpers._build, {"student_index": [], "teacher_index": []}),
}


# ---------------------------------------------------------------------------------------------------------------------
# What each process does


def bad_inputs(rank: int) -> dict[str, dict[str, Any]]:
    """Options with which the second rank disagrees."""
    odd = rank == 1
    vocabulary = {"vocab_size": 990 if odd else 995}
    return {
        "vocab_size": vocabulary,
        "temperature": {"temperature": 1.5 if odd else 1.0},
        "divergence": {"divergence": "jsd" if odd else "forward_kl"},
        "student_hidden": {"student_hidden": torch.randn(5 if odd else 6, 24)},
        "teacher_index": {"teacher_index": torch.tensor([0, 1, 2, 3, 4, 4 if odd else 5])},
        "return_stats": {"return_stats": odd},
        "row_weight": {"row_weight": torch.ones(6, dtype=torch.float64 if odd else torch.float32)},
        "one rank's own": {"student_bias": torch.zeros(3 if odd else 500), "teacher_bias": torch.zeros(500)},
        "every rank's own": {"temperature": -1.0},
        "gradient": {"student_hidden": torch.randn(6, 24, requires_grad=odd)},
        "too much": {"vocab_size": 1001},
        "division": {"teacher_weight": torch.randn(499 if odd else 501, 24), "vocab_size": 1000},
        "no vocab_size": {"teacher_weight": torch.randn(501 if odd else 500, 24)},
        "workspace": {"max_workspace_bytes": 1000 if odd else 100_000},
        "skip_below": {"skip_below": 1e-3},
        "reference": {"impl": "reference"},
    }


def error_of(problem: Any, group: Any, options: dict[str, Any]) -> str:
    torch.manual_seed(0)
    try:
        helpers._loss_of(problem, problem.tensors, **{"impl": "torch", "vocab_group": group, **options})
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def counted(sent: dict[str, int]) -> None:
    """Note the bytes that collectives are given."""
    all_gather, all_reduce = dist.all_gather, dist.all_reduce

    def counted_gather(outputs: Any, x: torch.Tensor, **options: Any) -> Any:
        sent["gathered"] += x.numel() * x.element_size()
        return all_gather(outputs, x, **options)

    def counted_reduce(x: torch.Tensor, **options: Any) -> Any:
        sent["added"] += x.numel() * x.element_size()
        return all_reduce(x, **options)

    dist.all_gather, dist.all_reduce = counted_gather, counted_reduce


def second_backward(problem: Any, group: Any) -> list[torch.Tensor]:
    """Gradients of the first and of a second backward."""
    leaves = problem.leaves()
    loss = helpers._loss_of(problem, leaves, "torch", vocab_group=group)
    asked = [leaves[name] for name in problem.asks if name in leaves]
    return [torch.cat([g.flatten() for g in torch.autograd.grad(loss, asked, retain_graph=True)]) for _ in range(2)]


def main(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    group = dist.group.WORLD
    sent: dict[str, int] = {}
    counted(sent)
    answers = {}
    for name, case in CASES.items():
        if ranks in case.worlds:
            sent |= {"gathered": 0, "added": 0}
            got = helpers._run(shard(case, rank, ranks).with_options(vocab_group=group), case.impl)
            answers[name] = {"loss": got.loss, "gradients": got.gradients, "stats": got.stats, "sent": dict(sent)}
    results: dict[str, Any] = {"answers": answers}
    if ranks == 2:
        problem = shard(Case(helpers._build, {}), rank, ranks)
        results["errors"] = {name: error_of(problem, group, bad) for name, bad in bad_inputs(rank).items()}
        results["second backward"] = second_backward(problem, group)
        frozen = problem.with_options(vocab_group=group, divergence="jsd")
        sent |= {"gathered": 0, "added": 0}
        helpers._loss_of(frozen, frozen.tensors, "torch")
        results["sent without gradients"] = dict(sent)
        others = [dist.new_group([i]) for i in range(ranks)]
        results["errors"]["other group"] = error_of(problem, others[1 - rank], {})
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# What is expected of them

WORLDS = (2, 4)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank of each world saved."""
    results = {}
    for ranks in WORLDS:
        folder = tmp_path_factory.mktemp(f"world{ranks}")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        if not torch.cuda.is_available():
            environment["TRITON_INTERPRET"] = "1"
        processes = [
            subprocess.Popen([sys.executable, __file__, str(rank), str(ranks), str(folder)], env=environment)
            for rank in range(ranks)
        ]
        try:
            codes = [process.wait(timeout=3 * TIMEOUT) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert codes == [0] * ranks
        results[ranks] = [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
    return results


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
    return helpers.Outcome(first["loss"], gradients, first["stats"])


RUNS = [(name, ranks) for name, case in CASES.items() for ranks in case.worlds]


@pytest.mark.parametrize(("name", "ranks"), RUNS, ids=[f"{name}, {ranks} ranks" for name, ranks in RUNS])
def test_ranks_are_as_accurate_as_one_process(worlds, name, ranks):
    got = assembled([result["answers"][name] for result in worlds[ranks]])
    problem = CASES[name].problem()
    if got.loss.dtype != torch.float64:  # there the oracle is no more accurate than what it would judge
        helpers._assert_accurate(got, problem)
    one, scale = helpers._run(problem, "torch"), helpers._oracle(problem).logit_scale
    for part, value in {"loss": one.loss, **one.stats, **one.gradients}.items():
        other = {"loss": got.loss, **got.stats, **got.gradients}[part]
        size = value.abs().max().item() if value.numel() else 0.0
        rounding = torch.finfo(value.dtype).eps * max(16.0, 2 * scale)  # log-probabilities are differences of logits
        torch.testing.assert_close(
            other, value, rtol=4 * rounding, atol=rounding * size, msg=lambda m, p=part: f"{p}: {m}"
        )


@pytest.mark.parametrize(("name", "ranks"), RUNS, ids=[f"{name}, {ranks} ranks" for name, ranks in RUNS])
def test_bytes_sent(worlds, name, ranks):
    problem = CASES[name].problem()
    rows, width = helpers._count(problem), problem.tensors["student_hidden"].shape[1]
    size = helpers._accumulation_dtype(problem).itemsize
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


ERRORS = {
    "vocab_size": "ValueError: vocab_size: expected the same on all ranks of vocab_group, got 995 on rank 0, 990 on",
    "temperature": "ValueError: temperature: expected the same on all ranks of vocab_group, got 1.0 on rank 0, 1.5 on",
    "divergence": "ValueError: divergence: expected the same on all ranks of vocab_group, got 'forward_kl' on rank 0",
    "student_hidden": "ValueError: student_hidden: expected the same on all ranks of vocab_group, got 'torch.float32",
    "teacher_index": "ValueError: teacher_index: expected the same on all ranks of vocab_group, got 'torch.int64 [6]",
    "return_stats": "ValueError: return_stats: expected the same on all ranks of vocab_group, got False on rank 0",
    "row_weight": "ValueError: row_weight: expected the same on all ranks of vocab_group, got 'torch.float32 [6] on",
    "one rank's own": "ValueError: vocab_group: rank 1 cannot take part: ValueError: student_bias: expected shape",
    "every rank's own": "ValueError: temperature: expected a positive number, got -1.0",
    "gradient": "ValueError: student_hidden: expected the same on all ranks of vocab_group, got 'torch.float32 [6, 24]",
    "too much": "ValueError: vocab_size: expected at most 1000, the vocabulary rows that the shards of student_weight",
    "division": "ValueError: teacher_weight: expected the vocabulary divided as student_weight's, into [500, 500] rows",
    "no vocab_size": "ValueError: vocab_size: expected an int, because the shards of student_weight have [500, 500]",
    "workspace": "ValueError: max_workspace_bytes: expected the same on all ranks of vocab_group, got 100000 on rank 0",
    "skip_below": "ValueError: skip_below: expected None with a vocab_group",
    "reference": 'ValueError: impl: expected "triton" or "torch" with a vocab_group, got "reference"',
    "other group": "ValueError: vocab_group: expected a group that this process is a member of",
}


@pytest.mark.parametrize("name", ERRORS)
def test_ranks_that_disagree_raise_the_same(worlds, name):
    first, second = (result["errors"][name] for result in worlds[2])
    assert first.startswith(ERRORS[name]), first
    assert first == second


def test_traced_call_is_refused(build):
    problem = build()

    def call(hidden):
        tensors = {**problem.tensors, "student_hidden": hidden}
        return fused_suffix_kl(**tensors, vocab_group="any")

    with pytest.raises(Exception, match=r"vocab_group: expected None under torch\.compile"):
        torch.compile(call, backend="eager", fullgraph=True)(problem.tensors["student_hidden"])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
