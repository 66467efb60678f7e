"""Run the tests marked gpu, a few under compute-sanitizer, then the benchmarks, within a budget; or rehearse on a CPU.

    python -m benchmarks.gpu                # `make gpu`
    python -m benchmarks.gpu --rehearsal    # `make gpu-rehearsal`, at tiny sizes with Triton's interpreter

Tests come first: without them no figure may be believed. What they leave of the budget is the benchmarks', whose least
important cases are left out where it does not suffice.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
SECONDS = 540  # enough for the tests, most of whose time is compilation, and the most important cases
TESTS_SHARE = 0.6  # of the budget, at most: tests that hang must leave time to measure
MEMCHECK_SHARE = 0.1  # of the budget, at most, for a few of the kernels' tests under compute-sanitizer
MEMCHECKED = "test_vocabulary or test_top_k"  # vocabularies that end within a tile, and gathered entries
LAST_CASE = 40  # seconds that are kept for the case that is being measured when time is up, and for the tables


def run(
    name: str,
    seconds: float | None,
    arguments: Sequence[str | Path],
    environment: dict[str, str],
    under: Sequence[str] = (),
) -> bool:
    """Run pytest, under another program if one is given, for at most so many seconds; return whether all passed."""
    start = time.monotonic()
    command = [*under, sys.executable, "-m", "pytest", *map(str, arguments)]
    try:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, timeout=seconds)
    except subprocess.TimeoutExpired:
        print(f"{name}: ended after {seconds:.0f} s, which is all the time they have", flush=True)
        return False
    print(f"{name}: {'passed' if done.returncode == 0 else 'FAILED'} in {time.monotonic() - start:.0f} s", flush=True)
    return done.returncode == 0


def tests() -> list[Path]:
    return sorted(ROOT.glob("tests/*/test_gpu.py"))


def memcheck(seconds: float) -> bool:
    """Look for reads and writes out of bounds in a few of the kernels' tests, where there is compute-sanitizer."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("memcheck: not run, compute-sanitizer is not there", flush=True)
        return True
    checked = ["-m", "gpu", "-k", MEMCHECKED, ROOT / "tests/linear_kl/test_gpu.py"]
    # Out of bounds of one tensor would otherwise be within the block that torch's allocator keeps.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return run("memcheck", seconds, checked, environment, [sanitizer, "--tool", "memcheck", "--error-exitcode", "1"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearsal", action="store_true", help="on the CPU, at tiny sizes, without a budget")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="folder of the results (default: benchmarks/results)")
    asked = parser.parse_args(arguments)
    start = time.monotonic()
    if not asked.rehearsal and not torch.cuda.is_available():
        sys.exit("There is no CUDA device here. On a CPU: make gpu-rehearsal")
    options: list[str | Path] = ["--rehearsal"] if asked.rehearsal else []
    environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if asked.rehearsal else {}
    results = asked.results or ROOT / ("build/rehearsal" if asked.rehearsal else "benchmarks/results")

    # Each test compiles kernels of its own, which takes most of the time, on one core.
    parallel = ["-n", "auto", "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    passed = run(
        "tests",
        None if asked.rehearsal else TESTS_SHARE * asked.seconds,
        ["-m", "gpu", *options, *parallel, *tests()],
        environment | {"OMP_NUM_THREADS": "1"},
    )
    left = None
    if not asked.rehearsal:
        passed &= memcheck(MEMCHECK_SHARE * asked.seconds)
        left = asked.seconds - (time.monotonic() - start)
        options += ["--seconds", str(max(left - LAST_CASE, 0))]
    measured = run("benchmarks", left, ["benchmarks", "--results", results, *options], environment)
    return 0 if passed and measured else 1


if __name__ == "__main__":
    sys.exit(main())
