"""What the frozen-head form refuses, and the memory it keeps to."""

import gc
import json
import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from disc_kernels import LogitTransform, TeacherSummary, expected_embedding_kl, teacher_summary

SUMMARY = TeacherSummary(torch.zeros(4, 8), torch.zeros(4), torch.zeros(4))
LOSS = {"student_hidden": torch.zeros(4, 8), "student_weight": torch.zeros(10, 8), "summary": SUMMARY}
MAKING = {
    "teacher_hidden": torch.zeros(4, 6),
    "teacher_weight": torch.zeros(10, 6),
    "student_weight": torch.zeros(10, 8),
}


def rows(*numbers):
    return torch.tensor(numbers)


BAD_LOSS = {
    "not a summary": ({"summary": torch.zeros(4, 8)}, TypeError, "summary: expected a TeacherSummary, got Tensor"),
    "a plain tuple": ({"summary": tuple(SUMMARY)}, TypeError, "summary: expected a TeacherSummary, got tuple"),
    "no tensor in it": (
        {"summary": SUMMARY._replace(bias=None)},
        TypeError,
        "summary.bias: expected a tensor, got NoneType",
    ),
    "16-bit summary": (
        {"summary": TeacherSummary(*(x.bfloat16() for x in SUMMARY))},
        TypeError,
        "summary.embedding: expected float32 or float64, got torch.bfloat16",
    ),
    "mixed dtypes": (
        {"summary": SUMMARY._replace(entropy=torch.zeros(4).double())},
        TypeError,
        "summary.entropy: expected torch.float32, as summary.embedding, got torch.float64",
    ),
    "another device": (
        {"summary": SUMMARY._replace(entropy=torch.zeros(4, device="meta"))},
        ValueError,
        "summary.entropy: expected device cpu, as the hidden states, got meta",
    ),
    "another width": (
        {"summary": SUMMARY._replace(embedding=torch.zeros(4, 7))},
        ValueError,
        "summary.embedding: expected shape [S, 8], as wide as student_weight, got [4, 7]",
    ),
    "another length": (
        {"summary": SUMMARY._replace(bias=torch.zeros(3))},
        ValueError,
        "summary.bias: expected shape [4], as summary.embedding [4, 8], got [3]",
    ),
    "rows that do not pair": (
        {"student_index": rows(0, 1)},
        ValueError,
        "summary: expected 2 rows, one for each row of student_index, got 4",
    ),
    "index that does not pair": (
        {"summary_index": rows(0, 1)},
        ValueError,
        "summary_index: expected 4 rows, one for each row of student_hidden, got 2",
    ),
    "summary_index out of range": (
        {"summary_index": rows(0, 1, 2, 4)},
        ValueError,
        "summary_index: expected rows from 0 to 3",
    ),
    "negative summary_index": ({"summary_index": rows(0, 1, 2, -1)}, ValueError, "summary_index"),
    "summary_index of int32": ({"summary_index": rows(0, 1, 2, 3).int()}, TypeError, "summary_index: expected dtype"),
    "summary_index of two dimensions": ({"summary_index": rows([0, 1])}, ValueError, "summary_index: expected shape"),
    "student_index out of range": ({"student_index": rows(0, 1, 2, 4)}, ValueError, "student_index"),
    "row_weight": ({"row_weight": torch.ones(3)}, ValueError, "row_weight: expected shape [4]"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature: expected a positive number, got 0.0"),
    "student_scale 0": ({"student_scale": 0}, ValueError, "student_scale: expected a number other than 0, got 0"),
    "student_scale NaN": ({"student_scale": float("nan")}, ValueError, "student_scale: expected a finite number"),
    "student_scale of a word": ({"student_scale": "1"}, TypeError, "student_scale: expected a number, got str"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'avg'"),
    "vocab_size": ({"vocab_size": 11}, ValueError, "vocab_size: expected at most 10"),
    "student_bias": ({"student_bias": torch.zeros(9)}, ValueError, "student_bias: expected shape [10], got [9]"),
    "hidden size": ({"student_hidden": torch.zeros(4, 7)}, ValueError, "student_hidden: expected last dimension 8"),
    "hidden type": ({"student_hidden": [1.0]}, TypeError, "student_hidden: expected a tensor, got list"),
    "impl": ({"impl": "cuda"}, ValueError, "impl: expected one of 'triton', 'torch', 'reference', got 'cuda'"),
    "max_workspace_bytes": ({"max_workspace_bytes": 0}, ValueError, "max_workspace_bytes: expected at least 1, got 0"),
    "vocab_group": ({"vocab_group": object()}, NotImplementedError, "vocab_group"),
}
BAD_MAKING = {
    "transform": ({"teacher_transform": 30.0}, TypeError, "teacher_transform: expected a LogitTransform, got float"),
    "temperature": ({"temperature": -1}, ValueError, "temperature: expected a positive number, got -1.0"),
    "vocabularies": ({"student_weight": torch.zeros(12, 8)}, ValueError, "vocab_size: expected an int"),
    "vocab_size": ({"vocab_size": 11}, ValueError, "vocab_size: expected at most 10"),
    "student_weight type": ({"student_weight": None}, TypeError, "student_weight: expected a tensor, got NoneType"),
    "student_weight of one dimension": (
        {"student_weight": torch.zeros(8)},
        ValueError,
        "student_weight: expected shape",
    ),
    "student_weight of no dimension": (
        {"student_weight": torch.zeros(())},
        ValueError,
        "student_weight: expected shape",
    ),
    "student_weight of ints": ({"student_weight": torch.zeros(10, 8).int()}, TypeError, "expected float16, bfloat16"),
    "student_weight elsewhere": ({"student_weight": torch.zeros(10, 8, device="meta")}, ValueError, "device cpu"),
    "student_bias": ({"student_bias": torch.zeros(9)}, ValueError, "student_bias: expected shape [10], got [9]"),
    "teacher_bias": ({"teacher_bias": torch.zeros(9)}, ValueError, "teacher_bias: expected shape [10], got [9]"),
    "teacher_hidden": ({"teacher_hidden": torch.zeros(4, 5)}, ValueError, "teacher_hidden: expected last dimension 6"),
    "teacher_index": ({"teacher_index": rows(4)}, ValueError, "teacher_index: expected rows from 0 to 3"),
    "impl": ({"impl": "cuda"}, ValueError, "impl: expected one of"),
    "vocab_group": ({"vocab_group": object()}, NotImplementedError, "vocab_group"),
}


@pytest.mark.parametrize("changed, error, message", BAD_LOSS.values(), ids=BAD_LOSS.keys())
def test_bad_loss(changed, error, message):
    expected_embedding_kl(**LOSS)
    with pytest.raises(error, match=re.escape(message)):
        expected_embedding_kl(**{**LOSS, **changed})


@pytest.mark.parametrize("changed, error, message", BAD_MAKING.values(), ids=BAD_MAKING.keys())
def test_bad_summary(changed, error, message):
    teacher_summary(**MAKING)
    with pytest.raises(error, match=re.escape(message)):
        teacher_summary(**{**MAKING, **changed})


@pytest.mark.parametrize("name", ["student_weight", "student_bias"])
def test_a_head_that_learns_is_refused(name):
    learning = {name: torch.zeros((10, 8) if name == "student_weight" else 10, requires_grad=True)}
    with pytest.raises(ValueError, match=rf"^{name}: expected a tensor without requires_grad.*use fused_suffix_kl"):
        expected_embedding_kl(**{**LOSS, **learning})
    with torch.no_grad():
        expected_embedding_kl(**{**LOSS, **learning})


def test_triton_is_refused_on_the_cpu_without_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for call, arguments in ((expected_embedding_kl, LOSS), (teacher_summary, MAKING)):
        with pytest.raises(ValueError, match=r"impl: expected CUDA tensors \(or TRITON_INTERPRET=1\)"):
            call(**arguments, impl="triton")


# ---------------------------------------------------------------------------------------------------------------------
# Memory: every allocation and release that torch makes on the CPU is in the profiler's trace.


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """(peak bytes above what there was before, bytes of the largest allocation) of a call."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    launch = interpreter.GridExecutor.__call__

    def launch_and_collect(*args, **kwargs):  # the interpreter leaves a launch's arguments in a reference cycle
        launch(*args, **kwargs)
        gc.collect()

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_and_collect)
    gc.freeze()

    def measured(function):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            kept = function()
        trace.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        now = peak = largest = 0
        for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
            now += event["args"]["Bytes"]
            peak, largest = max(peak, now), max(largest, event["args"]["Bytes"])
        del kept  # alive until here, so that results count
        return peak, largest

    yield measured
    gc.unfreeze()


M, V = 48, 1003


def inputs(dtype=torch.float32, width=8, teacher_width=12, vocab=V, rows=M):
    shapes = {
        "student_hidden": (rows, width),
        "student_weight": (vocab, width),
        "teacher_hidden": (rows, teacher_width),
        "teacher_weight": (vocab, teacher_width),
    }
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def smallest(call, *arguments, **options):
    with pytest.raises(ValueError, match="max_workspace_bytes: expected at least") as refused:
        call(*arguments, **options, max_workspace_bytes=1)
    return int(re.search(r"at least (\d+)", str(refused.value)).group(1))


CASES = {
    "float32": ({}, {}),
    "bfloat16": ({"dtype": torch.bfloat16, "vocab": 131, "rows": 16}, {}),
    "autocast": ({"vocab": 131, "rows": 16}, {"autocast": torch.bfloat16}),
    "wide student": ({"width": 96, "teacher_width": 4, "vocab": 251}, {}),
    "wide teacher": ({"width": 4, "teacher_width": 96, "vocab": 251}, {}),
    "many rows": ({"vocab": 67, "rows": 200}, {}),
}
# Triton's interpreter is slow, and its launches differ in nothing but what they do not allocate.
RUNS = [
    pytest.param("torch", workspaces, *case, id=f"torch-{workspaces}-{name}")
    for workspaces in (1, 3, 1000)
    for name, case in CASES.items()
]
RUNS += [pytest.param("triton", 3, *CASES["bfloat16"], id="triton-3-bfloat16")]


@pytest.mark.parametrize("impl, workspaces, shape, how", RUNS)
def test_peak_of_a_summary(measure, impl, shape, how, workspaces):
    t = inputs(**shape)
    given = (t["teacher_hidden"], t["teacher_weight"], t["student_weight"])
    options = {"student_bias": torch.randn(len(given[1])), "teacher_transform": LogitTransform(2.0, 9.0)}

    def make(*tensors, **more):
        with torch.autocast("cpu", how.get("autocast"), enabled="autocast" in how):
            return teacher_summary(*tensors, **options, impl=impl, **more)

    workspace = workspaces * smallest(make, *given)
    peak, largest = measure(lambda: make(*given, max_workspace_bytes=workspace))
    outputs = 4 * len(given[0]) * (given[2].shape[1] + 2)
    assert peak <= outputs + workspace
    assert largest < 4 * len(given[0]) * len(given[1])


@pytest.mark.parametrize("impl, workspaces, shape, how", RUNS)
@pytest.mark.parametrize("chosen", [False, True], ids=["all rows", "chosen rows"])
def test_peak_of_a_step(measure, impl, shape, how, workspaces, chosen):
    """Workspace, statistics, the gradient, and the rows of it that are kept for the backward."""
    t = inputs(**shape)
    rows = len(t["student_hidden"])
    hidden, weight = t["student_hidden"].requires_grad_(), t["student_weight"]
    summary = TeacherSummary(torch.randn(rows, weight.shape[1]), torch.zeros(rows), torch.zeros(rows))
    options = {"student_bias": torch.randn(len(weight)), "return_stats": True}
    if chosen:
        options |= {"student_index": torch.randint(rows, (rows,)), "summary_index": torch.randint(rows, (rows,))}
        options |= {"row_weight": torch.rand(rows)}

    def forward(**more):
        with torch.autocast("cpu", how.get("autocast"), enabled="autocast" in how):
            return expected_embedding_kl(hidden, weight, summary, **options, impl=impl, **more)

    def step(**more):
        loss, stats = forward(**more)
        loss.backward()
        return loss, stats

    workspace = workspaces * smallest(forward)
    peak, largest = measure(lambda: step(max_workspace_bytes=workspace))
    gradient = hidden.numel() * hidden.element_size()
    kept = rows * hidden.shape[1] * hidden.element_size()
    assert peak <= 4 * (1 + 4 * rows) + gradient + kept + workspace
    assert largest < 4 * rows * len(weight)


def test_the_smallest_workspace_is_said(fused_impl):
    with pytest.raises(
        ValueError, match=r"expected at least \d+ bytes, what one row needs at 4 rows and vocabulary 10"
    ):
        expected_embedding_kl(**LOSS, impl=fused_impl, max_workspace_bytes=1)
