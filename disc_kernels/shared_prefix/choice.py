"""Choose the attention of "auto": by the device, by the model's config, and by the work that a run's batches make.

Work is counted in pairs of a query and a key: 4 D operations each in a layer's attention, D the hidden size. Nothing
here was measured on a GPU.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from disc_kernels.shared_prefix.hf_config import (
    attention_dropout,
    attention_softcap,
    can_share,
    layer_windows,
    model_name,
    text_config,
)
from disc_kernels.shared_prefix.layout import SharedPrefixLayout
from disc_kernels.shared_prefix.masks import count_visible_blocks, has_one_sequence_per_row

# A layer's matrices take about 24 D^2 operations a token, so as much as 6 D pairs.
PAIRS_PER_HIDDEN = 6
# Scores of a dense mask are computed for every pair, and mask and softmax move memory, which is taken to cost twice
# what the products do.
DENSE_PAIR = 3
BLOCK = 128  # queries and keys that kernels which skip what nobody sees compute together
# Taken to be worth the minutes for which FlexAttention compiles at the beginning of a run.
LEAST_SAVING = 0.05


class Choice(NamedTuple):
    """Hold what "auto" runs a model with, and why."""

    implementation: str  # "flex", "sdpa" or "eager"
    reason: str


def choose_attention(config: Any, device_type: str, flex_saving: float | None = None) -> Choice:
    """Choose the implementation for a model on a device, and say why in a few words.

    Args:
        flex_saving: of the function of that name, on batches of the run; None: nothing is known of them.
    """
    if device_type != "cuda":
        obstacle = "flex trains on CUDA only"
    elif not can_share(config):
        obstacle = f"{model_name(config)} models cannot share a trunk"
    else:
        obstacle = "flex cannot drop out attention weights" if attention_dropout(config) else ""
    if attention_softcap(config) is not None:
        return Choice("eager" if obstacle else "flex", "sdpa leaves out the softcap of attention logits")
    if obstacle:
        return Choice("sdpa", obstacle)
    if flex_saving is None:
        return Choice("flex", "it skips what no query sees")
    if flex_saving < LEAST_SAVING:
        return Choice(
            "sdpa", f"flex would save {max(flex_saving, 0):.0%} of a layer's work, too little to compile it for"
        )
    return Choice("flex", f"it saves {flex_saving:.0%} of a layer's work, by count")


def flex_saving(
    config: Any, one_row: Sequence[SharedPrefixLayout], in_rows: Sequence[tuple[SharedPrefixLayout, int]]
) -> float:
    """Count the part of a layer's work on some batches that "flex" saves over "sdpa"; negative: it does more.

    Work are the tokens that a layer's matrices multiply, padding too, and the pairs that its attention computes: for
    "flex" those of the 128 x 128 blocks in which anybody sees anything; for "sdpa" all N^2 of every row, or without a
    mask, where every row is one sequence, those of causal attention.

    Args:
        config: of a model that `can_share`; a layer's pairs are the mean over its layers, whose windows may differ.
        one_row: the batches as "flex" reads them.
        in_rows: the same batches as "sdpa" does: layouts of rows * N tokens, each with its number of rows.
    """
    windows = Counter(window for _, window in layer_windows(config))
    pairs_per_token = PAIRS_PER_HIDDEN * text_config(config).hidden_size

    def work(layout: SharedPrefixLayout, pairs: Callable[[int | None], int]) -> float:
        in_all_layers = sum(layers * pairs(window) for window, layers in windows.items())
        return pairs_per_token * len(layout) + in_all_layers / windows.total()

    flex = sum(work(layout, partial(_flex_pairs, layout)) for layout in one_row)
    sdpa = sum(work(layout, partial(_sdpa_pairs, layout, rows)) for layout, rows in in_rows)
    return 1 - flex / sdpa


def _flex_pairs(layout: SharedPrefixLayout, window: int | None) -> int:
    return count_visible_blocks(layout, BLOCK, window=window) * BLOCK**2


def _sdpa_pairs(layout: SharedPrefixLayout, rows: int, window: int | None) -> int:
    length = len(layout) // rows
    if has_one_sequence_per_row(layout, rows) and (window is None or length <= window):
        return rows * length * (length + BLOCK) // 2  # half of all, and half of the blocks on the diagonal
    return DENSE_PAIR * rows * length**2
