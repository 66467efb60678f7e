"""Dense and block masks against the definition, and against each other."""

import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.profiler import ProfilerActivity, profile

from disc_kernels.shared_prefix import SharedPrefixLayout, block_mask, dense_mask
from disc_kernels.shared_prefix.masks import row_masks
from tests.shared_prefix.layouts import random_trees

RAGGED = [(50, [(20, 30), (50, 25), (0, 4)]), (0, [(0, 37), (0, 1)]), (33, [])]


def by_definition(layout: SharedPrefixLayout, window: int | None) -> torch.Tensor:
    """The mask, pair by pair, from the words of SharedPrefixLayout's docstring."""
    tree, branch, attach, position = (
        getattr(layout, name).tolist() for name in ("tree_id", "branch_id", "attach", "position_ids")
    )
    mask = torch.zeros(len(layout), len(layout), dtype=torch.bool)
    for q in range(len(layout)):
        for k in range(len(layout)):
            in_trunk_part = branch[k] == 0 and position[k] < attach[q]  # a trunk token's position is its offset
            in_own_segment = branch[k] == branch[q] and k <= q
            near = window is None or position[q] - position[k] < window
            mask[q, k] = tree[q] == tree[k] and (in_trunk_part or in_own_segment) and near
    return mask


def listed(count: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """A BlockMask's list of key blocks for each query block, as a bool [blocks, blocks] table."""
    table = torch.zeros(index.shape[-2:], dtype=torch.bool)
    for row in range(table.shape[0]):
        table[row, index[0, 0, row, : count[0, 0, row]].long()] = True
    return table


def assert_equals_dense(mask: BlockMask, dense: torch.Tensor, block_size: int) -> None:
    length = len(dense)
    blocks = -(-length // block_size)
    padded = F.pad(dense, (0, blocks * block_size - length) * 2)
    tiles = padded.reshape(blocks, block_size, blocks, block_size)
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    mixed = listed(mask.kv_num_blocks, mask.kv_indices)
    assert torch.equal(full, tiles.all(dim=3).all(dim=1))
    assert torch.equal(mixed, tiles.any(dim=3).any(dim=1) & ~full)
    # The backward pass reads the same tables by key block.
    assert torch.equal(listed(mask.full_q_num_blocks, mask.full_q_indices), full.T)
    assert torch.equal(listed(mask.q_num_blocks, mask.q_indices), mixed.T)

    index = torch.arange(length)
    assert torch.equal(mask.mask_mod(index.new_zeros(()), index.new_zeros(()), index[:, None], index), dense)
    assert mask.shape == (1, 1, length, length)


@settings(max_examples=100, deadline=None)
@given(trees=random_trees(trunk=7, branch=7), window=st.none() | st.integers(1, 9))
def test_dense_mask_follows_the_definition(trees, window):
    layout = SharedPrefixLayout.from_trees(trees)
    assert torch.equal(dense_mask(layout, window=window), by_definition(layout, window))


@settings(max_examples=200, deadline=None)
@given(
    trees=random_trees(trunk=60, branch=60),
    window=st.none() | st.integers(1, 50),
    block_size=st.sampled_from([1, 2, 3, 8, 16, 64]),
)
def test_block_mask_equals_the_dense_mask(trees, window, block_size):
    layout = SharedPrefixLayout.from_trees(trees)
    mask = block_mask(layout, block_size, window=window)
    assert_equals_dense(mask, dense_mask(layout, window=window), block_size)


@pytest.mark.parametrize("window", [None, 300])
def test_default_blocks_of_a_long_sequence_are_mostly_skipped_or_full(window):
    layout = SharedPrefixLayout.from_trees([(1500, [(700, 300), (1500, 200)]), (900, [(512, 100)])])
    mask = block_mask(layout, window=window)
    assert_equals_dense(mask, dense_mask(layout, window=window), 128)
    assert mask.full_kv_num_blocks.sum() > (70 if window is None else 10)


def test_an_empty_layout_has_empty_masks():
    layout = SharedPrefixLayout.from_trees([])
    assert dense_mask(layout).shape == (0, 0)
    assert block_mask(layout).shape == (1, 1, 0, 0)


@pytest.mark.parametrize("make", [dense_mask, block_mask])
def test_bad_arguments(make):
    layout = SharedPrefixLayout.from_trees(RAGGED)
    with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
        make(layout, window=0)
    for window in (2.5, True):
        with pytest.raises(TypeError, match=f"window: expected an int, got {window}"):
            make(layout, window=window)
    with pytest.raises(TypeError, match=r"block_size: expected an int, got 128\.0"):
        block_mask(layout, 128.0)
    with pytest.raises(TypeError, match=r"rows: expected an int, got 1\.0"):
        row_masks(layout, 1.0)
    with pytest.raises(ValueError, match="block_size: expected at least 1, got 0"):
        block_mask(layout, 0)


def test_block_mask_memory_is_linear():
    """All that is ever allocated, in bytes, is bounded by numbers a token and a block; an L x L mask would be 4 GiB."""
    block_size, numbers = 1024, 64
    for length in (2**14, 2**16):
        layout = SharedPrefixLayout.from_trees([(length // 2, [(i * 64, 64) for i in range(length // 128)])])
        assert len(layout) == length
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            block_mask(layout, block_size, window=4096)
        allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profiler.events())
        assert length * 8 < allocated < 8 * numbers * (length + (length // block_size) ** 2)


def test_block_mask_of_131072_tokens_is_quick():
    layout = SharedPrefixLayout.from_trees([(2**16, [(i * 64, 64) for i in range(1024)])])
    assert len(layout) == 2**17
    started = time.process_time()
    block_mask(layout)
    assert time.process_time() - started < 5  # 0.2 s on one core


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 20])
def test_eager_flex_attention_equals_sdpa(window):
    assert_flex_equals_sdpa(flex_attention, window)


@pytest.mark.slow
def test_compiled_flex_attention_equals_sdpa(compiler):
    """Unlike the eager one, it reads the table of blocks."""
    compiled = torch.compile(flex_attention)
    for window in (None, 20):
        assert_flex_equals_sdpa(compiled, window)


def assert_flex_equals_sdpa(attend, window: int | None) -> None:
    layout = SharedPrefixLayout.from_trees(RAGGED)
    query, key, value = (torch.randn(1, 2, len(layout), 16) for _ in range(3))
    got = attend(query, key, value, block_mask=block_mask(layout, window=window))
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=dense_mask(layout, window=window))
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
    if window is not None:
        ignored = F.scaled_dot_product_attention(query, key, value, attn_mask=dense_mask(layout))
        assert (got - ignored).abs().max() > 0.1
