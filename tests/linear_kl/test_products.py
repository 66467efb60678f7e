"""How many matrix products a call takes: what decides its speed on a GPU. A unit is 2 M V D operations."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from disc_kernels import expected_embedding_kl, fused_suffix_kl, teacher_summary
from disc_kernels.linear_kl import products

M, V, D = 48, 203, 16


def units(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / (2 * M * V * D)


@pytest.fixture
def tensors():
    return [torch.randn(n, D) for n in (M, V, M, V)]


@pytest.mark.parametrize(
    ("frozen", "reduction", "expected"), [(False, "mean", 4), (True, "mean", 3), (False, "none", 6), (True, "none", 5)]
)
def test_forward_and_backward(tensors, frozen, reduction, expected):
    tensors[0].requires_grad_()
    tensors[1].requires_grad_(not frozen)
    assert units(lambda: fused_suffix_kl(*tensors, reduction=reduction, impl="torch").sum().backward()) == expected


def test_forward(tensors):
    assert units(lambda: fused_suffix_kl(*tensors, impl="torch")) == 2


@pytest.mark.parametrize("shared", [4, 16])
def test_shared_teacher_rows(tensors, shared):
    """One of 4 products falls to a share; a chunk more may project the row on its border again."""
    tensors[0].requires_grad_()
    tensors[1].requires_grad_()
    index = torch.arange(M) // shared
    count = units(lambda: fused_suffix_kl(*tensors, teacher_index=index, impl="torch").backward())
    assert 3 + 1 / shared <= count <= 3 + 1 / shared + 1 / M


def test_rows_that_do_not_count_cost_nothing(tensors):
    tensors[0].requires_grad_()
    rows = torch.arange(0, M, 4)
    assert (
        units(lambda: fused_suffix_kl(*tensors, student_index=rows, teacher_index=rows, impl="torch").backward())
        == 0.75
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_head_form(tensors, reduction):
    student, head, teacher, teacher_head = tensors
    student.requires_grad_()
    summaries = []
    assert units(lambda: summaries.append(teacher_summary(teacher, teacher_head, head, impl="torch"))) == 2
    (summary,) = summaries
    loss = expected_embedding_kl(student, head, summary, reduction=reduction, impl="torch")
    step = units(
        lambda: expected_embedding_kl(student, head, summary, reduction=reduction, impl="torch").sum().backward()
    )
    assert step == 2
    assert units(lambda: loss.sum().backward()) == 0  # computed in the forward, whatever the reduction


@pytest.mark.parametrize("case", ["widened", "rounded", "strided"])
def test_weights_that_must_be_copied_are_copied_once(case, monkeypatch):
    """However many chunks there are; bf16 weights on a CPU, float32 ones under autocast, ones that no BLAS takes."""
    dtype = torch.bfloat16 if case == "widened" else torch.float32
    student, head, teacher, teacher_head = (torch.randn(n, D).to(dtype) for n in (M, V, M, V))
    if case == "strided":
        head, teacher_head = (torch.randn(V, 2 * D)[:, ::2] for _ in range(2))
    copies = []
    convert = products.to_product_dtype

    def counted(x, model):
        copies.append(x.shape) if x.shape == (V, D) else None
        return convert(x, model)

    monkeypatch.setattr(products, "to_product_dtype", counted)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "rounded"):
        loss = fused_suffix_kl(student.requires_grad_(), head.requires_grad_(), teacher, teacher_head, impl="torch")
    loss.backward()
    assert len(copies) == 2  # a model each
