"""`disc_train.models.causal_lm.use_attention`: what it picks, passes over and refuses."""

import pytest
import torch
import transformers
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from disc_kernels.shared_prefix import FLEX, SharedPrefixLayout
from disc_train.models import causal_lm
from disc_train.models.causal_lm import hidden_states, load_model, use_attention
from tests.shared_prefix.models import GROUPED

TOKENS = torch.arange(16)[None]
WRONG = "wrong_attention_of_a_test"


def make_model(config_class=transformers.LlamaConfig, **options):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config_class(**GROUPED | options))


def test_it_says_what_it_picked():
    assert use_attention(make_model(), "auto") == "sdpa"
    assert use_attention(make_model(), "sdpa") == "sdpa"
    assert use_attention(make_model(transformers.Gemma2Config, head_dim=8), "auto") == "eager"


def test_several_rows_at_once():
    model = make_model(transformers.MistralConfig, sliding_window=5)
    use_attention(model, "auto")
    rows = [[(6, [(4, 3), (6, 2)])], [(0, [(0, 8)]), (3, [])]]
    ids = torch.randint(61, (2, 11))
    layout = SharedPrefixLayout.from_trees([tree for row in rows for tree in row])
    batch = hidden_states(model, ids, layout)
    for row, trees in enumerate(rows):
        alone = hidden_states(model, ids[row : row + 1], SharedPrefixLayout.from_trees(trees))
        torch.testing.assert_close(batch[row], alone[0], atol=1e-5, rtol=0)


def make_first_choice(monkeypatch, function):
    """As on a GPU where FlexAttention does not work: "auto" begins with the attention function that is given here."""
    AttentionInterface.register(WRONG, function)
    real_choice, real_mask = causal_lm.attention_implementation, causal_lm.attention_mask

    def choice(config, requested="auto", *device):
        return (
            WRONG if device else real_choice(config, requested)
        )  # only the call for the device that is there names it

    def mask(config, layout, implementation, *rest):
        return real_mask(config, layout, "sdpa" if implementation == WRONG else implementation, *rest)

    monkeypatch.setattr(causal_lm, "attention_implementation", choice)
    monkeypatch.setattr(causal_lm, "attention_mask", mask)


def breaks(module, query, key, value, attention_mask, **options):
    raise RuntimeError("out of registers")


def sees_too_much(module, query, key, value, attention_mask, **options):
    return sdpa_attention_forward(module, query, key, value, torch.ones_like(attention_mask), **options)


def sees_the_past_whatever_the_mask(module, query, key, value, attention_mask, **options):
    return sdpa_attention_forward(module, query, key, value, None, **options)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (breaks, "RuntimeError: out of registers"),
        (sees_too_much, "packed after another"),
        (sees_the_past_whatever_the_mask, "packed after another"),
    ],
)
def test_auto_leaves_an_implementation_that_fails_its_check(function, message, monkeypatch):
    make_first_choice(monkeypatch, function)
    model, other = make_model(), make_model()
    with pytest.warns(UserWarning, match=f"attention '{WRONG}' is not used: LlamaForCausalLM: .*{message}"):
        assert use_attention(model, "auto") == "sdpa"
    layout = SharedPrefixLayout.from_trees([(6, [(4, 10)])])
    other.set_attn_implementation("sdpa")
    assert torch.equal(hidden_states(model, TOKENS, layout), hidden_states(other, TOKENS, layout))


def test_what_was_asked_for_is_not_replaced(monkeypatch):
    make_first_choice(monkeypatch, breaks)
    with pytest.raises(ValueError, match="out of registers"):
        use_attention(make_model(), "sdpa")


def test_an_implementation_that_leaves_something_out_differs_from_eager(monkeypatch):
    """Packed and alone it leaves out the same, which only another implementation shows."""
    make_first_choice(monkeypatch, sdpa_attention_forward)
    model = make_model(transformers.Gemma2Config, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=1.0)
    model.set_attn_implementation(WRONG)
    with pytest.warns(UserWarning, match=f"'{WRONG}' is not used"):
        assert use_attention(model, "auto") == "eager"


def test_models_without_sdpa_run_eagerly():
    model = make_model(transformers.GptOssConfig, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    with pytest.warns(UserWarning, match="attention 'sdpa' is not used"):
        assert use_attention(model, "auto") == "eager"


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("flex", "'flex' cannot train on the CPU"),
        ("varlen", "'varlen' has no kernel for device type 'cpu'"),
        ("flash", "expected 'auto', 'sdpa', 'flex' or 'varlen', got 'flash'"),
    ],
)
def test_what_the_device_cannot_run_is_refused(attention, message):
    model = make_model().train()
    with pytest.raises(ValueError, match=message):
        use_attention(model, attention)
    assert model.training


def test_several_rows_need_dense_masks():
    model = make_model()
    model.set_attn_implementation(causal_lm.attention_implementation(model.config, "flex"))
    with pytest.raises(ValueError, match=f"rows: expected 1 with attention '{FLEX}', got 2"):
        hidden_states(model, TOKENS.view(2, 8), SharedPrefixLayout.from_trees([(8, []), (8, [])]))


def test_models_with_layers_between_hidden_states_and_head_are_refused_in_one_sentence():
    """ModernBERT calls its head its decoder, RemBERT's head takes fewer entries than the decoder gives."""
    modernbert = make_model(transformers.ModernBertDecoderConfig)
    with pytest.raises(ValueError, match="ModernBertDecoderForCausalLM: expected logits equal to its head's output"):
        use_attention(modernbert, "auto")
    rembert = make_model(transformers.RemBertConfig, is_decoder=True, input_embedding_size=16, output_embedding_size=24)
    with pytest.raises(
        ValueError, match=r"RemBertForCausalLM: expected an output head that takes .* of 32 entries, got"
    ):
        use_attention(rembert, "auto")


def test_llama_4_which_does_not_say_what_its_decoder_is_runs():
    options = {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 8}
    model = make_model(transformers.Llama4TextConfig, **options)
    assert use_attention(model, "auto") == "sdpa"


def test_models_that_read_more_than_text_are_refused_in_one_sentence(tmp_path):
    transformers.Mistral3Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="transformers has no causal language model for a Mistral3Config") as failure:
        load_model(str(tmp_path), torch.float32)
    assert len(str(failure.value)) < 400
