"""Draw examples whose contexts begin alike in one step, so that the teacher reads once what they have in common."""

import random
from collections.abc import Sequence
from itertools import chain, pairwise

from disc_train.data.dataset import ExampleDataset
from disc_train.data.example import Example, Ids
from disc_train.packing.branch_inputs import MIN_SHARED_TOKENS, count_common


def group_contexts(contexts: Sequence[Ids]) -> list[int]:
    """Return the group of each context: sorted neighbours that have half of the shorter one in common share a group."""
    groups, group = [0] * len(contexts), 0
    order = sorted(range(len(contexts)), key=lambda i: contexts[i].tobytes())
    for before, i in pairwise(order):
        half = min(len(contexts[before]), len(contexts[i])) / 2
        group += count_common(contexts[before], contexts[i]) < max(MIN_SHARED_TOKENS, half)
        groups[i] = group
    return groups


def are_shared(groups: Sequence[int]) -> bool:
    """Return whether any group has several members."""
    return len(set(groups)) < len(groups)


def draw_together(drawn: Sequence[int], groups: Sequence[int], step: int) -> list[int]:
    """Put examples of one group into as few steps of `step` examples as may be, and keep the order at random.

    Groups are divided into blocks of a step's size; what is left of each follows one another and fills the other steps.
    Steps come in the order in which their first examples were drawn. So without groups, and with one group of all, the
    order is that of `drawn`, a permutation of the examples' indices.
    """
    place = {index: number for number, index in enumerate(drawn)}
    members: dict[int, list[int]] = {}
    for index in drawn:
        members.setdefault(groups[index], []).append(index)
    full: list[list[int]] = []
    remainders: list[list[int]] = []
    for group in members.values():
        blocks = [group[first : first + step] for first in range(0, len(group), step)]
        full += [block for block in blocks if len(block) == step]
        remainders += [block for block in blocks if len(block) < step]
    # By the lowest index, whose place is as random whatever the size: the first place would put large ones first.
    rest = list(chain(*sorted(remainders, key=lambda block: place[min(block)])))
    filled = [rest[first : first + step] for first in range(0, len(rest), step)]
    last = filled.pop() if filled and len(filled[-1]) < step else []
    return [*chain(*sorted(full + filled, key=lambda block: place[block[0]])), *last]


def sample_batches(dataset: ExampleDataset, batch_size: int, examples: int = 256) -> list[list[Example]]:
    """Draw batches of `examples` in all, at least one, as a run does; the same ones at every call."""
    count = min(len(dataset), batch_size * max(1, examples // batch_size))
    groups = group_contexts(dataset.contexts())
    if are_shared(groups):
        everything = random.Random(0).sample(range(len(dataset)), len(dataset))
        drawn = draw_together(everything, groups, batch_size)[:count]
    else:
        drawn = random.Random(0).sample(range(len(dataset)), count)
    return [[dataset[i] for i in drawn[first : first + batch_size]] for first in range(0, count, batch_size)]
