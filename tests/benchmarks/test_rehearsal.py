"""The short form of `make gpu-rehearsal`, with the versions that are here and without peers; what it may let pass."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cases, gpu, peers, step_cases
from benchmarks.recording import recorded

ROOT = Path(gpu.__file__).parents[1]
# One of every kind: whole rows, a frozen head, a summary of the teacher, shared and missing rows, no gradient, labels.
KINDS = ("", "-frozen", "-expected", "-shared16", "-valid10", "-forward", "-cross-entropy")
LOSSES = tuple(f"A-bf16{kind}" for kind in KINDS)
SYSTEMS = ("products", "ours", "ours_expected_embedding", "ours_cross_entropy", "torch_linear_cross_entropy")
STEP = "qwen2.5-1.5b-sentence-d1"
TESTS = (
    "test_everything_at_once and sum and bfloat16 and jsd",
    "test_one_head and bfloat16 and forward_kl",
    "test_expected_embedding and bfloat16 and mean",
    "test_shared_teacher_rows and forward_kl",
    "test_a_model_under_autocast_equals_sdpa_with_gradients",
    "test_a_run_on_a_gpu_is_the_run_on_the_cpu and sdpa",
)


def rehearse(*arguments: str) -> str:
    # Of itself: beside a test run in several processes pytest-benchmark would measure nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "--rehearsal", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_tests():
    said = rehearse("-m", "gpu", "-rA", "-k", " or ".join(f"({test})" for test in TESTS), *map(str, gpu.tests()))
    for test in TESTS:
        assert re.search(rf"^PASSED \S*::{test.partition(' ')[0]}\b", said, re.MULTILINE), said


@pytest.mark.slow
def test_benchmarks(tmp_path):
    wanted = [f"[{case}-{system}]" for case in LOSSES for system in SYSTEMS]
    wanted += [f"[{STEP}-{system}]" for system in step_cases.ATTENTIONS]
    rehearse("benchmarks", "--results", str(tmp_path), "-k", " or ".join(wanted))
    rows = [row for path in tmp_path.glob("*/*.json") for row in json.loads(path.read_text())["rows"]]
    assert {row["case"] for row in rows} == {*LOSSES, STEP}
    for row in rows:
        expected = "measured"
        if row["system"] in ("ours_flex", "ours_varlen"):
            expected = "not available: needs CUDA"
        elif row["system"] == "torch_linear_cross_entropy" and not hasattr(torch.nn.functional, row["system"][6:]):
            expected = f"not available: torch {torch.__version__} has no F.linear_cross_entropy"
        assert row["status"] == expected, row


@pytest.mark.parametrize("real", [*cases.GPU_CASES, *step_cases.GPU_CASES], ids=lambda case: case.name)
def test_a_rehearsed_case_is_the_same_in_all_but_size(real):
    tiny = real.rehearsed()
    assert (tiny.name, tiny.systems, tiny.rank) == (real.name, real.systems, real.rank)
    if isinstance(real, cases.Case):
        assert tiny.units == pytest.approx(real.units, rel=0.1)
        assert 0 < tiny.rows <= 32


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (TypeError("unexpected keyword argument"), TypeError),
        (ModuleNotFoundError("No module named 'trl'"), ModuleNotFoundError),
        (peers.NotAvailable("needs CUDA"), pytest.skip.Exception),
    ],
)
def test_a_peer_that_fails_is_a_failure_of_the_rehearsal(error, raised):
    rows = []
    with pytest.raises(raised), recorded(rows, SimpleNamespace(extra_info={}), "trl_chunked", strict=True):
        raise error
    assert rows == [{"system": "trl_chunked", "status": peers.reason(error)}]


@pytest.fixture
def commands(monkeypatch):
    """Stand in for a GPU machine on which the tests take 100 seconds, and return the commands it is given."""
    given, clock = [], [0.0]

    def run(command, timeout, **_):
        given.append((command, timeout))
        clock[0] += 100
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return given


def test_benchmarks_have_the_time_that_tests_leave(commands):
    assert gpu.main(["--seconds", "400"]) == 0
    (tests, tests_limit), (benchmarks, benchmarks_limit) = commands
    assert tests_limit == 240
    assert {str(path) for path in gpu.tests()} <= set(tests)
    assert benchmarks[benchmarks.index("--seconds") + 1] == str(300.0 - gpu.LAST_CASE)
    assert benchmarks_limit == 300
    assert benchmarks[benchmarks.index("--results") + 1] == str(ROOT / "benchmarks" / "results")


def test_a_rehearsal_leaves_nothing_out(commands):
    assert gpu.main(["--rehearsal"]) == 0
    for command, limit in commands:
        assert "--rehearsal" in command
        assert "--seconds" not in command
        assert limit is None


@pytest.mark.parametrize("failing", ["tests", "benchmarks"])
def test_one_failure_fails_the_run(commands, monkeypatch, failing):
    monkeypatch.setattr(gpu, "run", lambda name, *_: commands.append(name) or name != failing)
    assert gpu.main([]) == 1
    assert commands == ["tests", "benchmarks"]


def test_without_a_gpu_nothing_is_skipped_in_silence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="gpu-rehearsal"):
        gpu.main([])


def test_a_few_kernels_run_under_compute_sanitizer_where_it_is_there(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.memcheck(60)
    assert capfd.readouterr().out == "memcheck: not run, compute-sanitizer is not there\n"
    tool = tmp_path / "compute-sanitizer"
    for code in (0, 1):
        tool.write_text(f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@"\nexit {code}\n')
        tool.chmod(0o755)
        assert gpu.memcheck(60) == (code == 0)
        said = capfd.readouterr().out
        assert said.startswith(f"1 --tool memcheck --error-exitcode 1 {sys.executable} -m pytest -m gpu -k ")
        assert said.count("memcheck: FAILED") == code
    tests = (ROOT / "tests/linear_kl/test_gpu.py").read_text(encoding="utf-8")
    assert all(f"def {name}(" in tests for name in gpu.MEMCHECKED.split(" or "))
