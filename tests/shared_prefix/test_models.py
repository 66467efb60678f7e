"""Packed Hugging Face models against the oracle: the same outputs and the same gradients of embeddings and weights."""

from functools import cache

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from disc_kernels.shared_prefix import FLEX, SharedPrefixLayout, attention_implementation, attention_mask, dense_mask
from tests.shared_prefix.layouts import Trees, random_trees
from tests.shared_prefix.models import GROUPED, TINY, VOCABULARY, measure_gradients, run_separately

TREES = [(13, [(13, 4), (6, 7), (0, 3), (12, 9)]), (0, [(0, 8)]), (7, [])]
SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen2_sliding": lambda: transformers.Qwen2Config(**GROUPED, **SLIDING),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=5),
    "phi3": lambda: transformers.Phi3Config(**GROUPED, sliding_window=5),
    "gemma2": lambda: transformers.Gemma2Config(
        **GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=6, attn_logit_softcapping=2.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **GROUPED,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**TINY),
    "gpt2": lambda: transformers.GPT2Config(
        **TINY, max_position_embeddings=64, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
    ),
}
WINDOWED = [name for name in CONFIGS if name not in ("llama", "qwen2", "qwen3", "gpt_neox", "gpt2")]


@cache
def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    return transformers.AutoModelForCausalLM.from_config(config).double()


def prepared(name: str, implementation: str | None = None) -> nn.Module:
    model = make_model(name)
    model.set_attn_implementation(implementation or attention_implementation(model.config))
    return model


def run_packed(model: nn.Module, embeddings: Tensor, layout: SharedPrefixLayout, rows: int = 1, **changes) -> Tensor:
    inputs = {
        "attention_mask": attention_mask(
            model.config, layout, model.config._attn_implementation, embeddings.dtype, rows
        ),
        "position_ids": layout.position_ids.view(rows, -1),
    }
    return model(inputs_embeds=embeddings.unflatten(0, (rows, -1)), **inputs | changes).logits.flatten(0, 1)


def run_oracle(model: nn.Module, embeddings: Tensor, layout: SharedPrefixLayout) -> Tensor:
    return run_separately(lambda sequence: model(inputs_embeds=sequence[None]).logits[0], embeddings, layout)


def random_problem(layout: SharedPrefixLayout) -> tuple[Tensor, Tensor]:
    """Token ids, and the gradient that comes from above the logits."""
    return torch.randint(VOCABULARY, (len(layout),)), torch.randn(len(layout), VOCABULARY, dtype=torch.float64)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_separate_sequences(name, all_double):
    model, layout = prepared(name), SharedPrefixLayout.from_trees(TREES)
    ids, upstream = random_problem(layout)
    expected = measure_gradients(model, lambda embeddings: run_oracle(model, embeddings, layout), ids, upstream)
    got = measure_gradients(model, lambda embeddings: run_packed(model, embeddings, layout), ids, upstream)
    largest = expected["embeddings"].abs().max()
    for key, value in expected.items():
        scale = value.abs().max()
        # A key's bias moves all logits of a query alike, so that its gradient is rounding.
        if not key.endswith("k_proj.bias"):
            assert scale > 1e-3, key
        assert (got[key] - value).abs().max() < 1e-12 * max(scale, largest), key


def padded(rows: list[Trees]) -> SharedPrefixLayout:
    """Rows of one length: what a row lacks is a tree of its own."""
    lengths = [sum(trunk + sum(length for _, length in branches) for trunk, branches in row) for row in rows]
    longest = max(*lengths, 1)
    return SharedPrefixLayout.from_trees(
        [tree for row, length in zip(rows, lengths, strict=True) for tree in [*row, (longest - length, [])]]
    )


# sdpa would leave out the softcap of Gemma 2.
CASES = [(name, backend) for name in CONFIGS for backend in ("sdpa", "eager") if (name, backend) != ("gemma2", "sdpa")]


@pytest.mark.parametrize(("name", "implementation"), CASES)
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(random_trees(trunk=9, branch=6, branches=3, trees=(1, 3)), min_size=2, max_size=3))
def test_random_trees_in_rows_equal_separate_sequences(name, implementation, rows, all_double):
    model, layout = prepared(name, implementation), padded(rows)
    ids, upstream = random_problem(layout)
    expected = measure_gradients(model, lambda embeddings: run_oracle(model, embeddings, layout), ids, upstream)
    got = measure_gradients(model, lambda embeddings: run_packed(model, embeddings, layout, len(rows)), ids, upstream)
    for key, value in expected.items():
        assert (got[key] - value).abs().max() < 1e-11 * max(value.abs().max(), expected["embeddings"].abs().max()), key


@pytest.mark.parametrize("name", CONFIGS)
def test_mutants_differ(name, all_double):
    """What the tolerance above has to reject, and does by nine orders of magnitude."""
    model, layout = prepared(name), SharedPrefixLayout.from_trees(TREES)
    implementation = model.config._attn_implementation
    ids, _ = random_problem(layout)
    shifted = layout.position_ids + (layout.branch_id > 0)
    detached = SharedPrefixLayout.from_trees(
        [(trunk, [(max(attach - 1, 0), length) for attach, length in branches]) for trunk, branches in TREES]
    )
    mutants = {
        "position_ids off by one in branches": {"position_ids": shifted[None]},
        "attach off by one": {"attention_mask": attention_mask(model.config, detached, implementation, torch.float64)},
    }
    if name in WINDOWED:
        everywhere = dense_mask(layout)[None, None]
        additive = torch.zeros_like(everywhere, dtype=torch.float64).masked_fill(~everywhere, -torch.inf)
        mutants["window ignored"] = {"attention_mask": additive if implementation == "eager" else everywhere}
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
        expected = run_oracle(model, embeddings, layout)
        for mutant, changes in mutants.items():
            wrong = run_packed(model, embeddings, layout, **changes)
            assert (wrong - expected).abs().max() > 1e-3 * expected.abs().max(), mutant


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_flex_attention_equals_the_dense_mask(name, compiler):
    """FlexAttention is compiled, on the CPU too."""
    config = CONFIGS[name]()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention_implementation(config))
    layout = SharedPrefixLayout.from_trees(TREES)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(torch.randint(VOCABULARY, (len(layout),)))
        expected = run_packed(model, embeddings, layout)
        model.set_attn_implementation(attention_implementation(config, "flex"))
        assert model.config._attn_implementation == FLEX
        got = run_packed(model, embeddings, layout)
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
