"""Heads that are quantised: those of teachers are dequantised, those of students refused."""

import pytest
import torch
from torch import nn

from disc_kernels import fused_suffix_kl
from disc_kernels.hf import check_output_head, output_head
from tests.hf.models import IDS, make


class StandsForFloats(nn.Parameter):
    """A weight as torchao's are: it claims a float dtype, and gives its numbers to who asks for them."""

    def dequantize(self):
        return self.numbers


def by_a_stand_in(model):
    weight = StandsForFloats(torch.zeros(96, 32), requires_grad=False)
    weight.numbers = model.lm_head.weight.detach()
    model.lm_head.weight = weight


def by_torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def by_bitsandbytes(kind, **options):
    def quantise(model):
        layer = getattr(pytest.importorskip("bitsandbytes").nn, kind)(32, 96, **options)
        layer.load_state_dict(model.lm_head.state_dict())
        model.lm_head = layer.to("cpu")

    return quantise


@pytest.mark.parametrize(
    ("quantise", "error"),
    [
        (by_a_stand_in, 0.0),
        (by_torchao, 0.01),
        (by_bitsandbytes("Linear8bitLt", has_fp16_weights=False), 0.01),
        (by_bitsandbytes("Linear4bit", compute_dtype=torch.float32), 0.2),
    ],
    ids=["stand-in", "torchao", "bitsandbytes 8 bits", "bitsandbytes 4 bits"],
)
def test_a_quantised_head(quantise, error):
    expected = make("phi").float()
    model = make("phi").float()
    quantise(model)
    with pytest.raises(ValueError, match=r"PhiForCausalLM: expected an output head that can be trained, .* quantised"):
        output_head(model)
    with torch.no_grad():
        output_head(model)
    model.requires_grad_(False)
    head = output_head(model)
    assert not head.weight.requires_grad and head.bias is not None
    torch.testing.assert_close(head.weight, expected.lm_head.weight.detach(), rtol=0, atol=error)
    hidden = torch.randn(3, 32)
    assert torch.isfinite(fused_suffix_kl(hidden, expected.lm_head.weight, hidden, head))
    if error:
        check_output_head(model, IDS)


def test_a_head_that_is_quantised_in_another_way_is_refused():
    model = make().float().requires_grad_(False)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="expected one quantised by torchao or bitsandbytes, got Linear"):
        output_head(model)
