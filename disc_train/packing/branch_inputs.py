"""What a model reads for each branch: a first part of a trunk that it may share with others, and tokens of its own."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from disc_train.data.example import NO_IDS, Ids, Place

MIN_BEGINNING = 16  # tokens in common that are worth a trunk; below, masks and gathered keys cost about as much


class Reading(NamedTuple):
    """The first `shared` tokens of a trunk, then tokens of its own. Readings with equal trunks are one tree."""

    trunk: Ids
    shared: int
    own: Ids

    @property
    def length(self) -> int:
        return self.shared + len(self.own)

    def sequence(self) -> Ids:
        return np.concatenate([self.trunk[: self.shared], self.own])


def read_branches(branches: Iterable[tuple[Ids, Place, Ids]], share: bool) -> list[Reading]:
    """What a model reads for branches, given as (trunk, place, target): no more than it must.

    The last token of a target is only ever predicted, so it is not read.

    Args:
        share: the model can read a trunk once for several branches.
    """
    readings = [_read(trunk, place, target, share) for trunk, place, target in branches]
    return _share_beginnings(readings) if share else readings


def _read(trunk: Ids, place: Place, target: Ids, share: bool) -> Reading:
    own = np.concatenate([place.lead, target[:-1]])
    end = place.attach + len(own)
    if np.array_equal(own, trunk[place.attach : end]):  # the branch goes on as its trunk does
        return Reading(trunk, end, NO_IDS)
    if place.attach and share:
        return Reading(trunk, place.attach, own)
    return Reading(np.concatenate([trunk[: place.attach], own]), end, NO_IDS)  # nothing in common with others


def _share_beginnings(readings: Sequence[Reading]) -> list[Reading]:
    """Give sequences that begin alike and share nothing yet, contexts with the same instructions say, a common trunk.

    Of all ways to divide such sequences, sorted, into groups of neighbours with one trunk each, it takes one that reads
    the fewest tokens.
    """
    trunks = [reading.trunk.tobytes() for reading in readings]
    trees = Counter(trunks)
    alone = {i: reading.sequence() for i, reading in enumerate(readings) if trees[trunks[i]] == 1}
    order = sorted(alone, key=lambda i: alone[i].tolist())
    common = [_common(alone[one], alone[next_]) for one, next_ in itertools.pairwise(order)]
    shared = list(readings)
    for first, last, length in _groups(common):
        for i in order[first : last + 1]:
            shared[i] = Reading(alone[i][:length], length, alone[i][length:])
    return shared


def _common(one: Ids, other: Ids) -> int:
    """How many first tokens are equal."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length


def _groups(common: Sequence[int]) -> list[tuple[int, int, int]]:
    """Groups (first, last, tokens in common) of sequences in order, of which neighbours have `common` tokens in common.

    best[n] are the most tokens saved on the first n + 1 sequences; a group of k that have c in common saves (k - 1) c.
    """
    best, begins = [0], [0]
    for last in range(1, len(common) + 1):
        best.append(best[-1])
        begins.append(last)
        length = common[last - 1]
        for first in range(last - 1, -1, -1):
            length = min(length, common[first])
            if length < MIN_BEGINNING:
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
