"""What of the layouts and masks needs a GPU; imports nothing that `make gpu` does not promise to do without."""

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from disc_kernels.shared_prefix import SharedPrefixLayout, block_mask, dense_mask

pytestmark = pytest.mark.gpu


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


@pytest.mark.parametrize("window", [None, 20])
def test_compiled_flex_attention_on_a_gpu_equals_sdpa_with_gradients(window, compiler):
    layout = SharedPrefixLayout.from_trees([(500, [(200, 130), (500, 25)]), (0, [(0, 37), (0, 1)]), (33, [])]).to(
        "cuda"
    )
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
