"""Decide what a model reads for each branch: first tokens of a trunk that others may share, then tokens of its own."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from disc_train.data.example import NO_IDS, Context, Ids

MIN_SHARED_TOKENS = 16  # tokens in common that are worth a trunk; below, masks and gathered keys cost about as much


class BranchInput(NamedTuple):
    """Name the tokens read for one branch: the first `shared` of a trunk, then its own. Equal trunks are one tree."""

    trunk: Ids
    shared: int
    own: Ids

    @property
    def length(self) -> int:
        return self.shared + len(self.own)

    def tokens(self) -> Ids:
        return np.concatenate([self.trunk[: self.shared], self.own])


def make_branch_inputs(branches: Iterable[tuple[Ids, Context, Ids]], share: bool) -> list[BranchInput]:
    """Decide what a model reads for branches, given as (trunk, context, target): no more than it must.

    The last token of a target is only ever predicted, so it is not read. With `share` the model can read a trunk once
    for several branches.
    """
    inputs = [_branch_input(trunk, context, target, share) for trunk, context, target in branches]
    return _share_first_tokens(inputs) if share else inputs


def _branch_input(trunk: Ids, context: Context, target: Ids, share: bool) -> BranchInput:
    own = np.concatenate([context.lead, target[:-1]])
    end = context.attach + len(own)
    if np.array_equal(own, trunk[context.attach : end]):  # the branch goes on as its trunk does
        return BranchInput(trunk, end, NO_IDS)
    if context.attach and share:
        return BranchInput(trunk, context.attach, own)
    return BranchInput(np.concatenate([trunk[: context.attach], own]), end, NO_IDS)  # nothing in common with others


def _share_first_tokens(inputs: Sequence[BranchInput]) -> list[BranchInput]:
    """Give a common trunk to sequences that begin alike and share nothing yet, such as contexts with one instruction.

    Of all ways to divide such sequences, sorted, into groups of neighbours with one trunk each, it takes one that reads
    the fewest tokens.
    """
    trunks = [branch.trunk.tobytes() for branch in inputs]
    trees = Counter(trunks)
    alone = {i: branch.tokens() for i, branch in enumerate(inputs) if trees[trunks[i]] == 1}
    order = sorted(alone, key=lambda i: alone[i].tolist())
    common = [count_common(alone[one], alone[next_]) for one, next_ in itertools.pairwise(order)]
    shared = list(inputs)
    for first, last, length in _groups(common):
        for i in order[first : last + 1]:
            shared[i] = BranchInput(alone[i][:length], length, alone[i][length:])
    return shared


def count_common(one: Ids, other: Ids) -> int:
    """Count the first tokens that are equal."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length


def _groups(common: Sequence[int]) -> list[tuple[int, int, int]]:
    """Choose groups (first, last, tokens in common) of sequences of which neighbours have `common` tokens in common.

    best[n] are the most tokens saved on the first n + 1 sequences; a group of k that have c in common saves (k - 1) c.
    """
    best, begins = [0], [0]
    for last in range(1, len(common) + 1):
        best.append(best[-1])
        begins.append(last)
        length = common[last - 1]
        for first in range(last - 1, -1, -1):
            length = min(length, common[first])
            if length < MIN_SHARED_TOKENS:
                break
            saved = (best[first - 1] if first else 0) + (last - first) * length
            if saved > best[last]:
                best[last], begins[last] = saved, first

    groups = []
    last = len(common)
    while last > 0:
        first = begins[last]
        if first < last:
            groups.append((first, last, min(common[first:last])))
        last = first - 1
    return groups
