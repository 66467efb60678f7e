"""Packed Hugging Face models against the oracle: the same outputs and the same gradient of every parameter."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

from disc_kernels.shared_prefix import SharedPrefixLayout, attention_implementation, attention_mask, dense_mask
from disc_kernels.shared_prefix.reference import run_separately

TREES = [(13, [(13, 4), (6, 7), (0, 3), (12, 9)]), (0, [(0, 8)]), (7, [])]
# Wide weights, so that attention is far from uniform and a wrong mask shows.
TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "use_cache": False,
    "pad_token_id": 0,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**TINY),
    "qwen2": lambda: transformers.Qwen2Config(**TINY),
    "qwen2_sliding": lambda: transformers.Qwen2Config(**TINY, **SLIDING),
    "qwen3": lambda: transformers.Qwen3Config(**TINY, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**TINY, sliding_window=5),
    "gemma2": lambda: transformers.Gemma2Config(
        **TINY, head_dim=8, query_pre_attn_scalar=8, sliding_window=6, attn_logit_softcapping=2.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **TINY,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}


@pytest.fixture
def all_double(monkeypatch):
    """Double throughout: transformers' norms and softmax go through float32, whose rounding would hide small errors."""
    to, softmax = Tensor.to, nn.functional.softmax

    def to_double(self, *args, **kwargs):
        widened = {torch.float32: torch.float64}
        return to(
            self,
            *(widened.get(a, a) if isinstance(a, torch.dtype) else a for a in args),
            **{name: widened.get(a, a) if isinstance(a, torch.dtype) else a for name, a in kwargs.items()},
        )

    monkeypatch.setattr(Tensor, "to", to_double)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setattr(nn.functional, "softmax", lambda logits, dim, dtype=None: softmax(logits, dim))


def make_model(name: str) -> nn.Module:
    config = CONFIGS[name]()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention_implementation(config))
    return model.double()


def run_packed(model: nn.Module, ids: Tensor, layout: SharedPrefixLayout, **changes) -> Tensor:
    mask = attention_mask(model.config, layout, model.config._attn_implementation, torch.float64)
    inputs = {"attention_mask": mask, "position_ids": layout.position_ids[None]} | changes
    return model(input_ids=ids[None], **inputs).logits[0]


def run_oracle(model: nn.Module, ids: Tensor, layout: SharedPrefixLayout) -> Tensor:
    return run_separately(lambda sequence: model(input_ids=sequence[None]).logits[0], ids, layout)


def outputs_and_gradients(model: nn.Module, run: Callable[[], Tensor], upstream: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    logits = run()
    gradients = torch.autograd.grad(logits, list(parameters.values()), upstream)
    return {"logits": logits.detach(), **dict(zip(parameters, gradients, strict=True))}


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_separate_sequences(name, all_double):
    model, layout = make_model(name), SharedPrefixLayout.from_trees(TREES)
    ids = torch.randint(TINY["vocab_size"], (len(layout),))
    upstream = torch.randn(len(layout), TINY["vocab_size"], dtype=torch.float64)
    expected = outputs_and_gradients(model, lambda: run_oracle(model, ids, layout), upstream)
    got = outputs_and_gradients(model, lambda: run_packed(model, ids, layout), upstream)
    for key, value in expected.items():
        scale = value.abs().max()
        assert scale > 1e-3, key
        assert (got[key] - value).abs().max() < 1e-12 * scale, key


@pytest.mark.parametrize("name", CONFIGS)
def test_mutants_differ(name, all_double):
    """What the tolerance above has to reject, and does by nine orders of magnitude."""
    model, layout = make_model(name), SharedPrefixLayout.from_trees(TREES)
    ids = torch.randint(TINY["vocab_size"], (len(layout),))
    shifted = layout.position_ids + (layout.branch_id > 0)
    detached = SharedPrefixLayout.from_trees(
        [(trunk, [(max(attach - 1, 0), length) for attach, length in branches]) for trunk, branches in TREES]
    )
    mutants = {
        "position_ids off by one in branches": {"position_ids": shifted[None]},
        "attach off by one": {
            "attention_mask": attention_mask(model.config, detached, model.config._attn_implementation, torch.float64)
        },
    }
    if getattr(model.config, "sliding_window", None):
        everywhere = dense_mask(layout)[None, None]
        additive = torch.zeros_like(everywhere, dtype=torch.float64).masked_fill(~everywhere, -torch.inf)
        mutants["window ignored"] = {
            "attention_mask": additive if model.config._attn_implementation == "eager" else everywhere
        }
    with torch.no_grad():
        expected = run_oracle(model, ids, layout)
        for mutant, changes in mutants.items():
            wrong = run_packed(model, ids, layout, **changes)
            assert (wrong - expected).abs().max() > 1e-3 * expected.abs().max(), mutant


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_flex_attention_equals_the_dense_mask(name, compiler):
    """transformers compiles FlexAttention, on the CPU too."""
    model, layout = make_model(name).float(), SharedPrefixLayout.from_trees(TREES)
    ids = torch.randint(TINY["vocab_size"], (len(layout),))
    with torch.no_grad():
        expected = run_packed(model, ids, layout)
        model.set_attn_implementation("flex_attention")
        got = run_packed(model, ids, layout)
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
