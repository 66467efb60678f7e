"""The attention function around FlexAttention: what is compiled how often, and what it is given."""

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from disc_kernels.shared_prefix import SharedPrefixLayout, block_mask, dense_mask
from disc_kernels.shared_prefix.backends import flex
from disc_kernels.shared_prefix.backends.flex import flex_attention_forward

LAYOUT = SharedPrefixLayout.from_trees([(13, [(13, 4), (6, 7), (0, 3)]), (0, [(0, 8)])])


def layout_of(length: int) -> SharedPrefixLayout:
    trunk = length // 2
    return SharedPrefixLayout.from_trees([(trunk, [(trunk // 3, length - trunk)])])


@pytest.fixture
def compiled_graphs(monkeypatch, compiler):
    """One entry for each graph that torch.compile makes; nothing is generated from it."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(flex_attention, backend=backend)
    monkeypatch.setattr(flex, "_compiled_flex_attention", lambda: compiled)
    return graphs


def attend(layout: SharedPrefixLayout, *, heads: int = 4, window: int | None = None, **options) -> torch.Tensor:
    query, key, value = (torch.randn(1, n, len(layout), 16) for n in (heads, 2, 2))
    mask = block_mask(layout, window=window)
    return flex_attention_forward(nn.Module(), query, key, value, mask, **options)[0]


def test_new_lengths_and_layouts_compile_nothing(compiled_graphs):
    for length in (300, 421):  # one static graph, then one for every length
        attend(layout_of(length))
    assert len(compiled_graphs) == 2
    for length in (1000, 257, 256, 384, 1999, 130, 2048):
        attend(layout_of(length))
        attend(layout_of(length), window=50)
    assert len(compiled_graphs) == 2


def test_another_number_of_heads_is_a_graph_of_its_own(compiled_graphs):
    """Not one with a symbolic number of heads; both models then go on without compiling."""
    for length in (300, 421):
        attend(layout_of(length))
    attend(layout_of(500), heads=6)
    known = len(compiled_graphs)
    assert known <= 4
    for length in (777, 1025):
        attend(layout_of(length), heads=4)
        attend(layout_of(length), heads=6)
    assert len(compiled_graphs) == known
    heads = {
        node.meta["example_value"].shape[1]
        for graph in compiled_graphs
        for node in graph.graph.nodes
        if node.op == "placeholder" and "query" in node.name
    }
    assert heads == {4, 6}
    assert all(isinstance(number, int) for number in heads)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("window", [None, 5])
def test_values(softcap, window, monkeypatch):
    monkeypatch.setattr(flex, "_compiled_flex_attention", lambda: flex_attention)
    query, key, value = (torch.randn(1, heads, len(LAYOUT), 16, dtype=torch.float64) for heads in (4, 2, 2))
    mask = block_mask(LAYOUT, window=window)
    got, weights = flex_attention_forward(nn.Module(), query, key, value, mask, scaling=0.7, softcap=softcap)
    logits = 0.7 * query @ key.repeat_interleave(2, dim=1).mT
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    hidden = ~dense_mask(LAYOUT, window=window)
    expected = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ value.repeat_interleave(2, dim=1)
    assert weights is None
    assert got.shape == (1, len(LAYOUT), 4, 16)
    torch.testing.assert_close(got, expected.transpose(1, 2), atol=1e-12, rtol=0)


def test_autocast_decides_the_dtype(monkeypatch):
    """Queries and keys come from a rotary embedding in float32, values from a linear layer in bfloat16."""
    seen = []

    def kernel(query, key, value, **_):
        seen.extend([query.dtype, key.dtype, value.dtype])
        return query

    monkeypatch.setattr(flex, "_compiled_flex_attention", lambda: kernel)
    query, value = torch.randn(1, 2, len(LAYOUT), 16), torch.randn(1, 2, len(LAYOUT), 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        flex_attention_forward(nn.Module(), query, query, value, block_mask(LAYOUT))
    assert seen == [torch.bfloat16] * 3


def test_bad_calls():
    query = torch.randn(1, 2, len(LAYOUT), 16)

    def call(mask, **options):
        flex_attention_forward(nn.Module(), query, query, query, mask, **options)

    with pytest.raises(ValueError, match="expected a BlockMask of a packed sequence, got Tensor"):
        call(dense_mask(LAYOUT))
    with pytest.raises(ValueError, match=r"'flex' has no dropout of attention weights, expected 0, got 0\.1"):
        call(block_mask(LAYOUT), dropout=0.1)
    with pytest.raises(ValueError, match="'flex' has no position bias"):
        call(block_mask(LAYOUT), position_bias=query)
