"""Variable-length attention: which keys are gathered, and, with a plain kernel, what models make of them.

Flash attention itself needs a GPU: `test_gpu.py`.
"""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from disc_kernels.shared_prefix import VARLEN, SharedPrefixLayout, attention, attention_mask, dense_mask
from disc_kernels.shared_prefix.backends import varlen
from disc_kernels.shared_prefix.backends.varlen import VarlenMask, varlen_attention_forward, varlen_mask
from tests.shared_prefix.layouts import random_trees
from tests.shared_prefix.models import GROUPED, TINY, measure_gradients, run_separately

TREES = [(9, [(9, 4), (6, 7), (0, 3), (8, 1)]), (0, [(0, 5)]), (7, [])]


def plain_kernel(query, key, value, mask: VarlenMask, scaling, softcap):
    """What a variable-length kernel computes: each segment alone, causal from the last query and the last key back."""
    query_ends, key_ends = mask.query_ends.tolist(), mask.key_ends.tolist()
    outputs = []
    for segment in range(len(query_ends) - 1):
        q = query[query_ends[segment] : query_ends[segment + 1]].transpose(0, 1)
        k, v = (x[key_ends[segment] : key_ends[segment + 1]].transpose(0, 1) for x in (key, value))
        assert q.shape[1] <= mask.max_queries and k.shape[1] <= mask.max_keys
        k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
        logits = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        behind = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
        visible = (behind >= 0) & (behind < (mask.window or k.shape[1]))
        outputs.append((logits.masked_fill(~visible, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def on_plain_kernel(monkeypatch):
    for module in (varlen, attention):
        monkeypatch.setattr(module, "find_kernel", lambda softcap, device_type: plain_kernel)


def seen_keys(mask: VarlenMask, length: int) -> torch.Tensor:
    """The keys that each query sees, as a bool [L, L] table, by the rule of `plain_kernel`."""
    table = torch.zeros(length, length, dtype=torch.bool)
    query_ends, key_ends = mask.query_ends.tolist(), mask.key_ends.tolist()
    for segment in range(len(query_ends) - 1):
        keys = mask.key_index[key_ends[segment] : key_ends[segment + 1]].tolist()
        queries = range(query_ends[segment], query_ends[segment + 1])
        assert len(set(keys)) == len(keys)
        for later, query in enumerate(reversed(queries)):
            last = len(keys) - later
            first = 0 if mask.window is None else max(0, last - mask.window)
            table[query, keys[first:last]] = True
    return table


@settings(max_examples=150, deadline=None)
@given(trees=random_trees(trunk=12, branch=9), window=st.none() | st.integers(1, 14))
def test_every_query_sees_the_keys_of_the_dense_mask(trees, window):
    layout = SharedPrefixLayout.from_trees(trees)
    mask = varlen_mask(layout, window=window)
    assert torch.equal(seen_keys(mask, len(layout)), dense_mask(layout, window=window))
    lengths, keys = mask.query_ends.diff(), mask.key_ends.diff()
    assert mask.query_ends.dtype == mask.key_ends.dtype == torch.int32
    assert (mask.max_queries, mask.max_keys) == ((lengths.max(), keys.max()) if len(layout) else (0, 0))


def test_a_window_gathers_only_what_some_query_reaches():
    layout = SharedPrefixLayout.from_trees([(1000, [(900, 10), (2, 10)])])
    assert varlen_mask(layout).key_index.numel() == 1000 + 910 + 12
    assert varlen_mask(layout, window=5).key_index.numel() == 1000 + 14 + 12


CONFIGS = {
    "llama": (transformers.LlamaConfig, {}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 5}),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 2.0}),
    "gpt_neox": (transformers.GPTNeoXConfig, {}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_equals_separate_sequences(name, on_plain_kernel, all_double):
    """Through transformers' own models: they hand the mask, the softcap and the scaling to our function."""
    make_config, options = CONFIGS[name]
    config = make_config(**TINY if name == "gpt_neox" else GROUPED, **options)
    model = transformers.AutoModelForCausalLM.from_config(config).double()
    layout = SharedPrefixLayout.from_trees(TREES)
    ids = torch.randint(61, (len(layout),))
    upstream = torch.randn(len(layout), 61, dtype=torch.float64)

    def separately(embeddings):
        model.set_attn_implementation("eager")
        return run_separately(lambda sequence: model(inputs_embeds=sequence[None]).logits[0], embeddings, layout)

    def packed(embeddings):
        model.set_attn_implementation(attention.attention_implementation(config, "varlen"))
        mask = attention_mask(config, layout, VARLEN)
        return model(
            inputs_embeds=embeddings[None], attention_mask=mask, position_ids=layout.position_ids[None]
        ).logits[0]

    expected = measure_gradients(model, separately, ids, upstream)
    for key, value in measure_gradients(model, packed, ids, upstream).items():
        assert (value - expected[key]).abs().max() < 1e-12 * expected["embeddings"].abs().max(), key


def test_a_trunk_tokens_gradients_are_summed_in_float32(on_plain_kernel):
    """1024 branches give the trunk's one token a gradient of 1 each; summed in bfloat16 that stops at 256."""
    branches = 1024
    layout = SharedPrefixLayout.from_trees([(1, [(1, 1)] * branches)])
    query = torch.zeros(1, 1, branches + 1, 8, dtype=torch.bfloat16)
    value = torch.zeros_like(query).requires_grad_()
    output, _ = varlen_attention_forward(torch.nn.Module(), query, query, value, varlen_mask(layout))
    output.backward(torch.full_like(output, 2.0))
    # Half of 2 from each branch, which sees the trunk's token and its own alike, and 2 from the trunk's token itself.
    assert (value.grad[0, 0, 0] - (branches + 2)).abs().max() <= 4  # rounded once


def test_autocast_decides_the_dtype(monkeypatch):
    dtypes = []

    def kernel(query, key, value, *_):
        dtypes.extend([query.dtype, key.dtype, value.dtype])
        return query

    monkeypatch.setattr(varlen, "find_kernel", lambda softcap, device_type: kernel)
    layout = SharedPrefixLayout.from_trees(TREES)
    query, value = torch.randn(1, 2, len(layout), 8), torch.randn(1, 2, len(layout), 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = varlen_attention_forward(torch.nn.Module(), query, query, value, varlen_mask(layout))
    assert {*dtypes, output.dtype} == {torch.bfloat16}


def test_bad_calls():
    layout = SharedPrefixLayout.from_trees(TREES)
    mask = varlen_mask(layout)
    query = torch.randn(1, 2, len(layout), 8)

    def call(mask, **options):
        varlen_attention_forward(torch.nn.Module(), query, query, query, mask, **options)

    with pytest.raises(ValueError, match="'varlen' has no kernel for device type 'cpu'"):
        call(mask)
    with pytest.raises(ValueError, match="expected a VarlenMask of a packed sequence, got NoneType"):
        call(None)
    with pytest.raises(ValueError, match=r"no dropout of attention weights, expected 0, got 0\.1"):
        call(mask, dropout=0.1)
    with pytest.raises(ValueError, match=r"no attention sinks \(s_aux\)"):
        call(mask, s_aux=torch.zeros(2))
    with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
        varlen_mask(layout, window=0)
