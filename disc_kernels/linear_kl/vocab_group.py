"""A vocabulary divided over ranks: what they send each other while a call runs.

Each rank holds a shard of both heads and all hidden states. Bytes a rank hands to collectives, with numbers of 4 bytes
(8 for float64), `M` rows and `D` student hidden entries a row:

    4 M numbers     gathered, a chunk at a time: each model's maximum and sum over the shard
    1 M             added up, a chunk at a time: the mean slope, for the gradient of reverse KL and JSD only
    1 or 3 M        added up, once: divergence, and with statistics both entropies
    D M             added up, a chunk at a time while the weight's gradient is multiplied: the hidden gradient, where it
                    is asked for, before it is rounded to its dtype

So at most 8 numbers a row besides the hidden gradient. With the normalisers of the whole vocabulary each statistic is a
plain sum over entries, as accurate as on one rank, and forward KL takes no more passes over the logits. Gradients of
weights and biases stay where they are. What the call is, `agreement.py` compares before.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from disc_kernels.linear_kl.problem import Problem, SuffixKLStats
from disc_kernels.linear_kl.vocab_parallel import merge_normalisers


@dataclass(frozen=True)
class VocabGroup:
    """The ranks that share a vocabulary."""

    group: dist.ProcessGroup

    @property
    def ranks(self) -> int:
        return self.group.size()

    def whole_normalisers(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Each rank's `part` [4, R] (see shard_rows_torch.py) -> (`whole` [4, R], agreement [R])."""
        gathered = part.new_empty(self.ranks, *part.shape)
        dist.all_gather(list(gathered), part, group=self.group)
        maximum, total = gathered[:, 0::2], gathered[:, 1::2].abs()  # [ranks, 2, R]
        whole = torch.empty_like(part)
        whole[0::2], whole_sum, _ = merge_normalisers(maximum, total, 0)
        whole[1::2] = whole_sum.log()
        # The largest logit of all is that of the first rank whose maximum is the largest.
        student_rank, teacher_rank = maximum.argmax(0)
        same_entry = gathered[:, 1].gather(0, student_rank.unsqueeze(0)).squeeze(0) > 0
        return whole, ((student_rank == teacher_rank) & same_entry).to(part.dtype)

    def add(self, x: Tensor) -> None:
        """Sum over the ranks, in place."""
        dist.all_reduce(x, group=self.group)

    def add_shares(self, stats: SuffixKLStats, statistics: bool) -> None:
        """The same for what `ShardedRows` says of all rows; only where `statistics` for more than the divergence."""
        summed = stats[:3] if statistics else stats[:1]
        total = torch.stack(summed)
        self.add(total)
        for x, of_all in zip(summed, total, strict=True):
            x.copy_(of_all)

    def start_adding(self, x: Tensor) -> dist.Work:
        """The same while other work goes on; `x` may be used after the `wait()` of what is returned."""
        work = dist.all_reduce(x, group=self.group, async_op=True)
        assert work is not None
        return work


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
