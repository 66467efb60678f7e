"""Measure the memory of a call: every allocation and release that torch makes on the CPU is in the profiler's trace.

The running sum of them starts at zero, so what there was before does not count.
"""

import gc
import json
from dataclasses import dataclass

import pytest
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Memory:
    peak: int  # bytes above what there was before
    largest: int  # bytes of the largest single allocation
    left: int  # bytes still allocated at the end


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Return measure(function): it calls a function and measures the memory of the call and of what it returns."""
    _release_what_the_interpreter_holds(monkeypatch)
    gc.freeze()  # what is there already need not be looked at again

    def measured(function):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            kept = function()
        trace.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        memory = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
        now = peak = largest = 0
        for event in memory:
            now += event["args"]["Bytes"]
            peak, largest = max(peak, now), max(largest, event["args"]["Bytes"])
        del kept  # alive until here, so that results count
        return Memory(peak, largest, now)

    yield measured
    gc.unfreeze()


def _release_what_the_interpreter_holds(monkeypatch):
    """Free each launch's arguments, which Triton's interpreter leaves in a reference cycle; a GPU launch does not."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    launch = interpreter.GridExecutor.__call__

    def launch_and_collect(*args, **kwargs):
        launch(*args, **kwargs)
        gc.collect()

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_and_collect)
