"""Emulate on the CPU the products of 16-bit operands with float32 results that CUDA has: the same numbers, widened."""

import torch

from disc_kernels.linear_kl import gradients, inputs, products


def emulate(monkeypatch):
    """Let products take 16-bit operands on the CPU; return a list that each product's (rows, columns) is added to."""
    shapes = []

    def product_dtype(side):
        return side.operand_dtype if side.accumulate_dtype == torch.float32 else side.accumulate_dtype

    def multiply_into(out, a, b, *, accumulate=False):
        shapes.append(tuple(out.shape))
        product = a.to(out.dtype) @ b.to(out.dtype)
        out.add_(product) if accumulate else out.copy_(product)

    monkeypatch.setattr(inputs.Projection, "product_dtype", property(product_dtype))
    for module in (products, gradients):
        monkeypatch.setattr(module, "multiply_into", multiply_into)
    return shapes
