"""Make masks of shared-prefix layouts: dense boolean ones, and FlexAttention's block masks.

A query sees at most two runs of keys: a first part of its trunk, and its own segment up to itself. Both masks are made
from the ends of these runs, three integers a token.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from disc_kernels.shared_prefix.layout import SharedPrefixLayout, check_int


def dense_mask(layout: SharedPrefixLayout, *, window: int | None = None) -> Tensor:
    """Make the mask as a tensor: bool [L, L] (query, key) on the layout's device, True where the query sees the key.

    Args:
        layout: L packed tokens.
        window: with a window, a key is seen only if it is fewer than `window` positions back (position_ids of the query
            less those of the key), as in layers with sliding-window attention. None: no limit.

    Raises:
        TypeError: window that is no integer.
        ValueError: window below 1.
    """
    return row_masks(layout, 1, window=window)[0]


def row_masks(layout: SharedPrefixLayout, rows: int, *, window: int | None = None) -> Tensor:
    """Make a mask for each row of a batch: bool [rows, N, N] (row, query, key), as `dense_mask` of the row alone.

    The layout has the rows one after another, N = L / rows tokens each. Raises ValueError for a window below 1, and as
    `check_rows`.
    """
    check_rows(layout, rows)
    runs = _visible_runs(layout, window)
    token = torch.arange(len(layout), device=layout.device).view(rows, len(layout) // rows)
    return runs.contain(token[:, :, None], token[:, None, :])


def check_rows(layout: SharedPrefixLayout, rows: int) -> None:
    """Raise ValueError unless a layout can be cut into rows of one length with no tree in two of them."""
    check_int("rows", rows)
    if rows < 1 or len(layout) % rows:
        raise ValueError(f"rows: expected a number that divides the layout's {len(layout)} tokens, got {rows}")
    length = max(len(layout) // rows, 1)
    first, tokens, tree, _ = layout.segments.unbind(1)
    cut = (first + tokens - 1) // length != tree // length
    if cut.any():
        raise ValueError(
            f"rows: expected no tree in two of {rows} rows of {length} tokens, got one that begins at token"
            f" {int(tree[cut][0])}"
        )


def has_one_sequence_per_row(layout: SharedPrefixLayout, rows: int) -> bool:
    """Return whether each row is a single sequence, so that causal attention is all it takes; raise as `check_rows`."""
    check_rows(layout, rows)
    return len(layout.segments) <= rows  # there are tokens in every row, or in none


def block_mask(layout: SharedPrefixLayout, block_size: int = 128, *, window: int | None = None) -> BlockMask:
    """Make the mask for `torch.nn.attention.flex_attention`, of shape [1, 1, L, L] and on the layout's device.

    Every block is classified exactly: no pair visible (skipped), every pair visible (full: the mask function is not
    called), or mixed. Where L is no multiple of block_size, the last blocks are mixed at most. No L x L tensor is made:
    memory is linear in L, plus the table of (L / block_size)^2 blocks. On an accelerator nothing waits for the device.

    Args:
        layout: L packed tokens.
        block_size: tokens in a query block and in a key block.
        window: as in `dense_mask`.

    Raises:
        TypeError: block_size or window that is no integer.
        ValueError: block_size or window below 1.
    """
    check_int("block_size", block_size)
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1, got {block_size}")
    runs = _visible_runs(layout, window)
    seen, full = _block_table(runs, block_size)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return runs.contain(query, key)

    return BlockMask.from_kv_blocks(
        *_ordered(seen & ~full),
        *_ordered(full),
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod,
        seq_lengths=(len(layout), len(layout)),
    )


class _Runs(NamedTuple):
    """Hold the keys that query q sees: trunk_from[q] <= k < trunk_to[q], and own_from[q] <= k <= q; each [L] int64.

    The two runs neither overlap nor touch, except that the first may be empty.
    """

    trunk_from: Tensor
    trunk_to: Tensor
    own_from: Tensor

    def contain(self, query: Tensor, key: Tensor) -> Tensor:
        on_trunk = (key >= self.trunk_from[query]) & (key < self.trunk_to[query])
        return on_trunk | ((key >= self.own_from[query]) & (key <= query))


def _visible_runs(layout: SharedPrefixLayout, window: int | None) -> _Runs:
    trunk_from = layout.tree_start()
    trunk_to = trunk_from + layout.attach
    own_from = layout.segment_start()
    if window is not None:
        check_int("window", window)
        if window < 1:
            raise ValueError(f"window: expected at least 1, got {window}")
        trunk_from = trunk_from + (layout.position_ids - (window - 1)).clamp(min=0)
        query = torch.arange(len(layout), device=layout.device)
        own_from = own_from.maximum(query - (window - 1))
    # A trunk's token, and a branch that follows right after all it sees, have one run: kept as the query's own, so that
    # a block covered by the two together is recognised as full.
    joined = trunk_to >= own_from
    return _Runs(trunk_from, trunk_to.where(~joined, trunk_from), own_from.where(~joined, trunk_from.minimum(own_from)))


def _block_table(runs: _Runs, block_size: int) -> tuple[Tensor, Tensor]:
    """Return two bool tensors [blocks, blocks] (query, key block): some pair is visible; every pair is visible."""
    length, device = len(runs.own_from), runs.own_from.device
    blocks = -(-length // block_size)
    query = torch.arange(length, device=device)
    row = query // block_size

    def queries_per_block(*ranges: tuple[Tensor, Tensor]) -> Tensor:
        """Count the queries of each query block that have each key block in one of their ranges [first, last)."""
        # +1 where a range begins, -1 where it ends: the sum along a row is the number of ranges open at a key block.
        edges = torch.zeros(blocks, blocks + 1, dtype=torch.int32, device=device)
        one = torch.ones(length, dtype=torch.int32, device=device)
        for first, last in ranges:
            edges.index_put_((row, first), one, accumulate=True)
            edges.index_put_((row, last.maximum(first)), -one, accumulate=True)
        return edges.cumsum(1, dtype=torch.int32)[:, :blocks]

    def touched(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        first = start // block_size
        return first, ((stop + block_size - 1) // block_size).where(start < stop, first)

    def covered(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        return (start + block_size - 1) // block_size, stop // block_size

    trunk, own = (runs.trunk_from, runs.trunk_to), (runs.own_from, query + 1)
    seen = queries_per_block(touched(*trunk), touched(*own)) > 0
    full = queries_per_block(covered(*trunk), covered(*own)) == block_size
    return seen, full


def count_visible_blocks(layout: SharedPrefixLayout, block_size: int = 128, *, window: int | None = None) -> int:
    """Count the blocks that `block_mask` does not skip."""
    return int(_block_table(_visible_runs(layout, window), block_size)[0].sum())


def _ordered(table: Tensor) -> tuple[Tensor, Tensor]:
    """Return a table of blocks as FlexAttention reads it: the number in each row, and its columns with those first."""
    count = table.sum(dim=1, dtype=torch.int32)
    columns = table.to(torch.uint8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return count[None, None], columns[None, None]
