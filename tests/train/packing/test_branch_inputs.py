"""What is read for each branch: beginnings in common once, in the grouping that reads the fewest tokens."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from disc_train.data.example import Context
from disc_train.packing.branch_inputs import MIN_SHARED_TOKENS, make_branch_inputs


def _ids(*tokens):
    return np.array(tokens, dtype=np.int32)


def _records(*contexts):
    """Branches of a target each, after contexts given as lists of tokens."""
    return [(_ids(*context), Context(len(context)), _ids(-1, -2 - i, 0)) for i, context in enumerate(contexts)]


def _tokens(inputs):
    """How many tokens are read, and the shared part of each branch."""
    trunks = {}
    for branch in inputs:
        key = branch.trunk.tobytes()
        trunks[key] = max(branch.shared, trunks.get(key, 0))
    return sum(trunks.values()) + sum(len(branch.own) for branch in inputs), [r.shared for r in inputs]


INSTRUCTION, OTHER = list(range(100, 200)), list(range(300, 400))


def test_instructions_before_different_inputs_are_read_once():
    records = _records([*INSTRUCTION, 1, 2], [*OTHER, 3], [*INSTRUCTION, 1, 5, 6], [9], [*INSTRUCTION, 7], [*OTHER, 8])
    tokens, shared = _tokens(make_branch_inputs(records, share=True))
    assert shared == [100, 100, 100, 1, 100, 100]
    assert tokens == 100 + 4 + 5 + 3 + 100 + 3 + 3 + 3


def test_a_model_that_cannot_share_reads_each():
    records = _records([*INSTRUCTION, 1], [*INSTRUCTION, 2])
    assert _tokens(make_branch_inputs(records, share=False)) == (2 * 103, [103, 103])


def test_a_few_tokens_in_common_are_no_trunk():
    few = list(range(MIN_SHARED_TOKENS - 1))
    assert _tokens(make_branch_inputs(_records([*few, 50], [*few, 51]), share=True))[1] == [16, 16]


def test_a_tree_of_several_branches_is_left_as_it_is():
    records = _records(INSTRUCTION, INSTRUCTION, [*INSTRUCTION, 1])
    assert _tokens(make_branch_inputs(records, share=True))[1] == [100, 100, 101]


def test_one_sequence_may_begin_another():
    inputs = make_branch_inputs([(_ids(*range(40)), Context(n), _ids(n, 0)) for n in (20, 30)], share=True)
    assert _tokens(inputs) == (30 + 1, [21, 31])


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.integers(0, 1), max_size=3), min_size=1, max_size=6, unique_by=tuple))
def test_no_grouping_of_neighbours_reads_fewer_tokens(digits):
    """Contexts as paths in a tree, each step of it several tokens; against all groupings of neighbours in order."""
    contexts = [[*np.repeat(path, MIN_SHARED_TOKENS).tolist(), 7] for path in digits]
    records = _records(*contexts)
    sequences = [[*context, *target[:-1].tolist()] for context, (_, _, target) in zip(contexts, records, strict=True)]
    inputs = make_branch_inputs(records, share=True)
    assert [branch.tokens().tolist() for branch in inputs] == sequences

    def cost(group):
        equal = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*group, strict=False))
        common = len(list(equal)) if len(group) > 1 else 0
        return common + sum(len(sequence) - common for sequence in group)

    def groupings(items):
        if not items:
            yield []
        for size in range(1, len(items) + 1):
            for grouping in groupings(items[size:]):
                yield [items[:size], *grouping]

    assert _tokens(inputs)[0] == min(sum(map(cost, grouping)) for grouping in groupings(sorted(sequences)))


def test_branches_with_a_footer_keep_no_copies_of_their_prefixes():
    trunk, footer = _ids(*range(10_000)), _ids(7, 8)
    inputs = make_branch_inputs([(trunk, Context(n, footer), _ids(1, 2, 3)) for n in (9_000, 9_500)], share=True)
    kept = [branch.own if branch.own.base is None else branch.own.base for branch in inputs]
    assert [array.tolist() for array in kept] == [[7, 8, 1, 2]] * 2
    assert all(branch.trunk is trunk for branch in inputs)
