"""16-bit operands on tensor cores: the probabilities go there in two parts, and rounded once would show."""

import pytest
import torch

from disc_kernels import LogitTransform
from disc_kernels.frozen_head import summary
from disc_kernels.linear_kl import inputs
from disc_kernels.linear_kl.rows import torch_backend
from tests.frozen_head.calls import everything, run, simple
from tests.linear_kl.oracle import assert_accurate
from tests.linear_kl.tensor_cores import emulate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def tensor_cores(monkeypatch):
    emulate(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_16_bit_probabilities(tensor_cores, fused_impl, dtype, reduction):
    p = everything(dtype, reduction=reduction, vocab=4100, teacher_vocab=4100, vocab_size=4099)
    assert_accurate(run(p, fused_impl), p)


def test_probabilities_rounded_once_would_show(tensor_cores, monkeypatch):
    """The value needs the embedding in float32 accuracy."""
    p = simple(dtype=torch.bfloat16)
    assert_accurate(run(p, "torch"), p)
    monkeypatch.setattr(summary, "splits", lambda head: False)
    with pytest.raises(AssertionError, match=r"^loss: off by"):
        assert_accurate(run(p, "torch"), p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalise_rows_in_place(fused_impl, dtype):
    """Probabilities over the front of their own logits, rounded to half a last bit; nothing is written beside them."""
    vocab, stride = 4099, 4104
    p = simple(rows=5, vocab=vocab, dtype=dtype, bias=True)
    backend = pytest.importorskip(f"disc_kernels.linear_kl.rows.{fused_impl}_backend")
    side = inputs.Projection(
        *(p.tensors[f"student_{name}"] for name in ("hidden", "weight", "bias")), None,
        LogitTransform(1.3, 4.0), dtype, torch.float32, vocab,
    )  # fmt: skip
    logits = 3 * torch.randn(5, stride)
    u = 4 * torch.tanh(1.3 * (logits[:, :vocab].double() + side.bias.double()) / 4) / 0.8
    log_p = u.log_softmax(-1)
    other = torch.randn(vocab)
    other[7] = -torch.inf
    buffer = logits.clone()
    beyond = buffer.view(dtype)[:, vocab : buffer.view(dtype).shape[1] // 2].clone()
    weights = buffer.view(dtype)[:, :vocab]
    remainder = torch.empty(5, stride, dtype=dtype)[:, :vocab] if dtype != torch.float32 else None
    maximum, log_sum, entropy, expected_bias, total = numbers = torch.empty(5, 5)
    backend.normalise_rows(buffer[:, :vocab], side, 0.8, 2, numbers, weights, remainder, other_bias=other)
    torch.testing.assert_close(maximum.double() + log_sum.double(), u.logsumexp(-1), rtol=0, atol=4e-6)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=0, atol=4e-6)
    assert torch.equal(expected_bias, torch.full((5,), -torch.inf))
    stored, size = weights.double(), total.double().unsqueeze(1)
    rounding = (stored / size / log_p.exp() - 1).abs().max()
    assert rounding < torch.finfo(dtype).eps + 1e-5  # half of it on a GPU: the interpreter truncates
    whole = stored if remainder is None else stored + remainder.double()
    assert (whole / size / log_p.exp() - 1).abs().max() < 3e-5
    assert (whole.sum(-1) / total.double() - 1).abs().max() < 1e-6
    assert stored.amax(-1).tolist() == [torch_backend.LARGEST_WEIGHT] * 5  # the largest is exact
    assert torch.equal(buffer.view(dtype)[:, vocab : vocab + beyond.shape[1]], beyond)
