"""What "auto" picks, and why: from the device, the model's config, and what a layer computes on batches of the run.

The counts are of operations, in pairs of a query and a key: 4 D operations each in a layer's attention, D the hidden
size. Nothing here was measured on a GPU.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from disc_kernels.shared_prefix.hf_config import (
    attention_dropout,
    attention_softcap,
    can_share,
    model_name,
    text_config,
    window_shares,
)
from disc_kernels.shared_prefix.layout import SharedPrefixLayout
from disc_kernels.shared_prefix.masks import beside_sequences, block_mask

# A layer's matrices take about 24 D^2 operations a token, so as much as 6 D pairs.
PAIRS_PER_HIDDEN = 6
# Scores of a dense mask are computed for every pair, and mask and softmax move memory, which is taken to cost twice
# what the products do.
DENSE_PAIR = 3
BLOCK = 128  # queries and keys that kernels which skip what nobody sees compute together
# Taken to be worth the minutes for which FlexAttention compiles at the beginning of a run.
LEAST_SAVING = 0.05


class Choice(NamedTuple):
    implementation: str  # "flex", "sdpa" or "eager"
    reason: str


def automatic(config: Any, device_type: str, saving: float | None = None) -> Choice:
    """The implementation for a model on a device, in a few words why.

    Args:
        saving: of `flex_saving`, on batches of the run; None: nothing is known of them.
    """
    obstacle = _obstacle(config, device_type)
    softcap = "sdpa leaves out the softcap of attention logits"
    if obstacle is not None:
        return Choice("sdpa", obstacle) if attention_softcap(config) is None else Choice("eager", softcap)
    if attention_softcap(config) is not None:
        return Choice("flex", softcap)
    if saving is None:
        return Choice("flex", "it skips what no query sees")
    if saving < LEAST_SAVING:
        return Choice("sdpa", f"flex would save {max(saving, 0):.0%} of a layer's work, too little to compile it for")
    return Choice("flex", f"it saves {saving:.0%} of a layer's work, by count")


def _obstacle(config: Any, device_type: str) -> str | None:
    """Why a model cannot run with FlexAttention."""
    if device_type != "cuda":
        return "flex trains on CUDA only"
    if not can_share(config):
        return f"{model_name(config)} models cannot share a trunk"
    return "flex cannot drop out attention weights" if attention_dropout(config) else None


def flex_saving(
    config: Any, one_row: Sequence[SharedPrefixLayout], in_rows: Sequence[tuple[SharedPrefixLayout, int]]
) -> float:
    """The part of a layer's work on some batches that "flex" saves over "sdpa"; negative: it does more.

    Work are the tokens that a layer's matrices multiply, padding too, and the pairs that its attention computes: for
    "flex" those of the 128 x 128 blocks in which anybody sees anything; for "sdpa" all N^2 of every row, or without a
    mask, where every row is one sequence, those of causal attention.

    Args:
        config: of a model that `can_share`; a layer's pairs are the mean over its layers, whose windows may differ.
        one_row: the batches as "flex" reads them.
        in_rows: the same batches as "sdpa" does: layouts of rows * N tokens, each with its number of rows.
    """
    shares = window_shares(config).items()
    pairs_per_token = PAIRS_PER_HIDDEN * text_config(config).hidden_size

    def work(layout: SharedPrefixLayout, pairs: Callable[[int | None], int]) -> float:
        return pairs_per_token * len(layout) + sum(share * pairs(window) for window, share in shares)

    flex = sum(work(layout, partial(_flex_pairs, layout)) for layout in one_row)
    sdpa = sum(work(layout, partial(_sdpa_pairs, layout, rows)) for layout, rows in in_rows)
    return 1 - flex / sdpa


def _flex_pairs(layout: SharedPrefixLayout, window: int | None) -> int:
    mask = block_mask(layout, BLOCK, window=window)
    blocks = int(mask.kv_num_blocks.sum())
    if mask.full_kv_num_blocks is not None:
        blocks += int(mask.full_kv_num_blocks.sum())
    return blocks * BLOCK**2


def _sdpa_pairs(layout: SharedPrefixLayout, rows: int, window: int | None) -> int:
    length = len(layout) // rows
    if beside_sequences(layout, rows, most=1) is None and (window is None or length <= window):
        return rows * length * (length + BLOCK) // 2  # half of all, and half of the blocks on the diagonal
    return DENSE_PAIR * rows * length**2
