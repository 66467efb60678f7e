"""Every shape that is measured, once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    name: str
    rows: int  # M
    hidden: int  # D
    vocab: int  # V
    dtype: torch.dtype
    frozen_head: bool = False

    @property
    def unit_flops(self) -> int:
        """One product of hidden states with a head."""
        return 2 * self.rows * self.hidden * self.vocab

    @property
    def products(self) -> int:
        """Of this many units a forward and backward consist: two logits, the hidden and the weight gradient."""
        return 3 if self.frozen_head else 4

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Student hidden and weight, teacher hidden and weight; logits have a standard deviation of about 2."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) * scale).to(self.dtype)

        scale = 2 / self.hidden**0.5
        return (
            normal(self.rows, self.hidden).requires_grad_(),
            normal(self.vocab, self.hidden, scale=scale).requires_grad_(not self.frozen_head),
            normal(self.rows, self.hidden),
            normal(self.vocab, self.hidden, scale=scale),
        )


CPU_CASES = (
    Case("gpt2-fp32", 512, 896, 50257, torch.float32),
    Case("gpt2-fp32-frozen", 512, 896, 50257, torch.float32, frozen_head=True),
)
GPU_CASES = (
    Case("A-bf16", 8192, 3584, 152064, torch.bfloat16),
    Case("B-bf16", 4096, 4096, 128256, torch.bfloat16),
    Case("A-bf16-frozen", 8192, 3584, 152064, torch.bfloat16, frozen_head=True),
    Case("qwen2.5-0.5b-bf16", 8192, 896, 151936, torch.bfloat16),
    Case("gemma-bf16", 4096, 2304, 262144, torch.bfloat16),
)
