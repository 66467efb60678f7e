"""What of the layouts and masks needs a GPU; imports nothing that `make gpu` does not promise to do without."""

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from disc_kernels.shared_prefix import (
    FLEX,
    VARLEN,
    SharedPrefixLayout,
    attention_mask,
    block_mask,
    dense_mask,
)
from disc_kernels.shared_prefix.backends.varlen import varlen_attention_forward, varlen_mask
from disc_train.models.causal_lm import hidden_states, use_attention
from tests.gpu import DEVICE, needs_cuda

pytestmark = pytest.mark.gpu

TREES = [(500, [(200, 130), (500, 25)]), (0, [(0, 37), (0, 1)]), (33, [])]


def tiny_model() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    return transformers.AutoModelForCausalLM.from_config(config).to(DEVICE)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).float().norm() / expected.float().norm()).item()


@needs_cuda("pinned memory")
def test_pinning_and_moving_to_an_accelerator():
    layout = SharedPrefixLayout.from_trees([(3, [(2, 2), (3, 1)])])
    tensors = {field.name: getattr(layout, field.name) for field in fields(layout)}
    pinned = layout.pin_memory()
    moved = pinned.to("cuda", non_blocking=True)
    for name, tensor in tensors.items():
        assert getattr(pinned, name).is_pinned()
        assert getattr(moved, name).tolist() == tensor.tolist()
    wrong = {name: tensor.clone() for name, tensor in tensors.items()}
    wrong["attach"][1] = 2
    with pytest.raises(ValueError, match="attach: token 1"):
        SharedPrefixLayout(**{name: tensor.cuda() for name, tensor in wrong.items()})


@needs_cuda("FlexAttention has no backward on the CPU")
@pytest.mark.parametrize("window", [None, 20])
def test_compiled_flex_attention_on_a_gpu_equals_sdpa_with_gradients(window, compiler):
    layout = SharedPrefixLayout.from_trees(TREES).to("cuda")
    inputs = [torch.randn(1, 2, len(layout), 32, device="cuda", requires_grad=True) for _ in range(3)]
    outputs = (
        torch.compile(flex_attention)(*inputs, block_mask=block_mask(layout, window=window)),
        F.scaled_dot_product_attention(*inputs, attn_mask=dense_mask(layout, window=window)),
    )
    upstream = torch.randn_like(outputs[0])
    got, expected = (torch.autograd.grad(output, inputs, upstream) for output in outputs)
    for result, reference in zip((outputs[0], *got), (outputs[1], *expected), strict=True):
        assert reference.abs().max() > 0.1
        torch.testing.assert_close(result, reference, atol=2e-2, rtol=0)  # TF32 products


@needs_cuda("FlashAttention")
@pytest.mark.parametrize("window", [None, 20])
def test_variable_length_attention_equals_sdpa_with_gradients(window):
    layout = SharedPrefixLayout.from_trees(TREES).to("cuda")
    inputs = [
        torch.randn(1, heads, len(layout), 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    got, _ = varlen_attention_forward(nn.Module(), *inputs, varlen_mask(layout, window=window))
    query, key, value = (tensor.float() for tensor in inputs)
    expected = F.scaled_dot_product_attention(
        query,
        key.repeat_interleave(2, dim=1),
        value.repeat_interleave(2, dim=1),
        attn_mask=dense_mask(layout, window=window),
    ).transpose(1, 2)
    upstream = torch.randn_like(got)
    gradients = torch.autograd.grad(got, inputs, upstream)
    references = torch.autograd.grad(expected, inputs, upstream.float())
    for result, reference in zip((got, *gradients), (expected, *references), strict=True):
        assert relative_error(result, reference) < 0.02


@needs_cuda("FlashAttention")
def test_a_trunk_tokens_gradients_are_summed_in_float32():
    """1024 branches give the trunk's one token a gradient of 1 each; added one by one in bfloat16 that stops at 256."""
    branches = 1024
    layout = SharedPrefixLayout.from_trees([(1, [(1, 1)] * branches)]).to("cuda")
    query = torch.zeros(1, 2, branches + 1, 64, device="cuda", dtype=torch.bfloat16)
    value = torch.zeros_like(query).requires_grad_()
    output, _ = varlen_attention_forward(nn.Module(), query, query, value, varlen_mask(layout))
    output.backward(torch.full_like(output, 2.0))
    assert (value.grad[0, :, 0] - (branches + 2)).abs().max() <= 8


@pytest.mark.parametrize(
    ("attention", "picked"),
    [
        ("auto", FLEX if DEVICE == "cuda" else "sdpa"),
        pytest.param("flex", FLEX, marks=needs_cuda("FlexAttention has no backward on the CPU")),
        pytest.param("varlen", VARLEN, marks=needs_cuda("FlashAttention")),
    ],
)
def test_a_model_under_autocast_equals_sdpa_with_gradients(attention, picked, compiler):
    """Weights in float32, as the student's are."""
    model = tiny_model()
    layout = SharedPrefixLayout.from_trees(TREES).to(DEVICE)
    ids = torch.randint(61, (1, len(layout)), device=DEVICE)
    upstream = torch.randn(1, len(layout), 256, device=DEVICE)
    parameters = list(model.get_decoder().parameters())

    def outputs(attention: str) -> tuple[str, list[Tensor]]:
        implementation = use_attention(model, attention)
        with torch.autocast(DEVICE, torch.bfloat16):
            hidden = hidden_states(model, ids, layout)
        return implementation, [hidden, *torch.autograd.grad(hidden, parameters, upstream)]

    _, expected = outputs("sdpa")
    implementation, got = outputs(attention)
    assert implementation == picked
    for result, reference in zip(got, expected, strict=True):
        assert relative_error(result, reference) < 0.05


@needs_cuda("the host's waiting")
@pytest.mark.parametrize("implementation", [FLEX, VARLEN])
def test_building_a_mask_waits_for_nothing(implementation):
    config = tiny_model().config
    layouts = [SharedPrefixLayout.from_trees(TREES).pin_memory().to("cuda", non_blocking=True) for _ in range(2)]
    attention_mask(config, layouts[0], implementation)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention_mask(config, layouts[1], implementation)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda("FlexAttention has no backward on the CPU")
def test_new_lengths_compile_nothing(compiler):
    model = tiny_model()
    use_attention(model, "flex")

    def step(length: int) -> None:
        layout = SharedPrefixLayout.from_trees([(length // 2, [(length // 3, length - length // 2)])]).to("cuda")
        hidden_states(model, torch.randint(61, (1, length), device="cuda"), layout).sum().backward()

    for length in (300, 421):
        step(length)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for length in (1000, 257, 256, 384, 1999):
        step(length)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
