"""SharedPrefixLayout: what it holds, and that it refuses every layout that breaks a rule."""

import pickle

import pytest
import torch

from disc_kernels.shared_prefix import SharedPrefixLayout

# A trunk of 3 with two branches, a tree without a trunk, and one without branches.
TREES = [(3, [(2, 2), (3, 1)]), (0, [(0, 2)]), (2, [])]
FIELDS = {
    "tree_id": [0, 0, 0, 0, 0, 0, 1, 1, 2, 2],
    "branch_id": [0, 0, 0, 1, 1, 2, 1, 1, 0, 0],
    "attach": [0, 1, 2, 2, 2, 3, 0, 0, 0, 1],
    "position_ids": [0, 1, 2, 2, 3, 3, 0, 1, 0, 1],
}


def build(**changes: list[int]) -> SharedPrefixLayout:
    return SharedPrefixLayout(**{name: torch.tensor(changes.get(name, FIELDS[name])) for name in FIELDS})


def replaced(name: str, token: int, value: int) -> dict[str, list[int]]:
    return {name: [*FIELDS[name][:token], value, *FIELDS[name][token + 1 :]]}


def values(layout: SharedPrefixLayout) -> dict[str, list[int]]:
    return {name: getattr(layout, name).tolist() for name in FIELDS}


def test_from_trees_lays_out_trunks_and_branches():
    layout = SharedPrefixLayout.from_trees(TREES)
    assert values(layout) == FIELDS
    assert len(layout) == 10
    assert layout.tree_start().tolist() == [0, 0, 0, 0, 0, 0, 6, 6, 8, 8]
    assert layout.segment_start().tolist() == [0, 0, 0, 3, 3, 5, 6, 6, 8, 8]


def test_fields_given_directly_are_accepted():
    assert values(build()) == FIELDS


def test_tree_ids_need_no_order():
    layout = build(tree_id=[7, 7, 7, 7, 7, 7, -1, -1, 4, 4])
    assert layout.tree_start().tolist() == [0, 0, 0, 0, 0, 0, 6, 6, 8, 8]


def test_segments_are_the_trunks_and_branches_that_have_tokens():
    assert build().segments.tolist() == [[0, 3, 0, 0], [3, 2, 0, 2], [5, 1, 0, 3], [6, 2, 6, 0], [8, 2, 8, 0]]


@pytest.mark.parametrize("copied", [lambda layout: pickle.loads(pickle.dumps(layout)), lambda layout: layout])
def test_segments_stay_on_the_host_and_are_known_before_a_layout_leaves_it(copied):
    moved = copied(build()).to("meta")
    assert moved.tree_id.device.type == "meta"
    assert moved.segments.tolist() == build().segments.tolist()
    assert copied(moved).segments.tolist() == build().segments.tolist()


@pytest.mark.parametrize("trees", [[], [(0, [])]])
def test_empty_layouts(trees):
    layout = SharedPrefixLayout.from_trees(trees)
    assert len(layout) == 0
    assert layout.tree_start().shape == (0,)
    assert layout.segments.shape == (0, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tree_id": [0, 0, 0, 0, 0, 0, 1, 1, 0, 0]},
            r"tree_id: token 8: expected a tree's tokens next to each other, got 0",
        ),
        (replaced("branch_id", 0, 2), r"branch_id: token 0: expected 0 \(trunk\) or 1 at the start.*got 2"),
        (replaced("branch_id", 6, -1), r"branch_id: token 6: .*got -1"),
        (replaced("branch_id", 4, 0), r"branch_id: token 4: .*got 0"),  # the trunk comes back
        (replaced("branch_id", 5, 3), r"branch_id: token 5: .*got 3"),  # number 2 is left out
        (replaced("attach", 1, 2), r"attach: token 1: expected the value 1, got 2"),  # on a trunk
        (replaced("attach", 4, 1), r"attach: token 4: expected the value 2, got 1"),  # differs within its branch
        (replaced("attach", 5, 4), r"attach: token 5: expected at most the trunk's length 3, got 4"),
        (replaced("attach", 5, -1), r"attach: token 5: expected at least 0, got -1"),
        ({"attach": [0, 1, 2, 2, 2, 3, 1, 1, 0, 1]}, r"attach: token 6: .*length 0, got 1"),  # there is no trunk
        (replaced("position_ids", 2, 3), r"position_ids: token 2: expected the value 2, got 3"),
        (replaced("position_ids", 4, 4), r"position_ids: token 4: expected the value 3, got 4"),
        (replaced("position_ids", 9, 0), r"position_ids: token 9: expected the value 1, got 0"),
    ],
)
def test_values_that_break_a_rule_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.parametrize("name", list(FIELDS))
def test_tensors_that_do_not_fit_are_refused(name):
    tensors = {field: torch.tensor(FIELDS[field]) for field in FIELDS}
    with pytest.raises(TypeError, match=rf"{name}: expected a tensor, got list"):
        SharedPrefixLayout(**tensors | {name: FIELDS[name]})
    with pytest.raises(ValueError, match=rf"{name}: expected dtype torch.int64, got torch.int32"):
        SharedPrefixLayout(**tensors | {name: tensors[name].int()})
    with pytest.raises(ValueError, match=rf"{name}: expected shape \(10,\), got \(1, 10\)"):
        SharedPrefixLayout(**tensors | {name: tensors[name][None]})


def test_lengths_and_devices_that_differ_are_refused():
    tensors = {field: torch.tensor(FIELDS[field]) for field in FIELDS}
    with pytest.raises(ValueError, match=r"attach: expected shape \(10,\), got \(9,\)"):
        SharedPrefixLayout(**tensors | {"attach": tensors["attach"][1:]})
    with pytest.raises(ValueError, match=r"attach: expected device cpu \(tree_id's\), got meta"):
        SharedPrefixLayout(**tensors | {"attach": tensors["attach"].to("meta")})


@pytest.mark.parametrize(
    ("trees", "message"),
    [
        ([(1, []), (-1, [])], r"trees\[1\]: expected a trunk length of at least 0, got -1"),
        ([(3, [(2, 1), (2, 0)])], r"trees\[0\], branch 2: expected a length of at least 1, got 0"),
        ([(3, [(4, 1)])], r"trees\[0\], branch 1: expected attach from 0 to the trunk's length 3, got 4"),
        ([(3, [(-1, 1)])], r"trees\[0\], branch 1: expected attach from 0 .*, got -1"),
    ],
)
def test_trees_that_break_a_rule_are_refused(trees, message):
    with pytest.raises(ValueError, match=message):
        SharedPrefixLayout.from_trees(trees)


@pytest.mark.parametrize(
    ("trees", "argument"),
    [
        ([(2.0, [])], r"trees\[0\]: trunk length: expected an int, got 2.0"),
        ([(3, [(True, 1)])], r"trees\[0\], branch 1: attach: expected an int, got True"),
        ([(3, [(1, 1.5)])], r"trees\[0\], branch 1: length: expected an int, got 1.5"),
    ],
)
def test_counts_that_are_not_whole_numbers_are_refused(trees, argument):
    with pytest.raises(TypeError, match=argument):
        SharedPrefixLayout.from_trees(trees)


def test_moving_and_pickling_keep_the_values_and_do_not_check_again(monkeypatch):
    layout = build()
    monkeypatch.setattr(SharedPrefixLayout, "__post_init__", lambda self: pytest.fail("checked again"))
    assert values(layout.to("cpu", non_blocking=True)) == FIELDS
    assert values(pickle.loads(pickle.dumps(layout))) == FIELDS
    moved = layout.to("meta")
    assert moved.device.type == "meta" and layout.device.type == "cpu"
