"""Rows: full where they are several, and as many as make the batch cheapest."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disc_train.data.example import NO_IDS
from disc_train.packing.branch_inputs import BranchInput
from disc_train.packing.rows import DENSE_KEYS_PER_HIDDEN, RowRule, arrange

LARGE, SMALL = RowRule(dense_hidden_size=1_000_000), RowRule(dense_hidden_size=1)


def _text(length, first=0):
    return np.arange(first, first + length, dtype=np.int32)


def _sequences(*lengths):
    """Readings that have nothing in common."""
    return [BranchInput(_text(length, 1_000 * i), length, NO_IDS) for i, length in enumerate(lengths)]


def _branches(trunk, *lengths):
    return [BranchInput(_text(trunk), trunk, _text(length, 1_000 * i)) for i, length in enumerate(lengths, start=1)]


def _shape(branches, rule):
    return tuple(arrange(branches, rule).input_ids.shape)


def test_padding_has_no_position_beyond_the_longest_text():
    """Learned positions end somewhere, and longrope changes with the largest."""
    first, second, last = _sequences(8, 28, 8)
    trees = [*_branches(21, 35, 18, 19, 22, 38), *_branches(29, 12, 11, 23, 25, 13, 14)]
    branches = [first, second, *trees, last]
    rows = arrange(branches, RowRule(dense_hidden_size=100))
    assert rows.input_ids.shape == (5, 93)
    assert sum(position[0] >= 4 * 93 for position in rows.positions) == 1  # the last row has 8 tokens and 85 places
    assert int(rows.layout.position_ids.max()) == 21 + 38 - 1


def test_short_rows_for_small_models_and_long_ones_where_attention_hardly_counts():
    branches = _sequences(60, 50, 40, 30, 20)
    assert _shape(branches, RowRule()) == (1, 200)
    assert _shape(branches, SMALL) == (4, 60)  # 60, 50, 40 + 20, 30
    assert _shape(branches, LARGE) in {(1, 200), (2, 100)}  # nothing is padded


def test_the_filling_is_the_cheapest_of_all_capacities():
    lengths = [61, 50, 47, 33, 30, 22, 18, 11, 7, 5]
    for hidden_size in (1, 16, 64, 4096):
        rows, length = _shape(_sequences(*lengths), RowRule(dense_hidden_size=hidden_size))
        keys = DENSE_KEYS_PER_HIDDEN * hidden_size
        bound = min(
            rows_ * length_ * (length_ + keys)  # no padding at all
            for rows_, length_ in ((-(-sum(lengths) // n), n) for n in range(61, 300))
        )
        assert rows * length * (length + keys) <= 1.3 * bound


def test_a_header_is_read_again_where_that_costs_less_than_one_long_row():
    branches = _branches(10, *[30] * 20)
    assert _shape(branches, LARGE) == (1, 10 + 20 * 30)
    rows, length = _shape(branches, SMALL)
    assert rows > 5 and length < 200
    layout = arrange(branches, SMALL).layout
    assert int((layout.position_ids == 0).sum()) == rows


def test_a_long_trunk_is_not_repeated():
    assert _shape(_branches(400, 20, 20, 20, 20, 20), RowRule(dense_hidden_size=512)) == (1, 500)


def test_trees_stay_in_one_row_where_they_can():
    """Two documents with a footer: rows of one document each, nothing is read twice."""
    first, second = (
        [BranchInput(_text(50, start), 30 + i, _text(9, 10_000 + 100 * start + i)) for i in range(3)]
        for start in (0, 500)
    )
    arranged = arrange([*first, *second], SMALL)
    assert tuple(arranged.input_ids.shape) == (2, 32 + 27)
    assert arranged.tokens == 2 * 59


def test_without_sharing_every_sequence_has_a_row():
    arranged = arrange([*_sequences(3, 5), *_sequences(3)], RowRule(share=False))
    assert arranged.input_ids.tolist() == [[0, 1, 2, 0, 0], [1000, 1001, 1002, 1003, 1004]]  # the third is the first
    assert arranged.layout.tree_id.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert arranged.tokens == 8


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.sampled_from([1, 30, 1000]))
def test_no_two_rows_could_be_one(lengths, hidden_size):
    arranged = arrange(_sequences(*lengths), RowRule(dense_hidden_size=hidden_size))
    assert [len(positions) for positions in arranged.positions] == lengths
    assert arranged.tokens == sum(lengths)
    rows, length = arranged.input_ids.shape
    filled = sorted(np.bincount(np.concatenate(arranged.positions) // length))
    assert rows == 1 or filled[0] + filled[1] > length


def test_many_branches_take_little_time():
    """A step of 64 documents with 16 suffixes each."""
    branches = _sequences(*np.random.default_rng(0).integers(5, 60, 1_024).tolist())
    start = time.process_time()
    rows, length = _shape(branches, RowRule(dense_hidden_size=128))
    assert time.process_time() - start < 5  # it takes about 0.3 s
    assert sum(branch.length for branch in branches) / (rows * length) > 0.95


@pytest.mark.parametrize("hidden_size", [1, 1024])
def test_one_branch(hidden_size):
    assert _shape(_sequences(7), RowRule(dense_hidden_size=hidden_size)) == (1, 7)
