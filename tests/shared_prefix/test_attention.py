"""Which attention implementation a config needs, and the form of the masks it is given."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from disc_kernels.shared_prefix import (
    FLEX,
    VARLEN,
    SharedPrefixLayout,
    attention_implementation,
    attention_mask,
    dense_mask,
)

LLAMA = SimpleNamespace(model_type="llama", num_attention_heads=4)
MISTRAL = SimpleNamespace(model_type="mistral", num_attention_heads=4, sliding_window=3)
QWEN = SimpleNamespace(
    model_type="qwen3", num_attention_heads=4, layer_types=["full_attention"] * 2, sliding_window=None
)
GEMMA = SimpleNamespace(
    model_type="gemma2",
    num_attention_heads=4,
    layer_types=["sliding_attention", "full_attention"] * 2,
    sliding_window=3,
    attn_logit_softcapping=50.0,
)
GPT2 = SimpleNamespace(model_type="gpt2", num_attention_heads=4, attn_pdrop=0.1)
MAMBA = SimpleNamespace(model_type="mamba")
LAYOUT = SharedPrefixLayout.from_trees([(5, [(3, 4), (5, 2)])])


@pytest.mark.parametrize(
    ("config", "requested", "device_type", "expected"),
    [
        (LLAMA, "auto", "cpu", "sdpa"),
        (LLAMA, "auto", "mps", "sdpa"),
        (LLAMA, "auto", "cuda", FLEX),
        (LLAMA, "sdpa", "cuda", "sdpa"),
        (LLAMA, "flex", "cpu", FLEX),
        (LLAMA, "varlen", "cuda", VARLEN),
        (MISTRAL, "varlen", "cuda", VARLEN),
        (GEMMA, "auto", "cpu", "eager"),
        (GEMMA, "auto", "cuda", FLEX),
        (GEMMA, "flex", "cuda", FLEX),
        (GPT2, "auto", "cuda", "sdpa"),
        (MAMBA, "auto", "cuda", "sdpa"),
        (SimpleNamespace(get_text_config=lambda: GEMMA), "auto", "cpu", "eager"),
    ],
)
def test_implementation(config, requested, device_type, expected):
    assert attention_implementation(config, requested, device_type) == expected


@pytest.mark.parametrize(
    ("config", "requested", "device_type", "message"),
    [
        (GEMMA, "sdpa", "cuda", "'sdpa' leaves out the softcap of attention logits of gemma2 models"),
        (LLAMA, "varlen", "cpu", "'varlen' has no kernel for device type 'cpu', only 'cuda'"),
        (GPT2, "flex", "cuda", "'flex' cannot drop out attention weights, expected a gpt2 config .* got 0.1"),
        (GPT2, "varlen", "cuda", "'varlen' cannot drop out attention weights"),
        (LLAMA, "flash", "cuda", "expected 'auto', 'sdpa', 'flex' or 'varlen', got 'flash'"),
    ],
)
def test_implementations_that_would_be_wrong_are_refused(config, requested, device_type, message):
    with pytest.raises(ValueError, match=message):
        attention_implementation(config, requested, device_type)


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn can do a softcap")
def test_varlen_without_flash_attn_refuses_a_softcap():
    with pytest.raises(ValueError, match=r"'varlen' cannot softcap .* unless flash-attn is installed"):
        attention_implementation(GEMMA, "varlen", "cuda")


@pytest.mark.parametrize(("config", "window"), [(LLAMA, None), (QWEN, None), (MISTRAL, 3)])
def test_models_with_one_kind_of_layer_get_one_mask(config, window):
    visible = dense_mask(LAYOUT, window=window)
    assert torch.equal(attention_mask(config, LAYOUT, "sdpa"), visible[None, None])

    additive = attention_mask(config, LAYOUT, "eager", torch.bfloat16)
    assert additive.dtype == torch.bfloat16
    assert torch.equal(additive == 0, visible[None, None])
    assert torch.equal(additive == -torch.inf, ~visible[None, None])

    block = attention_mask(config, LAYOUT, FLEX)
    assert isinstance(block, BlockMask)
    index = torch.arange(len(LAYOUT))
    assert torch.equal(block.mask_mod(None, None, index[:, None], index), visible)


def test_models_with_two_kinds_of_layers_get_a_mask_for_each():
    masks = attention_mask(GEMMA, LAYOUT, "sdpa")
    assert set(masks) == {"full_attention", "sliding_attention"}
    assert torch.equal(masks["full_attention"][0, 0], dense_mask(LAYOUT))
    assert torch.equal(masks["sliding_attention"][0, 0], dense_mask(LAYOUT, window=3))


def test_rows_of_a_batch_have_a_mask_each():
    trees = [[(2, [(1, 2), (2, 1)])], [(0, [(0, 3)]), (2, [])]]
    layout = SharedPrefixLayout.from_trees([tree for row in trees for tree in row])
    masks = attention_mask(MISTRAL, layout, "sdpa", rows=2)
    assert masks.shape == (2, 1, 5, 5)
    for mask, row in zip(masks, trees, strict=True):
        assert torch.equal(mask[0], dense_mask(SharedPrefixLayout.from_trees(row), window=3))


@pytest.mark.parametrize(
    ("implementation", "rows", "message"),
    [
        ("sdpa", 3, "rows: expected a number that divides the layout's 10 tokens, got 3"),
        ("eager", 0, "rows: .* got 0"),
        ("sdpa", 2, "rows: expected no tree in two of 2 rows of 5 tokens, got one that begins at token 4"),
        (FLEX, 2, f"rows: expected 1 with attention '{FLEX}', got 2"),
        (VARLEN, 2, f"rows: expected 1 with attention '{VARLEN}', got 2"),
    ],
)
def test_rows_that_do_not_fit_are_refused(implementation, rows, message):
    layout = SharedPrefixLayout.from_trees([(2, [(1, 2)]), (2, [(0, 2), (2, 2)])])
    with pytest.raises(ValueError, match=message):
        attention_mask(LLAMA, layout, implementation, rows=rows)


def test_a_sliding_layer_needs_a_window():
    config = SimpleNamespace(model_type="gemma2", num_attention_heads=4, layer_types=["sliding_attention"])
    with pytest.raises(ValueError, match=r"sliding_window: .*gemma2.*got None"):
        attention_mask(config, LAYOUT, "sdpa")


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match=r"expected 'sdpa', 'eager', .* got 'flash_attention_2'"):
        attention_mask(LLAMA, LAYOUT, "flash_attention_2")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_one_sequence_a_row_needs_no_mask(implementation):
    """The model's own causal attention is faster; a second sequence in a row would see the first."""
    alone = SharedPrefixLayout.from_trees([(5, []), (5, [])])
    assert attention_mask(LLAMA, alone, implementation, rows=2) is None
    two = SharedPrefixLayout.from_trees([(3, []), (2, []), (5, [])])
    assert attention_mask(LLAMA, two, implementation, rows=2) is not None
    branch = SharedPrefixLayout.from_trees([(3, [(3, 2)])])
    assert attention_mask(LLAMA, branch, implementation) is not None
