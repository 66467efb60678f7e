"""Models that cannot share a trunk run right in padded rows of one sequence each."""

import pytest
import torch
import transformers

from disc_kernels.shared_prefix import SharedPrefixLayout, can_share
from disc_train.models.causal_lm import hidden_states, use_attention
from tests.shared_prefix.models import GROUPED

MAMBA2 = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 8}
# One of each kind: state space, linear attention beside attention, both in one layer, convolution, ALiBi.
SEPARATE = {
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **GROUPED,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=0,
        mlp_only_layers=[0, 1],
    ),
    "falcon_h1": lambda: transformers.FalconH1Config(**GROUPED, **MAMBA2, mamba_d_ssm=64, mamba_n_groups=1),
    "lfm2": lambda: transformers.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]),
    "bloom": lambda: transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4),
}


@pytest.mark.parametrize("name", SEPARATE)
def test_padded_rows_equal_single_sequences_with_gradients(name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(SEPARATE[name]())
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
