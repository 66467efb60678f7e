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
    "summary_index of int8": (
        {"summary_index": rows(0, 1, 2, 3).to(torch.int8)},
        TypeError,
        "summary_index: expected dtype",
    ),
    "summary_index of two dimensions": ({"summary_index": rows([0, 1])}, ValueError, "summary_index: expected shape"),
    "student_index out of range": ({"student_index": rows(0, 1, 2, 4)}, ValueError, "student_index"),
    "row_weight": ({"row_weight": torch.ones(3)}, ValueError, "row_weight: expected shape [4]"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature: expected a positive number, got 0.0"),
    "student_scale 0": ({"student_scale": 0}, ValueError, "student_scale: expected a number other than 0, got 0"),
    "student_scale NaN": ({"student_scale": float("nan")}, ValueError, "student_scale: expected a finite number"),
    "student_scale of a word": ({"student_scale": "1"}, TypeError, "student_scale: expected a number, got str"),
    "reduction": (
        {"reduction": "avg"},
        ValueError,
        "reduction: expected one of 'mean', 'sum', 'none', 'batchmean', got 'avg'",
    ),
    "vocab_size": ({"vocab_size": 11}, ValueError, "vocab_size: expected at most 10"),
    "student_bias": ({"student_bias": torch.zeros(9)}, ValueError, "student_bias: expected shape [10], got [9]"),
    "hidden size": ({"student_hidden": torch.zeros(4, 7)}, ValueError, "student_hidden: expected last dimension 8"),
    "hidden type": ({"student_hidden": [1.0]}, TypeError, "student_hidden: expected a tensor, got list"),
    "impl": ({"impl": "cuda"}, ValueError, "impl: expected one of 'triton', 'torch', 'reference', got 'cuda'"),
    "max_workspace_bytes": ({"max_workspace_bytes": 0}, ValueError, "max_workspace_bytes: expected at least 1, got 0"),
    "vocab_group": ({"vocab_group": object()}, TypeError, "vocab_group: expected a torch.distributed.ProcessGroup"),
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
    "vocab_group": ({"vocab_group": object()}, TypeError, "vocab_group: expected a torch.distributed.ProcessGroup"),
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


def test_the_smallest_workspace_is_said(fused_impl):
    with pytest.raises(
        ValueError, match=r"expected at least \d+ bytes, what one row needs at 4 rows and vocabulary 10"
    ):
        expected_embedding_kl(**LOSS, impl=fused_impl, max_workspace_bytes=1)
