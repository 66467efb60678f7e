"""Right results are measured, wrong ones are not, and what cannot run is a row that says why."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

from benchmarks import peers
from benchmarks import test_linear_kl as suite
from benchmarks.accuracy import Problem, Wrong
from benchmarks.cases import Case, Inputs
from benchmarks.recording import recorded

TINY = Case("tiny", 48, 32, 700, torch.float32)
VARIANTS = {
    "everything": {},
    "frozen": {"frozen_head": True},
    "forward": {"backward": False},
    "valid": {"valid_percent": 50},
    "shared": {"shared": 4},
    "bf16": {"dtype": torch.bfloat16},
}


class Untimed:
    """A benchmark fixture that is switched off."""

    stats = None

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, run, args, setup, rounds):
        setup()
        run(*args)


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.setattr(suite, "DEVICE", "cpu")
    return lambda case, system: suite.measure(Untimed(), Problem(case, "cpu"), system)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("system", [peers.products, peers.ours, peers.eager, peers.trl_chunked])
def test_right_results_are_measured(measure, fields, system):
    case = replace(TINY, **fields)
    try:
        row = measure(case, system)
    except ImportError as error:
        pytest.skip(str(error))
    assert row["status"] == "measured"
    if system is not peers.products:
        asked = {"loss"} | ({"hidden"} if case.backward else set())
        asked |= {"weight"} if case.backward and not case.frozen_head else set()
        assert set(row["errors"]) == set(row["float32_logits_errors"]) == asked
        assert row["bytes_above"] > 0


def test_expected_embedding(measure):
    row = measure(replace(TINY, frozen_head=True, summarised=True), peers.ours_expected_embedding)
    assert row["errors"]["hidden"] < 1e-5


@pytest.mark.parametrize("fields", [{}, {"frozen_head": True}, {"backward": False}], ids=str)
@pytest.mark.parametrize(
    "system", [peers.ours_cross_entropy, peers.eager_cross_entropy, peers.torch_linear_cross_entropy]
)
def test_cross_entropy(measure, fields, system):
    try:
        row = measure(replace(TINY, labelled=True, **fields), system)
    except peers.NotAvailable as absent:
        assert "linear_cross_entropy" in str(absent) and system is peers.torch_linear_cross_entropy
        assert not hasattr(torch.nn.functional, "linear_cross_entropy")
        return
    assert max(row["errors"].values()) < 1e-5


def wrong(x: Inputs, mutation: str) -> torch.Tensor:
    student, student_weight, teacher, teacher_weight = x.gathered()
    if mutation == "twice":
        return 2 * peers.full_logits(student, student_weight, teacher, teacher_weight)
    if mutation == "no gradient":
        return peers.full_logits(student, student_weight, teacher, teacher_weight).detach() + 0 * student.sum()
    if mutation == "zero gradient":
        zero = 0 * (student.sum() + student_weight.sum())
        return peers.full_logits(student, student_weight, teacher, teacher_weight).detach() + zero
    if mutation == "vocabulary tile":
        return peers.full_logits(student, student_weight[:-128], teacher, teacher_weight[:-128])
    if mutation == "off by one":
        return peers.full_logits(student, student_weight, teacher.roll(1, 0), teacher_weight)
    log_q, log_p = ((h @ w.T).log_softmax(-1) for h, w in ((student, student_weight), (teacher, teacher_weight)))
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()  # the other direction


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "mutation", ["twice", "no gradient", "zero gradient", "vocabulary tile", "off by one", "the other direction"]
)
def test_wrong_results_have_no_time(measure, mutation, dtype):
    with pytest.raises(Wrong, match=r"relative|no gradient"):
        measure(replace(TINY, dtype=dtype), lambda x: lambda: wrong(x, mutation))


def test_ours_has_to_be_accurate(measure):
    """Logits rounded to bfloat16 pass for a peer, not for ours."""
    case = replace(TINY, dtype=torch.bfloat16)
    measure(case, peers.eager)

    def ours(x: Inputs):
        return peers.eager(x)

    with pytest.raises(Wrong, match="float32 logits"):
        measure(case, ours)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ModuleNotFoundError("No module named 'trl'"), "not installed: No module named 'trl'"),
        (peers.NotAvailable("needs CUDA"), "not available: needs CUDA"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (Wrong("relative error of loss 1.0e+00"), "wrong: relative error of loss 1.0e+00"),
        (TypeError("first line\nsecond"), "failed: TypeError: first line"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_peer_that_cannot_run_is_a_row(monkeypatch, error, status):
    row = run_system(monkeypatch, "eager", error, expected=pytest.skip.Exception)
    assert row == {"system": "eager", "status": status, **TINY.describe()}


def test_ours_out_of_memory_is_a_row(monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory")
    assert run_system(monkeypatch, "ours", error, expected=pytest.skip.Exception)["status"] == "out of memory"


def test_ours_wrong_is_a_failure(monkeypatch):
    error = Wrong("relative error of loss 1.0e+00")
    assert run_system(monkeypatch, "ours", error, expected=Wrong)["status"].startswith("wrong: ")


def run_system(monkeypatch, name: str, error: Exception, expected: type[BaseException]) -> dict:
    """The row that is left of a system that raises when it is called."""
    rows = []

    benchmark = SimpleNamespace(extra_info={})

    def system(x):
        raise error

    monkeypatch.setattr(peers, name, system)
    monkeypatch.setattr(suite, "problem_of", lambda case: Problem(case, "cpu"))
    with pytest.raises(expected):
        suite.test_linear_kl(benchmark, partial(recorded, rows, benchmark), TINY, name)
    return rows[0]


@pytest.mark.parametrize("name", ["liger_fused", "fla_fused"])
def test_peers_for_cuda_say_so(name):
    with pytest.raises((peers.NotAvailable, ImportError), match=r"needs CUDA|liger"):
        getattr(peers, name)(TINY.inputs("cpu"))


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(peers.NotAvailable, match=r"no C\+\+ compiler"):
        peers.eager_compiled(TINY.inputs("cpu"))


@pytest.mark.slow
def test_the_suite_writes_its_results(tmp_path):
    wanted = "small-fp32-n128-products or small-fp32-n128-ours or gpt2-fp32-fla_fused"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-k", wanted, "--results", str(tmp_path)]
    # Of itself: beside a test run in several processes pytest-benchmark would measure nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    subprocess.run(command, check=True, env=environment | {"CUDA_VISIBLE_DEVICES": ""}, timeout=300)
    run = json.loads((tmp_path / "cpu" / "linear_kl.json").read_text())
    assert {row["system"]: row["status"] for row in run["rows"]} == {
        "fla_fused": "not available: needs CUDA",
        "products": "measured",
        "ours": "measured",
    }
    assert run["rows"][-1]["over_limit"] > 0  # how much is no test: other programs run beside this one
    assert run["environment"]["torch"] == version("torch")
    assert "| small-fp32-n128 |" in (tmp_path / "cpu" / "linear_kl.md").read_text()
