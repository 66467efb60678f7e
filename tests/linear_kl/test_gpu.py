"""The same problems and the same comparison on a GPU, and what only a GPU shows: peak memory, host synchronisations."""

import subprocess
import sys

import pytest
import torch

from disc_kernels import fused_suffix_kl

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["torch", "triton"])
def gpu_impl(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_everything_at_once(build_everything, run, assert_accurate, gpu_impl, divergence, dtype, reduction):
    problem = build_everything(dtype, divergence=divergence, reduction=reduction)
    assert_accurate(run(problem, gpu_impl, device="cuda"), problem)


@pytest.mark.parametrize("vocab", [31, 32003, 131075])
def test_vocabulary(build, run, assert_accurate, gpu_impl, divergence, vocab):
    problem = build(rows=33, width=64, vocab=vocab, dtype=torch.bfloat16, divergence=divergence, temperature=2.0)
    assert_accurate(run(problem, gpu_impl, device="cuda"), problem)


def test_many_small_chunks(build_everything, run, assert_accurate, smallest_workspace, gpu_impl, divergence):
    problem = build_everything(torch.bfloat16, divergence=divergence)
    smallest = smallest_workspace(problem.on("cuda"), gpu_impl)
    problem = problem.with_options(max_workspace_bytes=2 * smallest)
    assert_accurate(run(problem, gpu_impl, device="cuda"), problem)


@pytest.fixture
def large():
    """M 4096, V 50,000: the logits of one model are 800 MB in float32, the workspace is 64 MiB."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = {"student_hidden": (4096, 512), "student_weight": (50_000, 512)}
    shapes |= {name.replace("student", "teacher"): shape for name, shape in shapes.items()}
    tensors = {
        name: torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16).mul_(0.2)
        for name, shape in shapes.items()
    }
    for name in ("student_hidden", "student_weight"):
        tensors[name].requires_grad_()
    return tensors


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak(large, gpu_impl, reduction):
    workspace = 2**26

    def step():
        loss = fused_suffix_kl(**large, reduction=reduction, max_workspace_bytes=workspace, impl=gpu_impl)
        assert isinstance(loss, torch.Tensor)
        loss.backward(torch.ones_like(loss))

    step()  # whatever libraries allocate once
    for tensor in large.values():
        tensor.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    gradients = sum(t.numel() * t.element_size() for t in large.values() if t.requires_grad)
    accumulating = 4 * large["student_weight"].numel()
    rounding = 512 * 16  # the allocator's blocks
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 4 * 4096 + gradients + accumulating + workspace + rounding


def test_host_does_not_wait(large, gpu_impl):
    rows, weight = torch.randint(4096, (1000,), device="cuda"), torch.rand(1000, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = fused_suffix_kl(
            **large, student_index=rows, teacher_index=rows.flip(0), row_weight=weight, impl=gpu_impl
        )
        assert isinstance(loss, torch.Tensor)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_index_out_of_range_stops_the_device():
    """In a process of its own: the device is of no use afterwards."""
    code = (
        "import torch; from disc_kernels import fused_suffix_kl as f;"
        "t = torch.ones(4, 8, device='cuda'); i = torch.tensor([0, 4], device='cuda');"
        "f(t, t, t, t, student_index=i, teacher_index=i); torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "student_index" in done.stderr
