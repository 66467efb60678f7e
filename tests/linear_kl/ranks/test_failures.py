"""Ranks that disagree, or are wrong, or do not come: every rank raises, the same where it can know, and none hangs."""

import datetime
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from disc_kernels import LogitTransform, TeacherSummary, expected_embedding_kl, fused_suffix_kl, teacher_summary
from tests.linear_kl.ranks.world import error_of

pytestmark = pytest.mark.slow


WORLDS = (2,)
PATIENCE = 3  # seconds, of the groups in which a rank does not come

# Two shards of 500 entries; 6 rows of 24 numbers.
HIDDEN, HEAD = torch.randn(6, 24), torch.randn(500, 24)
SUMMARY = TeacherSummary(torch.randn(6, 24), torch.rand(6), torch.zeros(6))
HEADS = {"student_weight": HEAD, "teacher_weight": HEAD}
CALLS: dict[str, Callable[..., Any]] = {
    "fused": partial(fused_suffix_kl, student_hidden=HIDDEN, teacher_hidden=HIDDEN, **HEADS),
    "summary": partial(teacher_summary, teacher_hidden=HIDDEN, **HEADS),
    "loss": partial(expected_embedding_kl, student_hidden=HIDDEN, student_weight=HEAD, summary=SUMMARY),
}

# What both ranks are given, or (the first, the second); and how the message of both begins.
SAME = "expected the same on all ranks of vocab_group, got "
DISAGREEING: dict[str, tuple[str, dict[str, Any], str]] = {
    "vocab_size": ("fused", {"vocab_size": (995, 990)}, f"ValueError: vocab_size: {SAME}995 on rank 0, 990 on rank 1"),
    "temperature": ("fused", {"temperature": (1.0, 1.5)}, f"ValueError: temperature: {SAME}1.0 on rank 0, 1.5 on"),
    "divergence": ("fused", {"divergence": ("forward_kl", "jsd")}, f"ValueError: divergence: {SAME}'forward_kl' on"),
    "student_hidden": (
        "fused",
        {"student_hidden": (HIDDEN, HIDDEN[:5])},
        f"ValueError: student_hidden: {SAME}'torch.float32 [6, 24]",
    ),
    "teacher_index": (
        "fused",
        {"teacher_index": (torch.arange(6), torch.tensor([0, 1, 2, 3, 4, 4])), "student_index": torch.arange(6)},
        f"ValueError: teacher_index: {SAME}'torch.int64 [6]",
    ),
    "return_stats": ("fused", {"return_stats": (False, True)}, f"ValueError: return_stats: {SAME}False on rank 0"),
    "row_weight": (
        "fused",
        {"row_weight": (torch.ones(6), torch.ones(6).double())},
        f"ValueError: row_weight: {SAME}'torch.float32 [6] on",
    ),
    "transform": (
        "fused",
        {"student_transform": (None, LogitTransform(2.0))},
        f"ValueError: student_transform: {SAME}None on rank 0, 'LogitTransform(scale=2.0, softcap=None)' on rank 1",
    ),
    "gradient": (
        "fused",
        {"student_hidden": (HIDDEN, HIDDEN.clone().requires_grad_())},
        f"ValueError: student_hidden: {SAME}'torch.float32 [6, 24]",
    ),
    "workspace": ("fused", {"max_workspace_bytes": (100_000, 1000)}, f"ValueError: max_workspace_bytes: {SAME}100000"),
    "every rank's own": ("fused", {"temperature": -1.0}, "ValueError: temperature: expected a positive number, got -1"),
    "NaN on every rank": ("fused", {"temperature": float("nan")}, "ValueError: temperature: expected a finite number"),
    "reference": ("fused", {"impl": "reference"}, 'ValueError: impl: expected "triton" or "torch" with a vocab_group'),
    "too much": (
        "fused",
        {"vocab_size": 1001},
        "ValueError: vocab_size: expected at most 1000 (vocabulary rows: 1000 of student_weight",
    ),
    "division": (
        "fused",
        {"teacher_weight": (torch.randn(501, 24), torch.randn(499, 24)), "vocab_size": 1000},
        "ValueError: teacher_weight: expected the vocabulary divided as student_weight's, into [500, 500] rows",
    ),
    "no vocab_size": (
        "fused",
        {"teacher_weight": (HEAD, torch.randn(501, 24))},
        "ValueError: vocab_size: expected an int, because the vocabulary rows, 1000 of student_weight and 1001",
    ),
    "summary, temperature": ("summary", {"temperature": (1.0, 2.0)}, f"ValueError: temperature: {SAME}1.0 on rank 0"),
    "summary, bias": (
        "summary",
        {"student_bias": (torch.zeros(500), None)},
        f"ValueError: student_bias: {SAME}'torch.float32 [shard] on cpu' on rank 0, None on",
    ),
    "summary, reference": ("summary", {"impl": "reference"}, "ValueError: impl: expected "),
    "summary, division": (
        "summary",
        {"teacher_weight": (torch.randn(501, 24), torch.randn(499, 24)), "vocab_size": 1000},
        "ValueError: teacher_weight: expected the vocabulary divided as student_weight's, into [500, 500] rows",
    ),
    "loss, scale": ("loss", {"student_scale": (1.0, 2.0)}, f"ValueError: student_scale: {SAME}1.0 on rank 0"),
    "loss, summary": (
        "loss",
        {"summary": (SUMMARY, TeacherSummary(*(x.double() for x in SUMMARY)))},
        f"ValueError: summary: {SAME}'torch.float32 [6, 24] on cpu, torch.float32 [6] on cpu",
    ),
    "loss, vocab_size": (
        "loss",
        {"vocab_size": 1001},
        "ValueError: vocab_size: expected at most 1000 (vocabulary rows: 1000 of student_weight",
    ),
    "loss, reference": ("loss", {"impl": "reference"}, "ValueError: impl: expected "),
}

# What only the second rank is given: whatever the checks say of it, the first rank must raise the same.
WRONG = {
    "student_hidden": [[1.0], HIDDEN[0], HIDDEN.int(), HIDDEN.to_sparse()],
    "teacher_hidden": [None, HIDDEN[:, :3]],
    "student_weight": [None, HEAD[0], HEAD.bfloat16(), torch.randn(500, 23)],
    "teacher_weight": ["head", torch.empty(500, 24, device="meta")],
    "student_index": [[0], torch.arange(6).int(), torch.tensor([9]), torch.zeros(6, dtype=torch.bfloat16)],
    "teacher_index": [torch.zeros(2, 3, dtype=torch.int64), torch.tensor([-1]), torch.arange(6).to_sparse()],
    "summary_index": [torch.tensor([6]), torch.ones(6, requires_grad=True)],
    "row_weight": [[1.0], torch.ones(5), torch.ones(6, requires_grad=True)],
    "temperature": [0, "1", float("nan"), None],
    "divergence": ["kl", None],
    "beta": ["0.5"],
    "reduction": ["avg", ["mean"]],
    "student_bias": [torch.zeros(499), 0.0],
    "teacher_bias": [torch.zeros(500, 1)],
    "student_transform": [2.0],
    "teacher_transform": [object()],
    "student_scale": [0, None],
    "summary": [None, SUMMARY.embedding, SUMMARY._replace(bias=None), SUMMARY._replace(entropy=torch.zeros(5))],
    "vocab_size": [0, 1.5],
    "max_workspace_bytes": [0, 1, "1"],
    "impl": ["cuda", "reference"],
}
TAKES = {
    "fused": set(WRONG) - {"summary", "summary_index", "student_scale"},
    "summary": {
        *("teacher_hidden", "teacher_weight", "student_weight", "teacher_index", "temperature", "teacher_bias"),
        *("student_bias", "teacher_transform", "vocab_size", "max_workspace_bytes", "impl"),
    },
    "loss": {
        *("student_hidden", "student_weight", "summary", "student_index", "summary_index", "row_weight", "temperature"),
        *("reduction", "student_bias", "student_scale", "vocab_size", "max_workspace_bytes", "impl"),
    },
}
ONE_RANK = [(call, name, i) for call, names in TAKES.items() for name in sorted(names) for i in range(len(WRONG[name]))]


def compute(rank: int, ranks: int, device: str) -> dict[str, Any]:
    group = dist.group.WORLD
    results: dict[str, Any] = {"disagreeing": {}, "one rank": {}}
    for case, (call, changed, _) in DISAGREEING.items():
        given = {name: x[rank] if type(x) is tuple else x for name, x in changed.items()}
        results["disagreeing"][case] = error_of(CALLS[call], vocab_group=group, **given)
    for call, name, i in ONE_RANK:
        given = {name: WRONG[name][i]} if rank == 1 else {}
        results["one rank"][call, name, i] = error_of(CALLS[call], vocab_group=group, **given)
    # Not even what no check foresees may leave the other rank waiting.
    with (
        patch("disc_kernels.linear_kl.api.prepare", side_effect=MemoryError("none left"))
        if rank == 1
        else nullcontext()
    ):
        results["broken"] = error_of(CALLS["fused"], vocab_group=group)
    others = [dist.new_group([i]) for i in range(ranks)]
    results["other group"] = [error_of(call, vocab_group=others[1 - rank]) for call in CALLS.values()]
    results["late"] = {name: late(rank, name) for name in (*CALLS, "backward")}
    return results


def late(rank: int, what: str) -> tuple[str, float]:
    """What the first rank raises where the second never comes, and after how many seconds."""
    group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=PATIENCE))
    if what == "backward":
        hidden = HIDDEN.clone().requires_grad_()
        loss = CALLS["fused"](student_hidden=hidden, reduction="none", vocab_group=group)
    start, said = time.monotonic(), ""
    if rank == 0 and what == "backward":
        said = error_of(loss.sum().backward)
    elif rank == 0:
        said = error_of(CALLS[what], vocab_group=group)
    seconds = time.monotonic() - start
    dist.barrier()  # of the world: the second rank waits here
    return said, seconds


@pytest.mark.parametrize("name", DISAGREEING)
def test_ranks_that_disagree_raise_the_same(worlds, name):
    first, second = (result["disagreeing"][name] for result in worlds[2])
    assert first.startswith(DISAGREEING[name][2]), first
    assert first == second


@pytest.mark.parametrize(("call", "name", "i"), ONE_RANK, ids=[f"{call}-{name}-{i}" for call, name, i in ONE_RANK])
def test_what_one_rank_finds_wrong_all_raise(worlds, call, name, i):
    first, second = (result["one rank"][call, name, i] for result in worlds[2])
    assert first.startswith((f"ValueError: {name}: {SAME}", "ValueError: vocab_group: rank 1 cannot take part: ")), (
        first
    )
    assert first == second


def test_what_no_check_foresees(worlds):
    for result in worlds[2]:
        assert result["broken"] == "ValueError: vocab_group: rank 1 cannot take part: MemoryError: none left"


def test_group_of_others(worlds):
    for result in worlds[2]:
        for said in result["other group"]:
            assert said == "ValueError: vocab_group: expected a group that this process is a member of"


@pytest.mark.parametrize("what", [*CALLS, "backward"])
def test_a_rank_that_never_comes(worlds, what):
    said, seconds = worlds[2][0]["late"][what]
    assert said.startswith("RuntimeError: vocab_group: expected every rank of the group to make this call"), said
    assert 0.9 * PATIENCE < seconds < 4 * PATIENCE
