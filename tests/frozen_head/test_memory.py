"""The memory the frozen-head form keeps to: every allocation and release on the CPU is in the profiler's trace."""

import pytest
import torch

from disc_kernels import LogitTransform, TeacherSummary, expected_embedding_kl, teacher_summary
from tests.frozen_head.calls import smallest


@pytest.fixture(autouse=True)
def new_memory_is_nan():
    """Not here: PyTorch's deterministic algorithms may allocate what a caller's do not."""


M, V = 48, 1003


def inputs(dtype=torch.float32, width=8, teacher_width=12, vocab=V, rows=M):
    shapes = {
        "student_hidden": (rows, width),
        "student_weight": (vocab, width),
        "teacher_hidden": (rows, teacher_width),
        "teacher_weight": (vocab, teacher_width),
    }
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


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
# With a vocab_group; it makes no difference to the other cases.
SHARDS = [
    pytest.param("torch", workspaces, *CASES[name], id=f"shard-{workspaces}-{name}")
    for workspaces in (1, 3)
    for name in ("float32", "wide student", "many rows")
]


@pytest.fixture
def vocab_group(request):
    """None but for a shard, which is one of one."""
    return request.getfixturevalue("lonely_group") if "shard" in request.node.callspec.id else None


@pytest.mark.parametrize("impl, workspaces, shape, how", RUNS + SHARDS)
def test_peak_of_a_summary(measure, impl, shape, how, workspaces, vocab_group):
    t = inputs(**shape)
    given = (t["teacher_hidden"], t["teacher_weight"], t["student_weight"])
    options = {"student_bias": torch.randn(len(given[1])), "teacher_transform": LogitTransform(2.0, 9.0)}
    options |= {"vocab_group": vocab_group}

    def make(*tensors, **more):
        with torch.autocast("cpu", how.get("autocast"), enabled="autocast" in how):
            return teacher_summary(*tensors, **options, impl=impl, **more)

    workspace = workspaces * smallest(make, *given)
    seen = measure(lambda: make(*given, max_workspace_bytes=workspace))
    outputs = 4 * len(given[0]) * (given[2].shape[1] + 2)
    assert seen.peak <= outputs + workspace
    assert seen.largest < 4 * len(given[0]) * len(given[1])


@pytest.mark.parametrize("impl, workspaces, shape, how", RUNS + SHARDS)
@pytest.mark.parametrize("chosen", [False, True], ids=["all rows", "chosen rows"])
def test_peak_of_a_step(measure, impl, shape, how, workspaces, chosen, vocab_group):
    """Workspace, statistics, the gradient, and the rows of it that are kept for the backward."""
    t = inputs(**shape)
    rows = len(t["student_hidden"])
    hidden, weight = t["student_hidden"].requires_grad_(), t["student_weight"]
    summary = TeacherSummary(torch.randn(rows, weight.shape[1]), torch.zeros(rows), torch.zeros(rows))
    options = {"student_bias": torch.randn(len(weight)), "return_stats": True, "vocab_group": vocab_group}
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
    seen = measure(lambda: step(max_workspace_bytes=workspace))
    gradient = hidden.numel() * hidden.element_size()
    kept = rows * hidden.shape[1] * hidden.element_size()
    assert seen.peak <= 4 * (1 + 4 * rows) + gradient + kept + workspace
    assert seen.largest < 4 * rows * len(weight)
