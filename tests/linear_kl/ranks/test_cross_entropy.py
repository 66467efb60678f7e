"""Cross-entropy and top-k divergences with a head that two processes divide: what one process has."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from disc_kernels import LogitTransform, fused_cross_entropy, fused_topk_kl
from tests.linear_kl.ranks import world

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


# The second of two shards has no entry that is compared in the last case.
TOPK = {
    "bucket": {"divergence": "forward_kl"},
    "renormalise": {"divergence": "jsd", "tail": "renormalise", "reduction": "none"},
    "softcap": {"divergence": "reverse_kl", "student_transform": LogitTransform(softcap=3.0)},
    "one shard": {"divergence": "jsd", "vocab_size": 18},
}


def topk(rows: slice, options: dict[str, Any], **group: Any) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(3)
    hidden, weight = torch.randn(6, 8, dtype=torch.float64), torch.randn(53, 8, dtype=torch.float64)
    options = {"vocab_size": 50, **options, **group}
    logprobs, ids = torch.randn(6, options["vocab_size"]).log_softmax(-1).topk(4)
    logprobs[1, 2:], ids[1, 2:] = -torch.inf, -7
    hidden, weight = hidden.requires_grad_(), weight[rows].clone().requires_grad_()
    loss = fused_topk_kl(hidden, weight, ids, logprobs, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (hidden, weight))


def compute(rank: int, ranks: int, device: str) -> dict[str, Any]:
    rows = slice(FIRST) if rank == 0 else slice(FIRST, None)
    results: dict[str, Any] = {}
    for reduction in ("mean", "none"):
        results[reduction] = call(rows, reduction=reduction, vocab_group=dist.group.WORLD)
    results |= {name: topk(rows, options, vocab_group=dist.group.WORLD) for name, options in TOPK.items()}
    # Only all ranks together know how many entries there are.
    hidden, head, ids = torch.zeros(1, 8), torch.zeros(5, 8), torch.tensor([[10]])
    failed = partial(world.error_of, fused_topk_kl, hidden, head, ids, vocab_group=dist.group.WORLD)
    results["outside"] = failed(torch.zeros(1, 1))
    results["topk_logprobs"] = failed(torch.zeros(1, 1, dtype=(torch.float32, torch.float64)[rank]))
    hidden, failed = torch.zeros(2, 8), partial(world.error_of, fused_cross_entropy, vocab_group=dist.group.WORLD)
    # What one rank alone finds wrong.
    results["error"] = failed(hidden, head if rank == 0 else torch.zeros(5, 7), torch.zeros(2).long())
    results["labels"] = failed(hidden, head, torch.tensor([1, 2 + rank]))
    results["ignore_index"] = failed(hidden, head, torch.tensor([1, 2]), ignore_index=-rank)
    results["vocab_size"] = failed(hidden, head, torch.tensor([1, 2]), vocab_size=9 + rank)
    return results


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_processes_are_one(worlds, reduction):
    (loss, hidden, first), (_, other_hidden, second) = (result[reduction] for result in worlds[2])
    assert torch.equal(hidden, other_hidden)
    got_all = loss, hidden, torch.cat([first, second])
    for got, want in zip(got_all, call(slice(None), reduction=reduction), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", TOPK)
def test_the_top_k_of_two_processes_is_that_of_one(worlds, name):
    (loss, hidden, first), (_, other_hidden, second) = (result[name] for result in worlds[2])
    assert torch.equal(hidden, other_hidden)
    for got, want in zip((loss, hidden, torch.cat([first, second])), topk(slice(None), TOPK[name]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    for result in worlds[2]:
        assert result["outside"].startswith("ValueError: topk_ids: expected entries from 0 to 9, got 10")


def test_what_one_process_finds_wrong_all_raise(worlds):
    begins = "ValueError: vocab_group: rank 1 cannot take part: ValueError: hidden: expected last dim"
    for result in worlds[2]:
        assert result["error"].startswith(begins)


@pytest.mark.parametrize("name", ["labels", "ignore_index", "vocab_size", "topk_logprobs"])
def test_processes_that_disagree_raise_the_same(worlds, name):
    first, second = (result[name] for result in worlds[2])
    assert first == second
    assert first.startswith(f"ValueError: {name}: expected the same on all ranks of vocab_group, got ")
