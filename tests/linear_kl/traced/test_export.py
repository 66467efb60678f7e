"""`fused_suffix_kl` in `torch.export`, and what makes it an operator: shapes without values, its registration."""

import io
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from disc_kernels import LogitTransform, fused_suffix_kl
from disc_kernels.linear_kl import compile as compile_module
from disc_kernels.linear_kl.inputs import SuffixKLInputs
from tests.linear_kl.traced.steps import Step, assert_same, step_outcome

V, D = 37, 8


def exported(step, inputs):
    rows, length = torch.export.Dim("rows", min=2), torch.export.Dim("length", min=2)
    return torch.export.export(step, inputs, dynamic_shapes=({1: length}, {1: length}, None, *({0: rows},) * 3))


@pytest.mark.parametrize("training", [True, False])
def test_export(training):
    """Runs at other sizes, and trains, even if it was exported where no gradient was asked for."""
    step = Step(temperature=2.0)
    with torch.set_grad_enabled(training):
        program = exported(step, step.inputs(5))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    module = torch.export.load(file).module()
    inputs = step.inputs(9)

    expected, got = (step_outcome(x, x, *inputs) for x in (step, module))
    assert_same(got, expected)


def test_exported_graph_has_one_operator():
    step = Step()
    targets = [str(node.target) for node in exported(step, step.inputs(5)).graph.nodes]
    assert targets.count("disc_kernels.fused_suffix_kl.default") == 1
    assert not any("softmax" in target for target in targets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shapes_without_values(device, dtype):
    """Also of tensors on a device that is not there."""
    with FakeTensorMode(), torch.no_grad():
        hidden = torch.empty(2, 7, D, dtype=dtype, device=device)
        weight = torch.empty(V, D, dtype=dtype, device=device)
        index = torch.arange(5, device=device)
        loss, stats = fused_suffix_kl(
            hidden,
            weight,
            hidden,
            weight,
            student_index=index,
            teacher_index=index,
            reduction="none",
            return_stats=True,
        )
    wide = torch.promote_types(dtype, torch.float32)
    for x in (loss, *stats):
        assert x.shape == (5,) and x.dtype == wide and x.device.type == device


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction, return_stats", [("mean", True), ("none", False)])
def test_opcheck(dtype, reduction, return_stats):
    def parameter(*shape):
        return torch.randn(*shape).to(dtype).requires_grad_()

    inputs = SuffixKLInputs(
        student_hidden=parameter(2, 5, D),
        student_weight=parameter(V, D),
        student_bias=parameter(V),
        teacher_hidden=torch.randn(2, 5, D).to(dtype),
        teacher_weight=torch.randn(V + 2, D).to(dtype),
        teacher_bias=None,
        topk_ids=None,
        student_index=torch.tensor([3, 1, 1]),
        teacher_index=torch.tensor([0, 9, 4]),
        row_weight=torch.rand(3),
        mask=None,
        temperature=2.0,
        divergence="jsd",
        beta=0.3,
        reduction=reduction,
        student_transform=LogitTransform(1.5),
        teacher_transform=LogitTransform(softcap=30.0),
        vocab_size=V - 1,
        max_workspace_bytes=None,
        return_stats=return_stats,
        impl=None,
        tail="bucket",
        autocast_dtype=None,
    )
    torch.library.opcheck(compile_module.operator, (*compile_module.flatten(inputs), [True, True, True]))


def test_double_backward_is_refused(reduction):
    """Also where the hidden states are no leaf, so that a part of the second gradient would be there, and wrong."""
    step = Step(reduction=reduction)
    module = exported(step, step.inputs(5)).module()
    loss, _ = module(*step.inputs(5))
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.autograd.grad(loss.sum(), [module.get_parameter("linear.weight")], create_graph=True)


def test_registering_the_operator_imports_no_triton():
    code = "import sys, torch, disc_kernels; torch.ops.disc_kernels.fused_suffix_kl; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
