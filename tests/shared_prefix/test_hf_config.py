"""What is read from configs: which models can share a trunk, and what those that cannot are refused."""

from types import SimpleNamespace

import pytest
import transformers

from disc_kernels.shared_prefix import SharedPrefixLayout, attention_mask, can_share


@pytest.mark.parametrize(
    ("layer_types", "shares"),
    [
        (["full_attention", "sliding_attention"], True),
        (["full_attention", "linear_attention"], False),
        (["chunked_attention", "full_attention"], False),
        (["indexed_attention"], False),
        (["recurrent", "attention"], False),
        (["hybrid"], False),
        (None, True),
    ],
)
def test_layer_types_decide(layer_types, shares):
    config = SimpleNamespace(model_type="any", num_attention_heads=4, layer_types=layer_types)
    assert can_share(config) == shares
    assert can_share(SimpleNamespace(get_text_config=lambda: config)) == shares


def test_other_configs_that_tell():
    assert not can_share(SimpleNamespace(model_type="rwkv"))
    assert not can_share(SimpleNamespace(model_type="falcon", num_attention_heads=4, alibi=True))
    assert can_share(SimpleNamespace(model_type="falcon", num_attention_heads=4, alibi=False))
    assert not can_share(transformers.MptConfig())
    assert not can_share(transformers.RecurrentGemmaConfig())


@pytest.mark.parametrize(
    ("attributes", "shares"),
    [
        ({"window_size": 256}, False),  # GPT-Neo
        ({"keep_window_size": 2048}, False),  # Doge
        ({"attention_window": [512, 512]}, False),
        ({"local_attn_chunk_length": 64, "chunk_size_feed_forward": 0}, False),  # Reformer
        ({"window_size": None, "use_sliding_window": True, "sliding_window": 4096}, True),  # applied by the mask
        ({"max_window_layers": 28, "sliding_window_pattern": 6, "chunk_size_feed_forward": 2}, True),  # no windows
    ],
)
def test_windows_that_a_model_cuts_out_by_itself(attributes, shares):
    assert can_share(SimpleNamespace(model_type="any", num_attention_heads=4, **attributes)) == shares


def test_layers_of_gpt_neo():
    assert not can_share(transformers.GPTNeoConfig())
    everything_global = SimpleNamespace(model_type="any", num_attention_heads=4, attention_layers=["global"] * 2)
    assert can_share(everything_global)


@pytest.mark.parametrize(
    ("trees", "message"),
    [
        (
            [(3, [(2, 3)]), (6, [])],
            "expected one sequence a row .* got a tree of several segments that begins at token 0",
        ),
        ([(2, []), (2, []), (2, []), (6, [])], "got 3 trees in row 0"),
        ([(2, []), (6, []), (4, [])], "rows: expected no tree in two of 2 rows of 6 tokens"),
    ],
)
def test_trees_that_such_models_cannot_run_are_refused(trees, message):
    config = SimpleNamespace(model_type="mamba")
    with pytest.raises(ValueError, match=message):
        attention_mask(config, SharedPrefixLayout.from_trees(trees), "sdpa", rows=2)
