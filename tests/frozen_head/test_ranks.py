"""The frozen-head form over processes that share the vocabulary, against one process and the float64 oracle."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from disc_kernels import LogitTransform, TeacherSummary, teacher_summary
from tests.frozen_head.calls import loss_from_summary, summary_of
from tests.linear_kl.oracle import Outcome, accumulation_dtype, assert_accurate, build, build_everything, count, oracle
from tests.linear_kl.ranks import world

pytestmark = pytest.mark.slow


WORLDS = (2, 4)


@dataclass(frozen=True)
class Case:
    """A problem and how its vocabulary is divided."""

    options: dict[str, Any] = field(default_factory=dict)
    impl: str = "torch"
    division: str = "even"
    everything: bool = True
    worlds: tuple[int, ...] = WORLDS
    masked: int = 0  # entries that biases take out of both models, the first of the vocabulary

    def problem(self) -> Any:
        if self.everything:
            options = {"student_transform": LogitTransform(scale=1.5), **self.options}
            problem = build_everything(**options)
        else:
            problem = build(**self.options)
        if self.masked:
            problem = world.mask_first_entries(problem, self.masked)
        return replace(problem, asks=("student_hidden",))


CASES: dict[str, Case] = {}
for impl in ("torch", "triton"):
    few = (2,) if impl == "triton" else WORLDS
    for reduction in ("mean", "sum", "none"):
        CASES[f"{impl} {reduction}"] = Case({"reduction": reduction}, impl, "ragged", worlds=few)
    CASES |= {
        f"{impl} chunks": Case({"max_workspace_bytes": 80_000}, impl, worlds=few),
        f"{impl} masked": Case({"teacher_transform": None}, impl, masked=540, worlds=few),
        f"{impl} beyond": Case({"vocab_size": 700}, impl, "beyond", worlds=few),
        f"{impl} empty": Case({"vocab": 800, "bias": True}, impl, "empty", everything=False, worlds=few),
        f"{impl} bf16": Case({"dtype": torch.bfloat16}, impl, worlds=few),
    }
CASES |= {
    "plain": Case(everything=False),
    "float16": Case({"dtype": torch.float16, "reduction": "sum"}, division="ragged"),
    "float64": Case({"dtype": torch.float64}, division="ragged"),
    "no rows": Case({"student_index": [], "teacher_index": []}, everything=False),
}
RUNS = [(name, ranks) for name, case in CASES.items() for ranks in case.worlds]


def run(problem: Any, impl: str, group: Any = None) -> tuple[TeacherSummary, Any, Any]:
    """(summary, loss and gradient and statistics, the loss without gradient)"""
    options = {} if group is None else {"vocab_group": group}
    hidden = problem.tensors["student_hidden"].detach().requires_grad_()
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is NaN: an entry nobody wrote shows
    summary = summary_of(problem, impl, **options)
    loss, stats = loss_from_summary(problem, summary, impl, hidden, return_stats=True, **options)
    upstream = torch.as_tensor(problem.upstream, dtype=loss.dtype).expand_as(loss)
    (gradient,) = torch.autograd.grad(loss, [hidden], upstream)
    value = loss_from_summary(problem, summary, impl, hidden.detach(), **options)
    torch.use_deterministic_algorithms(False)
    known = {name: x for name, x in stats._asdict().items() if name != "agreement"}
    return summary, Outcome(loss.detach(), {"student_hidden": gradient}, known), value


def compute(rank: int, ranks: int, device: str) -> dict[str, Any]:
    sent: dict[str, int] = {}
    world.counted(sent)
    answers = {}
    for name, case in CASES.items():
        if ranks in case.worlds:
            sent |= {"gathered": 0, "added": 0}
            problem = world.shard(case.problem(), case.division, rank, ranks)
            summary, got, value = run(problem, case.impl, dist.group.WORLD)
            answers[name] = {
                "summary": summary._asdict(),
                "loss": got.loss,
                "gradient": got.gradients["student_hidden"],
                "stats": got.stats,
                "value": value,
                "sent": dict(sent),
            }
    return {"answers": answers, "impossible": impossible(rank)}


def impossible(rank: int) -> torch.Tensor:
    """Entropies of a teacher that has no possible entry on any rank, and of one that has on the second."""
    entropies = []
    for possible in (0, 3):
        bias = torch.full((5,), -torch.inf)
        bias[: possible * (rank == 1)] = 0
        head, hidden = torch.zeros(5, 8), torch.zeros(1, 8)
        summary = teacher_summary(hidden, head, head, teacher_bias=bias, vocab_group=dist.group.WORLD)
        entropies.append(summary.entropy)
    return torch.cat(entropies)


@pytest.mark.parametrize(("name", "ranks"), RUNS, ids=[f"{name}, {ranks} ranks" for name, ranks in RUNS])
def test_ranks_are_as_accurate_as_one_process(worlds, name, ranks):
    answers = [result["answers"][name] for result in worlds[ranks]]
    first, problem = answers[0], CASES[name].problem()
    for answer in answers[1:]:  # all ranks have the whole, the same to the bit
        for part in ("loss", "gradient", "value"):
            assert torch.equal(answer[part], first[part])
        for part in ("summary", "stats"):
            for key, x in first[part].items():
                assert torch.equal(answer[part][key], x), key
    torch.testing.assert_close(first["value"], first["loss"], rtol=1e-6, atol=1e-6)
    if first["loss"].dtype != torch.float64:  # there the oracle is no more accurate than what it would judge
        got = Outcome(first["loss"], {"student_hidden": first["gradient"]}, first["stats"])
        assert_accurate(got, problem)
    summary, one, _ = run(problem, "torch")
    expected = {**summary._asdict(), "loss": one.loss, "gradient": one.gradients["student_hidden"], **one.stats}
    found = {**first["summary"], **first["stats"], "loss": first["loss"], "gradient": first["gradient"]}
    # What is subtracted is as large as a logit; so its rounding is the least that a difference has.
    world.assert_close(found, expected, scale=oracle(problem).logit_scale, least=1.0)


@pytest.mark.parametrize(("name", "ranks"), RUNS, ids=[f"{name}, {ranks} ranks" for name, ranks in RUNS])
def test_bytes_sent(worlds, name, ranks):
    """4 numbers a row of the summary and of each loss; once, the embedding and the hidden gradient."""
    problem = CASES[name].problem()
    rows, width = count(problem), problem.tensors["student_hidden"].shape[1]
    summarised = len(problem.tensors["teacher_hidden"])
    size = accumulation_dtype(problem).itemsize
    for result in worlds[ranks]:
        sent = result["answers"][name]["sent"]
        assert sent["gathered"] == size * 4 * (summarised + 2 * rows)
        assert sent["added"] == size * width * (summarised + rows)


@pytest.mark.parametrize("ranks", WORLDS)
def test_no_possible_entry_is_nan_and_a_shard_without_one_is_nothing(worlds, ranks):
    for result in worlds[ranks]:
        nothing, three = result["impossible"]
        assert nothing.isnan()
        torch.testing.assert_close(three, torch.tensor(3.0).log())
