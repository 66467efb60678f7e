"""Which models can share a trunk, and that those that cannot run right in padded rows of one sequence each."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from disc_kernels.shared_prefix import SharedPrefixLayout, attention_mask, can_share
from disc_train.models.causal_lm import hidden_states, use_attention

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "use_cache": False,
    "pad_token_id": 0,
}
MAMBA2 = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 8}
# One of each kind: state space, linear attention beside attention, both in one layer, convolution, ALiBi.
APART = {
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **TINY,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=0,
        mlp_only_layers=[0, 1],
    ),
    "falcon_h1": lambda: transformers.FalconH1Config(**TINY, **MAMBA2, mamba_d_ssm=64, mamba_n_groups=1),
    "lfm2": lambda: transformers.Lfm2Config(**TINY, layer_types=["conv", "full_attention"]),
    "bloom": lambda: transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4),
}


@pytest.mark.parametrize("name", APART)
def test_padded_rows_equal_single_sequences_with_gradients(name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(APART[name]())
    assert not can_share(model.config)
    own = model.config._attn_implementation
    assert use_attention(model, "auto") == own

    texts = [torch.randint(61, (length,)) for length in (11, 4, 7)]
    layout = SharedPrefixLayout.from_trees([tree for text in texts for tree in [(len(text), []), (11 - len(text), [])]])
    rows = torch.stack([torch.nn.functional.pad(text, (0, 11 - len(text)), value=3) for text in texts])
    upstream = [torch.randn(len(text), 32) for text in texts]
    parameters = list(model.get_decoder().parameters())

    def gradients(hidden):
        loss = sum((one * weight).sum() for one, weight in zip(hidden, upstream, strict=True))
        return torch.autograd.grad(loss, parameters)

    alone = [model.get_decoder()(input_ids=text[None], use_cache=False).last_hidden_state[0] for text in texts]
    batch = hidden_states(model, rows, layout)
    packed = [hidden[: len(text)] for hidden, text in zip(batch, texts, strict=True)]
    for got, expected in zip([*packed, *gradients(packed)], [*alone, *gradients(alone)], strict=True):
        assert expected.abs().max() > 0
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


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
