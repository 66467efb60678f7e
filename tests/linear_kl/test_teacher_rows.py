"""A teacher row that many student rows share is projected once, and that changes no result."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disc_kernels.linear_kl import function, logits
from disc_kernels.linear_kl.rows.torch_backend import _blocks
from disc_kernels.linear_kl.teacher_rows import TeacherRows
from tests.linear_kl.oracle import assert_accurate, build, build_everything, loss_of, run, smallest_workspace

INDICES = {
    "sorted": [0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, 4],
    "mixed": [3, 0, 4, 3, 1, 0, 3, 2, 0, 1, 4, 3],
    "one row for all": [2] * 12,
    "one row for most": [1, 1, 1, 4, 1, 1, 0, 1, 1, 1, 1, 1],
    "one row twice": [7, 1, 2, 3, 4, 5, 6, 1, 0, 8, 9, 10],
}


def compared(index, **options):
    options.setdefault("row_weight", [0.5, 1, 2, 0, 1, 1, 3, 0.25, 1, 1, 2, 1])
    return build(rows=12, teacher_rows=11, teacher_width=16, teacher_index=index, **options)


@pytest.fixture
def projected(monkeypatch):
    """How many rows each head is multiplied with: {(vocabulary, hidden size): rows}."""
    counts: dict[tuple[int, int], int] = {}
    project = logits.project

    def counting(model, hidden, tile_rows, out):
        counts[tuple(model.weight.shape)] = counts.get(tuple(model.weight.shape), 0) + len(hidden)
        project(model, hidden, tile_rows, out)

    monkeypatch.setattr(logits, "project", counting)
    return counts


@pytest.fixture
def on_an_accelerator(monkeypatch):
    """As if the values of an index could not be seen without waiting."""
    choose = function.choose_teacher_rows
    monkeypatch.setattr(function, "choose_teacher_rows", lambda index, _, *sizes: choose(index, None, *sizes))


@pytest.mark.parametrize("workspace", ["default", "smallest"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES.keys())
def test_results_are_those_of_the_oracle(fused_impl, index, reduction, workspace):
    problem = compared(index, reduction=reduction, student_index=[11, 3, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9])
    if workspace == "smallest":
        problem = problem.with_options(max_workspace_bytes=smallest_workspace(problem, fused_impl))
    assert_accurate(run(problem, fused_impl), problem)


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES.keys())
def test_every_divergence_and_option(fused_impl, divergence, index):
    indices = {"student_index": [4, 0, 2, 2, 5, 1, 3, 0, 1, 2, 3, 4], "teacher_index": [i % 4 for i in index]}
    problem = build_everything(divergence=divergence, row_weight=[0.5, 0.0, 2.0, 1.0, 0.25, 1.0] * 2, **indices)
    assert_accurate(run(problem, fused_impl), problem)


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES.keys())
def test_each_is_projected_once(projected, fused_impl, index):
    problem = compared(index)
    loss_of(problem, problem.leaves(), fused_impl)
    chunks = 2  # of at most half the rows; one teacher row may be in both
    assert projected[1000, 24] == 12
    assert len(set(index)) <= projected[1000, 16] <= len(set(index)) + chunks - 1


@pytest.mark.usefixtures("on_an_accelerator")
@pytest.mark.parametrize("index", [[0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, 4], [3, 0, 4, 3, 1, 0, 3, 2, 0, 1, 4, 3]])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_unseen_indices_keep_all_teacher_rows_if_they_fit(projected, fused_impl, index, reduction):
    problem = build(rows=12, teacher_rows=6, teacher_width=16, teacher_index=index, reduction=reduction)
    assert_accurate(
        run(replace(problem, asks=("student_hidden",)), fused_impl), replace(problem, asks=("student_hidden",))
    )
    assert projected[1000, 16] == (6 if reduction == "mean" else 12)  # "none" recomputes in the backward

    projected.clear()
    tight = problem.with_options(max_workspace_bytes=smallest_workspace(problem, fused_impl))
    assert_accurate(run(tight, fused_impl), tight)
    assert projected[1000, 16] >= 12


@pytest.mark.parametrize(
    "index, expected",
    [
        ([0, 0, 0, 0, 0, 1, 2, 2], [(0, 4, [0]), (4, 8, [0, 1, 2, 2])]),
        ([1, 1, 1, 2, 2, 2], [(0, 3, [1]), (3, 6, [2])]),
        ([3, 0, 4, 3], [(0, 4, [3, 0, 4, 3])]),
        ([5, 5, 5], [(0, 3, [5])]),
    ],
)
def test_a_block_of_rows_with_one_teacher_row_has_it_once(index, expected):
    blocks = _blocks(len(index), torch.arange(6).unsqueeze(1), torch.tensor(index), block_rows=4)
    assert [(rows.start, rows.stop, teacher.flatten().tolist()) for rows, teacher in blocks] == expected


def test_rows_without_repetition_stay_in_order(projected):
    problem = build(rows=12, teacher_width=16, teacher_index=[11, 0, 5, 3, 2, 1, 4, 6, 7, 8, 9, 10])
    loss_of(problem, problem.leaves(), "torch")
    assert projected[1000, 16] == 12


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=80), st.integers(1, 80))
def test_chunks_cover_all_rows_and_their_teachers(index, chunk_rows):
    distinct, inverse = torch.tensor(sorted(index)).unique(return_inverse=True)
    rows = TeacherRows(len(distinct), distinct, inverse, inverse)
    chunks = list(rows.chunks(len(index), chunk_rows))
    assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])]
    assert chunks[-1].stop == len(index)
    for start, stop, first, last in chunks:
        assert 0 < stop - start <= chunk_rows
        assert (first, last) == (int(inverse[start]), int(inverse[stop - 1]) + 1)
        assert last - first <= math.ceil(chunk_rows * len(distinct) / len(index))


@pytest.mark.usefixtures("on_an_accelerator")
@pytest.mark.parametrize("rows", [12, 100])
def test_more_workspace_is_never_refused_where_less_was_enough(fused_impl, rows):
    """Keeping the teacher's rows may leave too little for the rest; then they are not kept."""
    rows = rows if fused_impl == "torch" else min(rows, 24)  # Triton's interpreter is slow
    problem = build(rows=2, width=8, vocab=64, student_index=[0] * rows, teacher_index=[0] * rows)
    smallest = smallest_workspace(problem, fused_impl)
    expected = loss_of(problem, problem.leaves(), "reference")
    for more in range(0, 4000, 100 if fused_impl == "torch" else 800):
        loss = loss_of(problem, problem.leaves(), fused_impl, max_workspace_bytes=smallest + more)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
