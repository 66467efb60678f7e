"""Time and peak memory of forward + backward, ours and peers in one process on the same tensors.

    pytest benchmarks/ [--benchmark-json=FILE]

Correctness comes first: a wrong result has no time. `extra_info` has the peak memory above the inputs, and the time of
the matrix products alone, so that each row reads as a multiple of its limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from benchmarks import peers
from benchmarks.cases import CPU_CASES, GPU_CASES, Case
from benchmarks.memory import peak_bytes
from disc_kernels import fused_suffix_kl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = GPU_CASES if DEVICE == "cuda" else CPU_CASES
SYSTEMS = peers.EVERYWHERE + (peers.ON_CUDA_ONLY if DEVICE == "cuda" else ())


def synchronised(run: Callable[[], object]) -> None:
    run()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def products_seconds(case: Case) -> float:
    """The best of three of this case's matrix products, nothing else."""
    student, weight, *_ = (x.detach() for x in case.tensors(DEVICE))
    logits = student @ weight.T

    def once() -> None:
        for _ in range(2):
            torch.mm(student, weight.T, out=logits)
        logits @ weight
        if not case.frozen_head:
            logits.T @ student

    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        synchronised(once)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_backward(benchmark, case: Case, system: Callable[[], peers.Loss]) -> None:
    try:
        loss = system()
    except ImportError as error:
        pytest.skip(f"{system.__name__} is not installed: {error}")
    tensors = case.tensors(DEVICE)

    def step() -> torch.Tensor:
        for x in tensors:
            x.grad = None
        value = loss(*tensors)
        value.backward()
        return value

    with torch.no_grad():
        rows = slice(0, 16)
        few = tensors[0][rows], tensors[1], tensors[2][rows], tensors[3]
        expected = fused_suffix_kl(*(x.double() for x in few), impl="reference")
    torch.testing.assert_close(loss(*few).double().detach(), expected, rtol=5e-3, atol=0)

    benchmark.extra_info |= {
        "rows": case.rows,
        "hidden": case.hidden,
        "vocab": case.vocab,
        "dtype": str(case.dtype),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "products_seconds": products_seconds(case),
        "peak_bytes": peak_bytes(step, DEVICE),
        "gradient_bytes": sum(x.numel() * x.element_size() for x in tensors if x.requires_grad),
    }
    benchmark.pedantic(lambda: synchronised(step), rounds=3, warmup_rounds=1)
