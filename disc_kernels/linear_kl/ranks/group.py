"""Exchange and merge what ranks that share a vocabulary know of its rows.

Each rank holds a shard of both heads and all hidden states. Numbers (4 bytes, 8 for float64) that it hands to
collectives for M rows, a chunk at a time if nothing else is said:

    fused_topk_kl           K + 2 gathered, 8 bytes each: the student's logits of the top k, maximum and log-sum of
                            the others
    fused_suffix_kl         4 M gathered, each model's maximum and sum over the shard; M added up, the mean score, for
                            the gradient of reverse KL and JSD only; once M (3 M with statistics) of divergences and
                            entropies added up
    frozen-head calls       4 M gathered, maximum, log-sum, entropy and expected bias of the shard's softmax
    all of them             D M added up, the hidden gradient or the embedding, while the next chunk is multiplied

Gradients of weights and biases stay where they are. With the normalisers of the whole vocabulary each statistic of
`fused_suffix_kl` is a plain sum over entries, as accurate as on one rank. Softmaxes of the frozen-head form merge by
the shares of their shards: none of their terms is negative, so nothing cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from disc_kernels.linear_kl.inputs import Problem, SuffixKLStats


@contextmanager
def with_all_ranks() -> Iterator[None]:
    """Explain a collective that failed, which `torch.distributed` cannot: a rank did not make the same call."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "vocab_group: expected every rank of the group to make this call, and the same backwards, within the "
            f"group's timeout; one did not, or is gone: {error}"
        ) from error


@dataclass(frozen=True)
class VocabGroup:
    """Know the ranks that share a vocabulary, and, once they have agreed, where this rank's shard is."""

    group: dist.ProcessGroup
    first: int = 0  # the entry that the shard begins with
    entries: int = 0  # that are compared, of all ranks together

    @property
    def ranks(self) -> int:
        return self.group.size()

    def whole_normalisers(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Merge each rank's `part` [R, 4] (see rows/torch_backend.py) into (normalisers [R, 4], agreement [R])."""
        gathered = self._start_gathering(part)()
        maximum, total = gathered[..., 0::2], gathered[..., 1::2].abs()  # [ranks, R, 2]
        whole = torch.empty_like(part)
        whole[:, 0::2], whole_sum, _ = merge_normalisers(maximum, total, 0)
        whole[:, 1::2] = whole_sum.log()
        # The largest logit of all is that of the first rank whose maximum is the largest.
        student_rank, teacher_rank = maximum.argmax(0).unbind(1)
        same_entry = gathered[..., 1].gather(0, student_rank.unsqueeze(0)).squeeze(0) > 0
        return whole, ((student_rank == teacher_rank) & same_entry).to(part.dtype)

    def start_merging(self, numbers: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """Start to merge the softmaxes of the shards into that of the whole, while other work goes on.

        `numbers` [4, R] are a row's maximum, log of the sum above it, entropy and expected bias over this shard, the
        maximum -inf where no entry is possible. What is returned waits, and gives the same of the whole vocabulary, NaN
        where no shard has a possible entry, and this shard's share of it, [R].
        """
        gathered = self._start_gathering(numbers)

        def merge() -> tuple[Tensor, Tensor]:
            maximum, log_sum, entropy, bias = gathered().unbind(1)  # [ranks, R] each
            top, total, log_share = merge_normalisers(maximum, log_sum.double().exp(), 0)
            entropy, bias = expectation(log_share, entropy - log_share, 0), expectation(log_share, bias, 0)
            rows = top, total.log(), entropy, bias, log_share[self.group.rank()].exp()
            merged = torch.stack([x.to(numbers.dtype) for x in rows]).masked_fill_(top == -torch.inf, torch.nan)
            return merged[:4], merged[4]

        return merge

    def merge_outcomes(self, named: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Merge the student's logits of a top k, see `rows/topk.py`.

        Args:
            named: `[R, K]` float64, -inf where another rank has the entry.
            tail: `[R, 2]` float64, of the shard's other entries the largest logit and the log of the sum above it;
                None where they do not count.

        Returns:
            `named` and `tail` of the whole vocabulary, and `[R]`, the shard's share of the tail.
        """
        part = named if tail is None else torch.cat([named, tail], 1)
        gathered = self._start_gathering(part)()
        named = gathered[..., : named.shape[1]].amax(0)
        if tail is None:
            return named, None, named.new_ones(())
        maximum, log_sum = gathered[..., -2:].unbind(-1)  # [ranks, R] each
        top, total, log_share = merge_normalisers(maximum, log_sum.exp(), 0)
        return named, torch.stack([top, total.log()], 1), log_share[self.group.rank()].exp()

    def _start_gathering(self, part: Tensor) -> Callable[[], Tensor]:
        """Start to gather; return what waits and gives every rank's `part`, [ranks, *part.shape]."""
        gathered = part.new_empty(self.ranks, *part.shape)
        with with_all_ranks():
            work = dist.all_gather(list(gathered), part, group=self.group, async_op=True)

        def wait() -> Tensor:
            with with_all_ranks():
                work.wait()
            return gathered

        return wait

    def add(self, x: Tensor) -> None:
        """Sum over the ranks, in place."""
        with with_all_ranks():
            dist.all_reduce(x, group=self.group)

    def add_shares(self, stats: SuffixKLStats, statistics: bool) -> None:
        """Sum the shares that `compare_shard_rows` gave of all rows; without `statistics` the divergence's only."""
        summed = stats[:3] if statistics else stats[:1]
        total = torch.stack(summed)
        self.add(total)
        for x, of_all in zip(summed, total, strict=True):
            x.copy_(of_all)


class PendingSum:
    """Sum over the ranks, in place, behind other work: each sum is waited for when the next one starts.

    With no group there is nothing to add and nothing to wait for.
    """

    def __init__(self, group: VocabGroup | None):
        self.group = group
        self.pending: tuple[dist.Work, Callable[[], None] | None] | None = None

    def start(self, x: Tensor, then: Callable[[], None] | None = None) -> None:
        """Add `x` up, and call `then` when its sum is there."""
        if self.group is None:
            if then is not None:
                then()
            return
        with with_all_ranks():
            work = dist.all_reduce(x, group=self.group.group, async_op=True)
        self.finish()
        assert work is not None
        self.pending = work, then

    def finish(self) -> None:
        """Wait for the last sum."""
        if self.pending is not None:
            (work, then), self.pending = self.pending, None
            with with_all_ranks():
                work.wait()
            if then is not None:
                then()


def compare_shard_rows(
    backend: ModuleType,  # see rows/torch_backend.py, for the arguments that follow too
    group: VocabGroup,
    student: Tensor,  # [R, V], V may be 0
    teacher: Tensor,  # [U, V]
    inverse_index: Tensor | None,  # [R] int64
    problem: Problem,
    block_rows: int,
    *,
    stats: SuffixKLStats,  # four [R] to fill; divergence and entropies with the shard's share
    statistics: bool,
    row_scale: Tensor | None,  # [R]
    gradient: Tensor | None,  # [R, V]
) -> None:
    """Do what `compare_rows` does over this rank's shard, with the normalisers of the whole vocabulary."""
    # A shard without an entry that is compared has nothing to launch.
    compare = partial(backend.compare_rows, student, teacher, inverse_index, problem, block_rows)
    here = problem.vocab_size > 0
    part = student.new_empty(student.shape[0], 4)
    if here:
        compare(shard_normalisers=part, statistics=statistics)
    else:
        part[:, 0::2], part[:, 1::2] = -torch.inf, 0
    normalisers, stats.agreement[:] = group.whole_normalisers(part)
    compare = partial(compare, normalisers=normalisers, row_scale=row_scale)
    needs_mean = gradient is not None and problem.divergence != "forward_kl"
    mean_score = part.new_zeros(len(part)) if needs_mean else None
    if here:
        at_once = None if needs_mean else gradient
        compare(stats=stats, statistics=statistics, gradient=at_once, mean_score=mean_score)
    else:
        for share in stats[:3]:
            share.zero_()
    if mean_score is not None:
        group.add(mean_score)
        if here:
            compare(gradient=gradient, mean_score=mean_score)


def merge_normalisers(maximum: Tensor, total: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parts' common maximum, their sum above it in float64, and the logarithm of each part's share.

    `maximum` and `total` are a model's, of each part along `dim`: the shards of ranks.
    """
    top = maximum.amax(dim, keepdim=True)
    base = top.masked_fill(top == -torch.inf, 0.0)  # -inf - -inf would be NaN
    log_part = (maximum.double() - base) + total.double().log()
    whole = log_part.exp().sum(dim, keepdim=True)
    log_share = (log_part - whole.log()).masked_fill_(total == 0, -torch.inf)
    return top.squeeze(dim), whole.squeeze(dim), log_share


def expectation(log_share: Tensor, value: Tensor, dim: int) -> Tensor:
    """Sum share times value, where a share of 0 counts nothing."""
    share = log_share.exp()
    return (share * value).masked_fill_(share == 0, 0.0).sum(dim)
