"""What the frozen-head form refuses, and what it says then."""

import re

import pytest
import torch

from disc_kernels import TeacherSummary, expected_embedding_kl, teacher_summary

SUMMARY = TeacherSummary(torch.zeros(4, 8), torch.zeros(4), torch.zeros(4))
LOSS = {"student_hidden": torch.zeros(4, 8), "student_weight": torch.zeros(10, 8), "summary": SUMMARY}
MAKING = {
    "teacher_hidden": torch.zeros(4, 6),
    "teacher_weight": torch.zeros(10, 6),
    "student_weight": torch.zeros(10, 8),
}


def rows(*numbers):
    return torch.tensor(numbers)


def bad(message, error=ValueError, **changed):
    return pytest.param(changed, error, message, id=message[:60])


BAD_LOSS = [
    bad("summary: expected a TeacherSummary, got Tensor", error=TypeError, summary=torch.zeros(4, 8)),
    bad("summary: expected a TeacherSummary, got tuple", error=TypeError, summary=tuple(SUMMARY)),
    bad("summary.bias: expected a tensor, got NoneType", error=TypeError, summary=SUMMARY._replace(bias=None)),
    bad(
        "summary.embedding: expected float32 or float64, got torch.bfloat16",
        error=TypeError,
        summary=TeacherSummary(*(x.bfloat16() for x in SUMMARY)),
    ),
    bad(
        "summary.entropy: expected torch.float32, as summary.embedding, got torch.float64",
        error=TypeError,
        summary=SUMMARY._replace(entropy=torch.zeros(4).double()),
    ),
    bad(
        "summary.entropy: expected device cpu, as the hidden states, got meta",
        summary=SUMMARY._replace(entropy=torch.zeros(4, device="meta")),
    ),
    bad(
        "summary.embedding: expected shape [S, 8], as wide as student_weight, got [4, 7]",
        summary=SUMMARY._replace(embedding=torch.zeros(4, 7)),
    ),
    bad(
        "summary.bias: expected shape [4], as summary.embedding [4, 8], got [3]",
        summary=SUMMARY._replace(bias=torch.zeros(3)),
    ),
    bad("summary: expected 2 rows, one for each row of student_index, got 4", student_index=rows(0, 1)),
    bad("summary_index: expected 4 rows, one for each row of student_hidden, got 2", summary_index=rows(0, 1)),
    bad("summary_index: expected rows from 0 to 3", summary_index=rows(0, 1, 2, 4)),
    bad("summary_index", summary_index=rows(0, 1, 2, -1)),
    bad("summary_index: expected dtype", error=TypeError, summary_index=rows(0, 1, 2, 3).to(torch.int8)),
    bad("summary_index: expected shape", summary_index=rows([0, 1])),
    bad("student_index", student_index=rows(0, 1, 2, 4)),
    bad("row_weight: expected shape [4]", row_weight=torch.ones(3)),
    bad("temperature: expected a positive number, got 0.0", temperature=0.0),
    bad("student_scale: expected a number other than 0, got 0", student_scale=0),
    bad("student_scale: expected a finite number", student_scale=float("nan")),
    bad("student_scale: expected a number, got str", error=TypeError, student_scale="1"),
    bad("reduction: expected one of 'mean', 'sum', 'none', 'batchmean', got 'avg'", reduction="avg"),
    bad("vocab_size: expected at most 10", vocab_size=11),
    bad("student_bias: expected shape [10], got [9]", student_bias=torch.zeros(9)),
    bad("student_hidden: expected last dimension 8", student_hidden=torch.zeros(4, 7)),
    bad("student_hidden: expected a tensor, got list", error=TypeError, student_hidden=[1.0]),
    bad("impl: expected one of 'triton', 'torch', 'reference', got 'cuda'", impl="cuda"),
    bad("max_workspace_bytes: expected at least 1, got 0", max_workspace_bytes=0),
    bad("vocab_group: expected a torch.distributed.ProcessGroup", error=TypeError, vocab_group=object()),
]
BAD_MAKING = [
    bad("teacher_transform: expected a LogitTransform, got float", error=TypeError, teacher_transform=30.0),
    bad("temperature: expected a positive number, got -1.0", temperature=-1),
    bad("vocab_size: expected an int", student_weight=torch.zeros(12, 8)),
    bad("vocab_size: expected at most 10", vocab_size=11),
    bad("student_weight: expected a tensor, got NoneType", error=TypeError, student_weight=None),
    bad("student_weight: expected shape", student_weight=torch.zeros(8)),
    bad("student_weight: expected shape", student_weight=torch.zeros(())),
    bad("expected float16, bfloat16", error=TypeError, student_weight=torch.zeros(10, 8).int()),
    bad("device cpu", student_weight=torch.zeros(10, 8, device="meta")),
    bad("student_bias: expected shape [10], got [9]", student_bias=torch.zeros(9)),
    bad("teacher_bias: expected shape [10], got [9]", teacher_bias=torch.zeros(9)),
    bad("teacher_hidden: expected last dimension 6", teacher_hidden=torch.zeros(4, 5)),
    bad("teacher_index: expected rows from 0 to 3", teacher_index=rows(4)),
    bad("impl: expected one of", impl="cuda"),
    bad("vocab_group: expected a torch.distributed.ProcessGroup", error=TypeError, vocab_group=object()),
]


@pytest.mark.parametrize("changed, error, message", BAD_LOSS)
def test_bad_loss(changed, error, message):
    expected_embedding_kl(**LOSS)
    with pytest.raises(error, match=re.escape(message)):
        expected_embedding_kl(**{**LOSS, **changed})


@pytest.mark.parametrize("changed, error, message", BAD_MAKING)
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


def test_the_smallest_workspace_is_said(fused_impl):
    with pytest.raises(
        ValueError, match=r"expected at least \d+ bytes, what one row needs at 4 rows and vocabulary 10"
    ):
        expected_embedding_kl(**LOSS, impl=fused_impl, max_workspace_bytes=1)
