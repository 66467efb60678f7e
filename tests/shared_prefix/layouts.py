"""Random trees for property tests."""

from hypothesis import strategies as st

Trees = list[tuple[int, list[tuple[int, int]]]]


@st.composite
def random_trees(draw, *, trunk: int, branch: int, branches: int = 4, trees: tuple[int, int] = (0, 4)) -> Trees:
    """Draw what `SharedPrefixLayout.from_trees` takes: (trunk length, [(attach, length), ...]) a tree.

    Args:
        trunk: the longest trunk; the shortest is empty.
        branch: the longest branch.
        branches: the most of a tree.
        trees: the fewest and the most.
    """

    def random_tree(length: int) -> st.SearchStrategy[tuple[int, list[tuple[int, int]]]]:
        attach = st.integers(0, length) | st.just(length)
        return st.tuples(st.just(length), st.lists(st.tuples(attach, st.integers(1, branch)), max_size=branches))

    fewest, most = trees
    return draw(st.lists(st.integers(0, trunk).flatmap(random_tree), min_size=fewest, max_size=most))
