"""Which attention implementation a config needs, and the form of the masks it is given."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from disc_kernels.shared_prefix import SharedPrefixLayout, attention_implementation, attention_mask, dense_mask

LLAMA = SimpleNamespace(model_type="llama", num_attention_heads=4)
MISTRAL = SimpleNamespace(model_type="mistral", num_attention_heads=4, sliding_window=3)
QWEN = SimpleNamespace(model_type="qwen3", layer_types=["full_attention"] * 2, sliding_window=None)
GEMMA = SimpleNamespace(
    model_type="gemma2",
    layer_types=["sliding_attention", "full_attention"] * 2,
    sliding_window=3,
    attn_logit_softcapping=50.0,
)
LAYOUT = SharedPrefixLayout.from_trees([(5, [(3, 4), (5, 2)])])


@pytest.mark.parametrize(
    ("config", "requested", "expected"),
    [
        (LLAMA, "auto", "sdpa"),
        (LLAMA, "sdpa", "sdpa"),
        (LLAMA, "flex", "flex_attention"),
        (GEMMA, "auto", "eager"),
        (GEMMA, "flex", "flex_attention"),
        (SimpleNamespace(get_text_config=lambda: GEMMA), "auto", "eager"),
    ],
)
def test_implementation(config, requested, expected):
    assert attention_implementation(config, requested) == expected


@pytest.mark.parametrize(
    ("config", "requested", "message"),
    [
        (GEMMA, "sdpa", "'sdpa' leaves out the softcap of attention logits of gemma2 models"),
        (LLAMA, "varlen", "'varlen' is not implemented yet"),
        (LLAMA, "flash", "expected 'auto', 'sdpa', 'flex' or 'varlen', got 'flash'"),
    ],
)
def test_implementations_that_would_be_wrong_are_refused(config, requested, message):
    with pytest.raises(ValueError, match=message):
        attention_implementation(config, requested)


@pytest.mark.parametrize(("config", "window"), [(LLAMA, None), (QWEN, None), (MISTRAL, 3)])
def test_models_with_one_kind_of_layer_get_one_mask(config, window):
    visible = dense_mask(LAYOUT, window=window)
    assert torch.equal(attention_mask(config, LAYOUT, "sdpa"), visible[None, None])

    additive = attention_mask(config, LAYOUT, "eager", torch.bfloat16)
    assert additive.dtype == torch.bfloat16
    assert torch.equal(additive == 0, visible[None, None])
    assert torch.equal(additive == -torch.inf, ~visible[None, None])

    block = attention_mask(config, LAYOUT, "flex_attention")
    assert isinstance(block, BlockMask)
    index = torch.arange(len(LAYOUT))
    assert torch.equal(block.mask_mod(None, None, index[:, None], index), visible)


def test_models_with_two_kinds_of_layers_get_a_mask_for_each():
    masks = attention_mask(GEMMA, LAYOUT, "sdpa")
    assert set(masks) == {"full_attention", "sliding_attention"}
    assert torch.equal(masks["full_attention"][0, 0], dense_mask(LAYOUT))
    assert torch.equal(masks["sliding_attention"][0, 0], dense_mask(LAYOUT, window=3))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            SimpleNamespace(model_type="qwen3_next", layer_types=["full_attention", "linear_attention"]),
            "qwen3_next models have layers of type 'linear_attention'",
        ),
        (
            SimpleNamespace(model_type="llama4_text", layer_types=["chunked_attention"]),
            "llama4_text models have layers of type 'chunked_attention'",
        ),
        (SimpleNamespace(model_type="mamba"), "mamba models have no attention"),
        (SimpleNamespace(model_type="gemma2", layer_types=["sliding_attention"]), "sliding_window: .*gemma2.*got None"),
    ],
)
def test_models_that_no_mask_confines_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        attention_mask(config, LAYOUT, "sdpa")


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="expected 'sdpa', 'eager' or 'flex_attention', got 'flash_attention_2'"):
        attention_mask(LLAMA, LAYOUT, "flash_attention_2")


def test_importing_needs_torch_only():
    code = "import disc_kernels.shared_prefix, sys; assert not {'transformers', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
