"""Arrange branch inputs in rows of tokens, with every trunk read once.

A batch is a rectangle of rows, because that is what a model takes. Where attention costs what its mask lets through,
one row holds all and nothing is padded. A dense mask costs the square of a row's length, so there it is several.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from disc_kernels import SharedPrefixLayout
from disc_kernels.shared_prefix import can_share
from disc_kernels.shared_prefix.choice import DENSE_PAIR, PAIRS_PER_HIDDEN
from disc_train.packing.branch_inputs import BranchInput

# Times D, how many keys a token has to have before attention over a dense mask costs what a layer's matrices do.
DENSE_KEYS_PER_HIDDEN = PAIRS_PER_HIDDEN // DENSE_PAIR
CAPACITY_GROWTH = 1.25  # between the capacities that are tried


@dataclass(frozen=True)
class RowRule:
    """Say how the rows of one model are made."""

    share: bool = True  # a trunk may be read once for many branches; else every sequence has a row of its own
    dense_hidden_size: int | None = None  # the model's D, if its attention runs over a dense mask; None: one row


ONE_ROW = RowRule()


def row_rule(model: PreTrainedModel) -> RowRule:
    """Choose the rule for a model that `disc_train.models.causal_lm.use_attention` has prepared."""
    if not can_share(model.config):
        return RowRule(share=False)
    dense = model.config._attn_implementation in ("sdpa", "eager")  # transformers has no public name for it
    return dense_rows(model) if dense else ONE_ROW


def dense_rows(model: PreTrainedModel) -> RowRule:
    """Make the rule for a model whose attention runs over dense masks."""
    return RowRule(dense_hidden_size=model.config.get_text_config().hidden_size)


class PackedRows(NamedTuple):
    """Hold the rows of one model, and where each branch's tokens are in them."""

    input_ids: Tensor  # [rows, L] int64; 0 where padded
    layout: SharedPrefixLayout  # rows * L tokens, row after row; at a row's end is its padding, in trees of its own or,
    # where every row is one sequence, as more of that: what is after them no tokens see, so causal attention will do
    positions: list[np.ndarray]  # [length] int64 for each branch: where in the flattened rows its tokens are
    tokens: int  # that are not padding

    def ends(self, counts: Iterable[int]) -> np.ndarray:
        """Return where the last `counts[i]` tokens read for each branch are, which predict its target: [M] int64."""
        return np.concatenate([at[-count:] for at, count in zip(self.positions, counts, strict=True)])


def arrange(inputs: Sequence[BranchInput], rule: RowRule) -> PackedRows:
    """Put branches into rows; those with equal trunks share one, as long as they are in one row.

    With a dense mask, branches go into the row that they lengthen least and that still has room, the longest first
    (first-fit decreasing). The row's capacity is the one, from the longest branch upwards, that makes the batch
    cheapest: short rows have less attention, long ones less padding and fewer copies of a trunk.
    """
    trunks: dict[bytes, int] = {}
    trees = [trunks.setdefault(branch.trunk.tobytes(), len(trunks)) for branch in inputs]
    if not rule.share:
        rows = [_Row() for _ in trunks]
        for number, tree in enumerate(trees):
            rows[tree].add(number, tree, inputs[number])
    elif rule.dense_hidden_size is None:
        rows = _fill(range(len(inputs)), inputs, trees, sum(branch.length for branch in inputs))
    else:
        rows = _cheapest(inputs, trees, DENSE_KEYS_PER_HIDDEN * rule.dense_hidden_size)
    return _lay_out(rows, inputs)


@dataclass
class _Row:
    length: int = 0
    trunks: dict[int, int] = field(default_factory=dict)  # tree -> tokens of its trunk that are in this row
    members: dict[int, list[int]] = field(default_factory=dict)  # tree -> numbers of branches

    def growth(self, tree: int, branch: BranchInput) -> int:
        return max(0, branch.shared - self.trunks.get(tree, 0)) + len(branch.own)

    def add(self, number: int, tree: int, branch: BranchInput) -> None:
        self.length += self.growth(tree, branch)
        self.trunks[tree] = max(branch.shared, self.trunks.get(tree, 0))
        self.members.setdefault(tree, []).append(number)


def _cheapest(inputs: Sequence[BranchInput], trees: Sequence[int], keys_per_token: int) -> list[_Row]:
    """Find the rows, of length L each, with the least rows * L * (L + keys_per_token)."""
    longest_of: dict[int, int] = {}
    for branch, tree in zip(inputs, trees, strict=True):
        longest_of[tree] = max(branch.length, longest_of.get(tree, 0))
    # A tree's branches follow each other, so that it is divided among rows only where it has to be.
    order = sorted(range(len(inputs)), key=lambda i: (-longest_of[trees[i]], trees[i], -inputs[i].length))
    everything = sum(branch.length for branch in inputs)
    least_tokens = _fill(order, inputs, trees, everything)[0].length
    best: tuple[int, list[_Row]] | None = None
    capacity = max(longest_of.values())
    while True:
        rows = _fill(order, inputs, trees, capacity)
        length = max(row.length for row in rows)
        cost = len(rows) * length * (length + keys_per_token)
        if best is None or cost < best[0]:
            best = cost, rows
        # From here on, attention alone makes rows dearer than the best, even if nothing is padded or read twice.
        if len(rows) == 1 or least_tokens * (length + keys_per_token) >= best[0]:
            return best[1]
        capacity = int(capacity * CAPACITY_GROWTH) + 1


def _fill(order: Sequence[int], inputs: Sequence[BranchInput], trees: Sequence[int], capacity: int) -> list[_Row]:
    rows: list[_Row] = []
    for number in order:
        tree, branch = trees[number], inputs[number]
        growths = [(row.growth(tree, branch), row) for row in rows]
        fitting = [(growth, row) for growth, row in growths if row.length + growth <= capacity]
        if not fitting:
            rows.append(_Row())
        row = min(fitting, key=lambda pair: pair[0])[1] if fitting else rows[-1]
        row.add(number, tree, branch)
    return rows


def _lay_out(rows: Sequence[_Row], inputs: Sequence[BranchInput]) -> PackedRows:
    length = max(row.length for row in rows)
    longest = max(branch.length for branch in inputs)
    alone = all(len(row.trunks) == 1 for row in rows) and not any(len(branch.own) for branch in inputs)
    ids = np.zeros(len(rows) * length, dtype=np.int64)
    trees: list[tuple[int, list[tuple[int, int]]]] = []
    positions: dict[int, np.ndarray] = {}
    for row_number, row in enumerate(rows):
        end = row_number * length
        for tree, members in row.members.items():
            trunk, start, branches = row.trunks[tree], end, []
            end += trunk
            ids[start:end] = inputs[members[0]].trunk[:trunk]
            for member in members:
                _, shared, own = inputs[member]
                positions[member] = np.concatenate([np.arange(start, start + shared), np.arange(end, end + len(own))])
                if len(own):
                    ids[end : end + len(own)] = own
                    branches.append((shared, len(own)))
                    end += len(own)
            trees.append((length if alone else trunk, branches))
        if not alone:  # in pieces, since no position may be beyond those that the model has
            trees += [(min(longest, length - first), []) for first in range(row.length, length, longest)]
    return PackedRows(
        torch.from_numpy(ids).view(len(rows), length),
        SharedPrefixLayout.from_trees(trees),
        [positions[number] for number in range(len(inputs))],
        sum(row.length for row in rows),
    )
