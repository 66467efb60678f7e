"""What "auto" picks: from counts that are made by hand here, or from a dense mask."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from disc_kernels.shared_prefix import (
    FLEX,
    SharedPrefixLayout,
    attention_implementation,
    choose_attention,
    dense_mask,
    flex_saving,
)
from disc_kernels.shared_prefix.choice import DENSE_PAIR, LEAST_SAVING, PAIRS_PER_HIDDEN
from tests.shared_prefix.layouts import random_trees

# Few enough dimensions that attention counts; `LARGE` is of 1.5 billion parameters.
LLAMA = SimpleNamespace(model_type="llama", num_attention_heads=4, hidden_size=64)
LARGE = SimpleNamespace(model_type="llama", num_attention_heads=4, hidden_size=1536)
MISTRAL = SimpleNamespace(model_type="mistral", num_attention_heads=4, hidden_size=64, sliding_window=100)
GEMMA3 = SimpleNamespace(
    model_type="gemma3_text",
    num_attention_heads=4,
    hidden_size=64,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    sliding_window=100,
)
GEMMA2 = SimpleNamespace(**vars(GEMMA3) | {"model_type": "gemma2", "attn_logit_softcapping": 50.0})
GPT2 = SimpleNamespace(model_type="gpt2", num_attention_heads=4, attn_pdrop=0.1)
MAMBA = SimpleNamespace(model_type="mamba")
MATRICES = PAIRS_PER_HIDDEN * 64  # of a token

trees = SharedPrefixLayout.from_trees


def _documents(count, branches):
    """Of 400 tokens, each with branches of 25 behind every 80th token; as one row, and as a row a document."""
    tree = (400, [(80 * i, 25) for i in range(branches)])
    layout = trees([tree] * count)
    return [layout], [(layout, count)]


@pytest.mark.parametrize(
    ("config", "blocks", "dense"),
    [
        (LLAMA, 3, 2 * 200**2),  # blocks of 128: 200 tokens are 2 x 2, of which one lies above the diagonal
        (MISTRAL, 3, 2 * 200**2),  # a query of the second block sees 99 keys back, into the first
        (GEMMA3, 3, 2 * 200**2),
    ],
)
def test_work_by_hand(config, blocks, dense):
    one_row = [trees([(150, [(150, 50)])])]
    in_rows = [(trees([(100, [(50, 100)])] * 2), 2)]
    flex = MATRICES * 200 + blocks * 128**2
    sdpa = MATRICES * 400 + DENSE_PAIR * dense
    assert flex_saving(config, one_row, in_rows) == pytest.approx(1 - flex / sdpa)


def test_rows_of_one_sequence_need_no_mask():
    """And then no kernel looks at the blocks above the diagonal; where a window is shorter, a mask is needed."""
    one_row, in_rows = [trees([(384, [])])], [(trees([(384, [])]), 1)]
    assert flex_saving(LLAMA, one_row, in_rows) == 0
    tokens = MATRICES * 384
    windowed = tokens + 5 * 128**2  # query block 2 sees key blocks 1 and 2: 99 keys back
    sdpa = tokens + DENSE_PAIR * 384**2
    assert flex_saving(MISTRAL, one_row, in_rows) == pytest.approx(1 - windowed / sdpa)
    flex = tokens + (2 * 5 + 6) / 3 * 128**2
    sdpa = tokens + (2 * DENSE_PAIR * 384**2 + 6 * 128**2) / 3
    assert flex_saving(GEMMA3, one_row, in_rows) == pytest.approx(1 - flex / sdpa)


def test_batches_are_added_up():
    small, large = trees([(100, [(100, 100)])]), trees([(1000, [(500, 100)])])
    # The last of the nine query blocks sees 500 tokens, in four key blocks, and those of its own branch, in two.
    works = [
        (MATRICES * 200 + 3 * 128**2, MATRICES * 200 + DENSE_PAIR * 200**2),
        (MATRICES * 1100 + 42 * 128**2, MATRICES * 1100 + DENSE_PAIR * 1100**2),
    ]
    (flex, sdpa) = map(sum, zip(*works, strict=True))
    assert flex_saving(LLAMA, [small, large], [(small, 1), (large, 1)]) == pytest.approx(1 - flex / sdpa)


@settings(deadline=None, max_examples=30)
@given(random_trees(trunk=300, branch=150, branches=3, trees=(1, 4)), st.sampled_from([LLAMA, MISTRAL]))
def test_blocks_are_those_in_which_somebody_sees_something(drawn, config):
    layout = trees(drawn)
    assume(len(layout))
    length = len(layout)
    mask = dense_mask(layout, window=getattr(config, "sliding_window", None))
    padding = -length % 128
    blocks = torch.nn.functional.pad(mask, (0, padding, 0, padding)).unfold(0, 128, 128).unfold(1, 128, 128)
    flex = MATRICES * length + int(blocks.any(-1).any(-1).sum()) * 128**2
    two = (trees([(length, [(1, length)])]), 1)  # never without a mask
    sdpa = MATRICES * 2 * length + DENSE_PAIR * (2 * length) ** 2
    assert flex_saving(config, [layout], [two]) == pytest.approx(1 - flex / sdpa)


@pytest.mark.parametrize(
    ("config", "batch", "expected"),
    [
        (LARGE, _documents(1, 0), "sdpa"),  # a document that is read alone: causal attention
        (LARGE, _documents(16, 0), "sdpa"),  # the same a row each, nothing padded
        (LLAMA, _documents(16, 5), FLEX),  # dense masks over 525 tokens, of which a token sees few
        (LARGE, ([trees([(0, [(0, 25)] * 5)])], [(trees([(0, [(0, 25)] * 5)]), 1)]), "sdpa"),  # 125 tokens: few pairs
        (LARGE, ([trees([(60_000, [(30_000, 25)])])], [(trees([(60_000, [(30_000, 25)])]), 1)]), FLEX),
        # One document of 400 tokens makes rows of three others as long.
        (LARGE, ([trees([(400, []), *[(100, [])] * 3])], [(trees([(400, [])] * 4), 4)]), FLEX),
    ],
)
def test_what_trees_get_on_cuda(config, batch, expected):
    saving = flex_saving(config, *batch)
    assert attention_implementation(config, "auto", "cuda", saving) == expected
    assert attention_implementation(config, "auto", "cpu", saving) == "sdpa"


@pytest.mark.parametrize(
    ("config", "device_type", "saving", "expected"),
    [
        (LLAMA, "cpu", 0.9, ("sdpa", "flex trains on CUDA only")),
        (LLAMA, "mps", None, ("sdpa", "flex trains on CUDA only")),
        (GEMMA2, "cpu", 0.9, ("eager", "sdpa leaves out the softcap of attention logits")),
        (GEMMA2, "cuda", 0.0, ("flex", "sdpa leaves out the softcap of attention logits")),
        (GPT2, "cuda", 0.9, ("sdpa", "flex cannot drop out attention weights")),
        (MAMBA, "cuda", 0.9, ("sdpa", "mamba models cannot share a trunk")),
        (LLAMA, "cuda", None, ("flex", "it skips what no query sees")),
        (LLAMA, "cuda", LEAST_SAVING, ("flex", "it saves 5% of a layer's work, by count")),
        (LLAMA, "cuda", 0.049, ("sdpa", "flex would save 5% of a layer's work, too little to compile it for")),
        (LLAMA, "cuda", -0.2, ("sdpa", "flex would save 0% of a layer's work, too little to compile it for")),
    ],
)
def test_what_is_picked_and_why(config, device_type, saving, expected):
    assert choose_attention(config, device_type, saving) == expected
