"""The same problems and the same comparison on a GPU, and what only a GPU shows: peak memory, host synchronisations."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from disc_kernels import fused_suffix_kl, fused_topk_kl
from tests.frozen_head import calls
from tests.gpu import DEVICE, needs_cuda
from tests.linear_kl import topk_cases
from tests.linear_kl.oracle import assert_accurate, build, build_everything, run, smallest_workspace
from tests.linear_kl.ranks import test_vocab_group, world

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["torch", "triton"])
def gpu_impl(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_everything_at_once(gpu_impl, divergence, dtype, reduction):
    problem = build_everything(dtype, divergence=divergence, reduction=reduction)
    assert_accurate(run(problem, gpu_impl, device=DEVICE), problem)


@pytest.mark.parametrize(
    "vocab", [31, 32003, pytest.param(131075, marks=needs_cuda("Triton's interpreter takes minutes"))]
)
def test_vocabulary(gpu_impl, divergence, vocab):
    rows = 33 if DEVICE == "cuda" else 3
    problem = build(rows=rows, width=64, vocab=vocab, dtype=torch.bfloat16, divergence=divergence, temperature=2.0)
    assert_accurate(run(problem, gpu_impl, device=DEVICE), problem)


def test_many_small_chunks(gpu_impl, divergence):
    problem = build_everything(torch.bfloat16, divergence=divergence)
    smallest = smallest_workspace(problem.on(DEVICE), gpu_impl)
    problem = problem.with_options(max_workspace_bytes=2 * smallest)
    assert_accurate(run(problem, gpu_impl, device=DEVICE), problem)


def test_shared_teacher_rows(gpu_impl, divergence):
    """An index on the host shows which rows repeat; one on the device keeps all teacher rows, which fit."""
    index = (torch.arange(48) * 5) % 6
    problem = build(rows=48, width=64, vocab=3001, teacher_rows=6, dtype=torch.bfloat16, divergence=divergence)
    problem = problem.with_options(teacher_index=index, reduction="sum")
    got = run(problem, gpu_impl, device=DEVICE)
    assert_accurate(got, problem)
    leaves = problem.on(DEVICE).leaves()
    loss = fused_suffix_kl(**leaves, teacher_index=index, divergence=divergence, reduction="sum", impl=gpu_impl)
    assert isinstance(loss, torch.Tensor)
    loss.backward(torch.full_like(loss, problem.upstream))
    gradients = {name: leaves[name].grad.cpu() for name in got.gradients}
    assert_accurate(replace(got, loss=loss.detach().cpu(), gradients=gradients), problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_head(gpu_impl, divergence, dtype):
    problem = build(rows=33, width=64, vocab=3001, dtype=dtype, divergence=divergence).on(DEVICE)
    problem = problem.with_tensors(teacher_weight=problem.tensors["student_weight"])
    assert_accurate(run(problem, gpu_impl, device=DEVICE), problem.on("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_expected_embedding(gpu_impl, dtype, reduction):
    problem = calls.everything(dtype, reduction=reduction)
    assert_accurate(calls.run(problem, gpu_impl, device=DEVICE), problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_top_k(gpu_impl, divergence, tail, dtype):
    case = topk_cases.everything(dtype, divergence=divergence, tail=tail)
    topk_cases.assert_accurate([x.cpu() for x in case.on(DEVICE).fused(gpu_impl)], case)


def test_given_logits(gpu_impl, divergence):
    """Of a cache in bfloat16, with entries that have no probability."""
    problem = build(rows=33, width=64, vocab=3001, divergence=divergence).on(DEVICE)
    logits = 2 * torch.randn(33, 3001, device=DEVICE).bfloat16()
    if divergence != "reverse_kl":
        logits[:, ::5] = -torch.inf
    problem = problem.with_tensors(teacher_hidden=logits).with_options(teacher_weight=None)
    got, on_cpu = run(problem, gpu_impl, device=DEVICE), run(problem.on("cpu"), "torch")
    torch.testing.assert_close(got.loss, on_cpu.loss, rtol=1e-5, atol=1e-6)
    for name, gradient in got.gradients.items():
        torch.testing.assert_close(gradient, on_cpu.gradients[name], rtol=1e-4, atol=1e-6)


def test_two_ranks_on_one_gpu(tmp_path):
    """What `ranks/test_vocab_group.py` does with processes on the CPU: two ranks, over gloo, by Triton."""
    results = world.run(test_vocab_group.__name__, 2, tmp_path, DEVICE)
    names = [name for name, case in test_vocab_group.CASES.items() if case.impl == "triton"]
    assert names
    for name in names:
        test_vocab_group.assert_as_one_process([result["answers"][name] for result in results], name)


def test_compiled(gpu_impl):
    problem = build(rows=33, width=64, vocab=3001, dtype=torch.bfloat16).on(DEVICE)
    compiled = torch.compile(fused_suffix_kl, fullgraph=True)
    gradients = []
    for call in (fused_suffix_kl, compiled):
        leaves = problem.leaves()
        call(**leaves, impl=gpu_impl).backward()
        gradients.append(leaves["student_weight"].grad)
    torch.testing.assert_close(*gradients)


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


@needs_cuda("peak memory of the device")
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


@needs_cuda("the host's waiting")
@pytest.mark.parametrize("index_device", ["cpu", "cuda"])
def test_host_does_not_wait(large, gpu_impl, index_device):
    rows, weight = torch.randint(4096, (1000,), device=index_device), torch.rand(1000, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = fused_suffix_kl(
            **large, student_index=rows, teacher_index=rows.flip(0), row_weight=weight, impl=gpu_impl
        )
        assert isinstance(loss, torch.Tensor)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda("the host's waiting")
def test_host_does_not_wait_for_a_top_k_or_logits(large, gpu_impl):
    student = {name: large[name] for name in ("student_hidden", "student_weight")}
    logits = torch.randn(4096, 50_000, device="cuda", dtype=torch.bfloat16)
    logprobs, ids = logits.float().log_softmax(-1).topk(20)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_topk_kl(**student, topk_ids=ids, topk_logprobs=logprobs, impl=gpu_impl).backward()
        loss = fused_suffix_kl(**student, teacher_hidden=logits, teacher_weight=None, impl=gpu_impl)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda("assertions on the device")
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
