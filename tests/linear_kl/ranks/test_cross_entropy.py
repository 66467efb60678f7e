"""Cross-entropy with a head whose vocabulary is divided over two processes: what one process has."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from disc_kernels import fused_cross_entropy

pytestmark = pytest.mark.slow

WORLDS = (2,)
FIRST = 20  # tokens of the first of two shards


def call(rows: slice, **options: Any) -> tuple[torch.Tensor, ...]:
    """Loss, hidden gradient and gradient of the weight's rows."""
    torch.manual_seed(3)
    hidden, weight = torch.randn(2, 6, 8, dtype=torch.float64), torch.randn(53, 8, dtype=torch.float64)
    labels = torch.randint(50, (2, 6))
    labels[0, 1:3] = -100
    hidden, weight = hidden.requires_grad_(), weight[rows].clone().requires_grad_()
    loss = fused_cross_entropy(hidden, weight, labels, vocab_size=50, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (hidden, weight))


def compute(rank: int, ranks: int, device: str) -> dict[str, Any]:
    rows = slice(FIRST) if rank == 0 else slice(FIRST, None)
    results: dict[str, Any] = {}
    for reduction in ("mean", "none"):
        results[reduction] = call(rows, reduction=reduction, vocab_group=dist.group.WORLD)
    try:  # which one rank alone finds wrong
        weight = torch.zeros(5, 8) if rank == 0 else torch.zeros(5, 7)
        fused_cross_entropy(torch.zeros(2, 8), weight, torch.zeros(2).long(), vocab_group=dist.group.WORLD)
    except ValueError as error:
        results["error"] = str(error)
    for name, options in {
        "labels": {},
        "ignore_index": {"ignore_index": -rank},
        "vocab_size": {"vocab_size": 9 + rank},
    }.items():
        labels = torch.tensor([1, 2 + rank * (name == "labels")])
        try:
            fused_cross_entropy(torch.zeros(2, 8), torch.zeros(5, 8), labels, vocab_group=dist.group.WORLD, **options)
        except ValueError as error:
            results[name] = str(error)
    return results


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_processes_are_one(worlds, reduction):
    (loss, hidden, first), (_, other_hidden, second) = (result[reduction] for result in worlds[2])
    assert torch.equal(hidden, other_hidden)
    got_all = loss, hidden, torch.cat([first, second])
    for got, want in zip(got_all, call(slice(None), reduction=reduction), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_what_one_process_finds_wrong_all_raise(worlds):
    for result in worlds[2]:
        assert result["error"].startswith("vocab_group: rank 1 cannot take part: ValueError: hidden: expected last dim")


@pytest.mark.parametrize("name", ["labels", "ignore_index", "vocab_size"])
def test_processes_that_disagree_raise_the_same(worlds, name):
    first, second = (result[name] for result in worlds[2])
    assert first == second and first.startswith(f"{name}: expected the same on all ranks of vocab_group, got ")
