"""What a model has to read for each branch -> rows of tokens, with every trunk read once.

A batch is a rectangle of rows, because that is what a model takes. Where attention costs what its mask lets through,
one row holds all and nothing is padded. A dense mask costs the square of a row's length, so there it is several.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from disc_kernels import SharedPrefixLayout
from disc_kernels.shared_prefix import can_share
from disc_kernels.shared_prefix.choice import DENSE_PAIR, PAIRS_PER_HIDDEN
from disc_train.packing.branch_inputs import Reading

# Times D, how many keys a token has to have before attention over a dense mask costs what a layer's matrices do.
DENSE_KEYS_PER_HIDDEN = PAIRS_PER_HIDDEN // DENSE_PAIR
CAPACITY_STEP = 1.25  # between the capacities that are tried


@dataclass(frozen=True)
class RowRule:
    """How the rows of one model are made.

    Args:
        share: a trunk may be read once for many branches. Otherwise every sequence gets a row of its own.
        dense_hidden_size: the model's D, if its attention runs over a dense mask; None: all in one row.
    """

    share: bool = True
    dense_hidden_size: int | None = None


ONE_ROW = RowRule()


def row_rule(model: PreTrainedModel) -> RowRule:
    """The rule for a model that `disc_train.models.causal_lm.use_attention` has prepared."""
    if not can_share(model.config):
        return RowRule(share=False)
    dense = model.config._attn_implementation in ("sdpa", "eager")  # transformers has no public name for it
    return dense_rows(model) if dense else ONE_ROW


def dense_rows(model: PreTrainedModel) -> RowRule:
    """The rule for a model whose attention runs over dense masks."""
    return RowRule(dense_hidden_size=model.config.get_text_config().hidden_size)


class PackedRows(NamedTuple):
    input_ids: Tensor  # [rows, L] int64; 0 where padded
    layout: SharedPrefixLayout  # rows * L tokens, row after row; at a row's end is its padding, in trees of its own or,
    # where every row is one sequence, as more of that: what is behind them no tokens see, so causal attention will do
    positions: list[np.ndarray]  # [length] int64 a reading: where in the flattened rows its tokens are
    tokens: int  # that are not padding


def arrange(readings: Sequence[Reading], rule: RowRule) -> PackedRows:
    """Put readings into rows; those with equal trunks share one, as long as they are in one row.

    With a dense mask, readings go into the row that they lengthen least and that still has room, the longest first
    (first-fit decreasing). The row's capacity is the one, from the longest reading upwards, that makes the batch
    cheapest: short rows have less attention, long ones less padding and fewer copies of a trunk.
    """
    trunks: dict[bytes, int] = {}
    trees = [trunks.setdefault(reading.trunk.tobytes(), len(trunks)) for reading in readings]
    if not rule.share:
        rows = [_Row() for _ in trunks]
        for number, tree in enumerate(trees):
            rows[tree].add(number, tree, readings[number])
    elif rule.dense_hidden_size is None:
        rows = _fill(range(len(readings)), readings, trees, sum(reading.length for reading in readings))
    else:
        rows = _cheapest(readings, trees, DENSE_KEYS_PER_HIDDEN * rule.dense_hidden_size)
    return _lay_out(rows, readings)


@dataclass
class _Row:
    length: int = 0
    trunks: dict[int, int] = field(default_factory=dict)  # tree -> tokens of its trunk that are in this row
    members: dict[int, list[int]] = field(default_factory=dict)  # tree -> readings

    def growth(self, tree: int, reading: Reading) -> int:
        return max(0, reading.shared - self.trunks.get(tree, 0)) + len(reading.own)

    def add(self, number: int, tree: int, reading: Reading) -> None:
        self.length += self.growth(tree, reading)
        self.trunks[tree] = max(reading.shared, self.trunks.get(tree, 0))
        self.members.setdefault(tree, []).append(number)


def _cheapest(readings: Sequence[Reading], trees: Sequence[int], keys_per_token: int) -> list[_Row]:
    """The filling whose rows of length L have the least rows * L * (L + keys_per_token)."""
    longest_of: dict[int, int] = {}
    for reading, tree in zip(readings, trees, strict=True):
        longest_of[tree] = max(reading.length, longest_of.get(tree, 0))
    # A tree's readings follow each other, so that it is divided among rows only where it has to be.
    order = sorted(range(len(readings)), key=lambda i: (-longest_of[trees[i]], trees[i], -readings[i].length))
    everything = sum(reading.length for reading in readings)
    least_tokens = _fill(order, readings, trees, everything)[0].length
    best: tuple[int, list[_Row]] | None = None
    capacity = max(longest_of.values())
    while True:
        rows = _fill(order, readings, trees, capacity)
        length = max(row.length for row in rows)
        cost = len(rows) * length * (length + keys_per_token)
        if best is None or cost < best[0]:
            best = cost, rows
        # From here on, attention alone makes rows dearer than the best, even if nothing is padded or read twice.
        if len(rows) == 1 or least_tokens * (length + keys_per_token) >= best[0]:
            return best[1]
        capacity = int(capacity * CAPACITY_STEP) + 1


def _fill(order: Sequence[int], readings: Sequence[Reading], trees: Sequence[int], capacity: int) -> list[_Row]:
    rows: list[_Row] = []
    for number in order:
        tree, reading = trees[number], readings[number]
        growths = [(row.growth(tree, reading), row) for row in rows]
        fitting = [(growth, row) for growth, row in growths if row.length + growth <= capacity]
        if not fitting:
            rows.append(_Row())
        row = min(fitting, key=lambda pair: pair[0])[1] if fitting else rows[-1]
        row.add(number, tree, reading)
    return rows


def _lay_out(rows: Sequence[_Row], readings: Sequence[Reading]) -> PackedRows:
    length = max(row.length for row in rows)
    longest = max(reading.length for reading in readings)
    alone = all(len(row.trunks) == 1 for row in rows) and not any(len(reading.own) for reading in readings)
    ids = np.zeros(len(rows) * length, dtype=np.int64)
    trees: list[tuple[int, list[tuple[int, int]]]] = []
    positions: dict[int, np.ndarray] = {}
    for row_number, row in enumerate(rows):
        end = row_number * length
        for tree, members in row.members.items():
            trunk, start, branches = row.trunks[tree], end, []
            end += trunk
            ids[start:end] = readings[members[0]].trunk[:trunk]
            for member in members:
                _, shared, own = readings[member]
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
        [positions[number] for number in range(len(readings))],
        sum(row.length for row in rows),
    )
