"""Models whose windows are longer than the text of `use_attention`'s check: trained right, or refused."""

import pytest
import torch
import transformers

from disc_kernels.shared_prefix import SharedPrefixLayout, can_share
from disc_train.models.causal_lm import hidden_states, use_attention
from tests.shared_prefix.models import GROUPED


def gpt_neo() -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_config(
        transformers.GPTNeoConfig(
            vocab_size=61,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=256,
            max_position_embeddings=1024,
            initializer_range=0.3,
        )
    )


def windowed(config_class: type[transformers.PreTrainedConfig]) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_config(
        config_class(**GROUPED, head_dim=8, ffn_dim=64, sliding_window=256)
    )


@pytest.mark.parametrize("make_model", [gpt_neo, lambda: windowed(transformers.MistralConfig)])
def test_branches_far_from_their_trunk_equal_single_sequences_with_gradients(make_model):
    """30 continuations of one header: packed behind each other, the last are further from it than the window."""
    model = make_model().eval()
    use_attention(model, "auto")
    header, texts = torch.randint(61, (20,)), torch.randint(61, (30, 20))
    sequences = torch.cat([header.expand(30, -1), texts], dim=1)
    if can_share(model.config):
        layout = SharedPrefixLayout.from_trees([(20, [(20, 20)] * 30)])
        packed = torch.cat([header, texts.flatten()])
        got = hidden_states(model, packed[None], layout)[0, 20:].unflatten(0, texts.shape)
    else:
        got = hidden_states(model, sequences, SharedPrefixLayout.from_trees([(40, [])] * 30))[:, 20:]
    expected = model.get_decoder()(input_ids=sequences, use_cache=False).last_hidden_state[:, 20:]

    parameters, upstream = list(model.get_decoder().parameters()), torch.randn_like(expected)
    gradients = torch.autograd.grad(got, parameters, upstream)
    for one, other in zip(gradients, torch.autograd.grad(expected, parameters, upstream), strict=True):
        assert (one - other).norm() < 1e-4 * other.norm()


def test_models_that_ignore_the_window_of_their_config_are_refused():
    """Moshi's layers see the whole text; masks made from its config would hide what is beyond the window."""
    expected = "expected the same hidden states for a text packed after another"
    with pytest.raises(ValueError, match=expected), pytest.warns(UserWarning, match=expected):
        use_attention(windowed(transformers.MoshiConfig), "auto")


def test_windows_are_as_before_after_the_check():
    model = windowed(transformers.MistralConfig)
    layer = model.get_decoder().layers[0].self_attn
    layer.sliding_window = 256
    use_attention(model, "auto")
    assert model.config.sliding_window == layer.sliding_window == 256
