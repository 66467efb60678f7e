"""A vocabulary divided over ranks: what they send each other while a call runs.

Each rank holds a shard of both heads and all hidden states. Bytes a rank hands to collectives, with numbers of 4 bytes
(8 for float64), `M` rows and `D` student hidden entries a row:

    fused_suffix_kl
        4 M numbers     gathered, a chunk at a time: each model's maximum and sum over the shard
        1 M             added up, a chunk at a time: the mean slope, for the gradient of reverse KL and JSD only
        1 or 3 M        added up, once: divergence, and with statistics both entropies
        D M             added up, a chunk at a time: the hidden gradient, where it is asked for, before it is rounded
    teacher_summary
        4 M             gathered, a chunk at a time: maximum, log-sum, entropy and expected bias of the shard's softmax
        D M             added up, a chunk at a time: the embedding
    expected_embedding_kl
        4 M             gathered, as above, of the student's softmax
        D M             added up, a chunk at a time: the hidden gradient, where it is asked for, before it is rounded

So at most 8 numbers a row besides the hidden gradient, and that goes on while the next chunk is multiplied. Gradients
of weights and biases stay where they are. What the call is, `agreement.py` compares before.

With the normalisers of the whole vocabulary each statistic of `fused_suffix_kl` is a plain sum over entries, as
accurate as on one rank, and forward KL takes no more passes over the logits. Softmaxes of the frozen-head form merge by
the shares of their shards: none of their terms is negative, so nothing cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from disc_kernels.linear_kl.inputs import Problem, SuffixKLStats
from disc_kernels.linear_kl.ranks.normalisers import expectation, merge_normalisers


@contextmanager
def with_all_ranks() -> Iterator[None]:
    """Around a collective: say what it means that it failed, which `torch.distributed` cannot know."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "vocab_group: expected every rank of the group to make this call, and the same backwards, within the "
            f"group's timeout; one did not, or is gone: {error}"
        ) from error


@dataclass(frozen=True)
class VocabGroup:
    """The ranks that share a vocabulary."""

    group: dist.ProcessGroup

    @property
    def ranks(self) -> int:
        return self.group.size()

    def whole_normalisers(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Each rank's `part` [4, R] (see shard_rows_torch.py) -> (`whole` [4, R], agreement [R])."""
        gathered = self._start_gathering(part)()
        maximum, total = gathered[:, 0::2], gathered[:, 1::2].abs()  # [ranks, 2, R]
        whole = torch.empty_like(part)
        whole[0::2], whole_sum, _ = merge_normalisers(maximum, total, 0)
        whole[1::2] = whole_sum.log()
        # The largest logit of all is that of the first rank whose maximum is the largest.
        student_rank, teacher_rank = maximum.argmax(0)
        same_entry = gathered[:, 1].gather(0, student_rank.unsqueeze(0)).squeeze(0) > 0
        return whole, ((student_rank == teacher_rank) & same_entry).to(part.dtype)

    def start_merging(self, numbers: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """Softmaxes of the shards -> that of the whole, while other work goes on.

        Args:
            numbers: `[4, R]`, a row's maximum, log of the sum above it, entropy and expected bias over this shard; a
                maximum of -inf where the shard has no possible entry.

        Returns:
            What waits and gives (the same of the whole vocabulary, `[4, R]`; this shard's share of it, `[R]`); NaN
            where no shard has a possible entry.
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

    def _start_gathering(self, part: Tensor) -> Callable[[], Tensor]:
        """What waits and gives every rank's `part`, [ranks, *part.shape]."""
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
        """The same for what `ShardedRows` says of all rows; only where `statistics` for more than the divergence."""
        summed = stats[:3] if statistics else stats[:1]
        total = torch.stack(summed)
        self.add(total)
        for x, of_all in zip(summed, total, strict=True):
            x.copy_(of_all)


class Adding:
    """Sums over the ranks, in place, behind other work: each is waited for when the next one starts.

    With no group there is nothing to add and nothing to wait for.
    """

    def __init__(self, group: VocabGroup | None):
        self.group = group
        self.pending: tuple[dist.Work, Callable[[], None]] | None = None

    def start(self, x: Tensor, then: Callable[[], None]) -> None:
        """Add `x` up, and call `then` when its sum is there."""
        if self.group is None:
            then()
            return
        with with_all_ranks():
            work = dist.all_reduce(x, group=self.group.group, async_op=True)
        self.finish()
        assert work is not None
        self.pending = work, then

    def finish(self) -> None:
        """Wait for the last one."""
        if self.pending is not None:
            (work, then), self.pending = self.pending, None
            with with_all_ranks():
                work.wait()
            then()


@dataclass(frozen=True)
class ShardedRows:
    """Row functions of a shard with `compare_rows` of the whole: what `rows_torch.py` is to one rank."""

    backend: ModuleType  # shard_rows_torch or shard_rows_triton
    group: VocabGroup

    def compare_rows(
        self,
        student: Tensor,  # [R, V], V may be 0
        teacher: Tensor,  # [U, V]
        teacher_slot: Tensor | None,  # [R] int64
        problem: Problem,
        block_rows: int,
        out: SuffixKLStats,  # as in rows_torch.py, but divergence and entropies are the shard's share
        *,
        row_scale: Tensor | None,  # [R]
        gradient: Tensor | None,  # [R, V]
        statistics: bool,
    ) -> None:
        pair, part = (student, teacher, teacher_slot, problem, block_rows), student.new_empty(4, student.shape[0])
        here = problem.vocab_size > 0
        if here:
            self.backend.normalise_shard(*pair, part, statistics=statistics)
        else:
            part[0::2], part[1::2] = -torch.inf, 0
        whole, out.agreement[:] = self.group.whole_normalisers(part)
        centred = gradient is not None and problem.divergence != "forward_kl"
        mean_slope = torch.zeros_like(part[0]) if centred else None
        if here:
            at_once = None if centred else gradient
            self.backend.compare_shard(
                *pair, whole, out, row_scale=row_scale, gradient=at_once, mean_slope=mean_slope, statistics=statistics
            )
        else:
            for share in out[:3]:
                share.zero_()
        if mean_slope is not None:
            self.group.add(mean_slope)
            if here:
                self.backend.centred_gradient(*pair, whole, mean_slope, row_scale=row_scale, gradient=gradient)
