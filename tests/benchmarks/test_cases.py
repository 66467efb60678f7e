"""What is measured is what the name of a case says, the same every time."""

from dataclasses import replace

import pytest
import torch

from benchmarks.cases import CPU_CASES, GPU_CASES, Case

TINY = Case("tiny", 64, 32, 500, torch.float32)


@pytest.mark.parametrize("cases", [CPU_CASES, GPU_CASES], ids=["cpu", "gpu"])
def test_names_are_unique_and_start_with_the_limit(cases):
    assert len({case.name for case in cases}) == len(cases)
    assert {case.systems[0] for case in cases} == {"products"}


def test_inputs_are_the_same_every_time():
    first, second = TINY.inputs("cpu"), TINY.inputs("cpu")
    for name in ("student", "student_weight", "teacher", "teacher_weight"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert not torch.equal(first.student, first.teacher)


def test_logits_spread_over_a_few_nats():
    student, student_weight, teacher, teacher_weight = TINY.inputs("cpu").gathered()
    for logits in (student @ student_weight.T, teacher @ teacher_weight.T):
        assert 1.7 < logits.std() < 2.3


def test_valid_rows():
    case = replace(TINY, valid_percent=10)
    x = case.inputs("cpu")
    assert x.student_index is not None
    assert case.rows == len(x.student_index.unique()) == 6
    assert x.student.shape == x.teacher.shape == (64, 32)
    assert torch.equal(x.gathered()[0], x.student[x.student_index])
    assert torch.equal(x.gathered()[2], x.teacher[x.student_index])


def test_shared_teacher_rows():
    case = replace(TINY, shared=16)
    x = case.inputs("cpu")
    assert len(x.teacher) == case.teacher_rows == 4
    assert x.teacher_index is not None
    assert x.teacher_index.bincount().tolist() == [16] * 4
    assert x.gathered()[2].shape == (64, 32)


@pytest.mark.parametrize(
    ("fields", "units"),
    [
        ({}, 4),
        ({"frozen_head": True}, 3),
        ({"backward": False}, 2),
        ({"shared": 16}, 3 + 1 / 16),
        ({"valid_percent": 10}, 4),
        ({"frozen_head": True, "summarised": True}, 2),
        ({"labelled": True}, 3),
    ],
    ids=str,
)
def test_units(fields, units):
    assert replace(TINY, **fields).units == units


def test_gradients_that_are_asked_for():
    assert TINY.gradient_bytes == 4 * 32 * (64 + 500)
    assert replace(TINY, frozen_head=True).gradient_bytes == 4 * 32 * 64
    assert replace(TINY, backward=False).gradient_bytes == 0
