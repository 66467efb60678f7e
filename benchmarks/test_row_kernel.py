"""Measure the kernel that compares rows of logits, beside the least time that its instructions and bytes allow.

The least is counted from the compiled kernel, for an H200, also where there is no GPU; the time is measured on CUDA.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest

from benchmarks import peers
from benchmarks.cases import LLAMA_8B, QWEN_7B, Case
from benchmarks.row_kernel import H200, passes
from benchmarks.test_linear_kl import DEVICE, forward_backward, problem_of

KERNEL = "_compare_rows_kernel"
counted = cache(passes)


@pytest.mark.parametrize("case", [QWEN_7B, LLAMA_8B], ids=lambda case: case.name)
def test_row_kernel(benchmark: Any, record: Any, case: Case) -> None:
    with record(system="ours", **case.describe()) as row:
        both = benchmark.pedantic(counted, rounds=1)
        each = [one.seconds(case.rows * case.vocab, H200) for one in both]
        row |= {
            "instructions": sum(one.instructions for one in both),
            "bytes": sum(one.bytes for one in both),
            # A pass over logits that were kept on the chip would read none of them.
            "bytes_read_once": sum(one.bytes for one in both) - 8,
            "least_seconds": {unit: sum(seconds[unit] for seconds in each) for unit in each[0]},
            "seconds": kernel_seconds(case) if DEVICE == "cuda" else None,
            "status": "measured",
        }


def kernel_seconds(case: Case) -> float:
    """Return the seconds of the row kernel in a forward of the loss, after one that compiles it."""
    from torch.profiler import ProfilerActivity, profile

    x = problem_of(case).inputs
    step = partial(forward_backward, x, peers.ours(x))
    step()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
    [kernel] = [event for event in found.key_averages() if KERNEL in event.key]
    return kernel.device_time_total / 1e6
