"""Where products take 16-bit operands, the gradient of several chunks is multiplied at once; values stay the same."""

import pytest
import torch

from disc_kernels.linear_kl.workspace import MAX_CHUNKS, _chunk_and_group_rows
from tests.linear_kl.oracle import assert_accurate, build, build_everything, run, smallest_workspace
from tests.linear_kl.tensor_cores import emulate

ROWS, VOCAB, WIDTH = 48, 1003, 24


@pytest.fixture
def products(monkeypatch):
    return emulate(monkeypatch)


def narrow_problem(**options):
    problem = build(rows=ROWS, vocab=VOCAB, width=WIDTH, dtype=torch.bfloat16, **options)
    return problem.with_options(row_weight=torch.rand(ROWS) + 0.5, reduction="sum")


@pytest.mark.parametrize("bytes_of_rows", [1, 3, 10, 1000])
def test_groups_of_chunks_give_the_same(products, divergence, bytes_of_rows):
    problem = narrow_problem(divergence=divergence)
    smallest = smallest_workspace(problem, "torch")
    problem = problem.with_options(max_workspace_bytes=bytes_of_rows * smallest)
    assert_accurate(run(problem, "torch"), problem)


def test_the_kernels_do_what_torch_does(products, divergence):
    """Within two last bits, not one: the interpreter truncates where a GPU rounds."""
    problem = narrow_problem(divergence=divergence)
    problem = problem.with_options(max_workspace_bytes=3 * smallest_workspace(problem, "torch"))
    expected, got = run(problem, "torch"), run(problem, "triton")
    torch.testing.assert_close(got.loss, expected.loss)
    for name, gradient in expected.gradients.items():
        assert (got.gradients[name] - gradient).norm() < 2 * torch.finfo(torch.bfloat16).eps * gradient.norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_everything_in_groups(products, divergence, dtype, reduction):
    problem = build_everything(dtype, divergence=divergence, reduction=reduction)
    assert_accurate(run(problem, "torch"), problem)


def test_shared_teacher_rows_in_groups(products):
    problem = narrow_problem(teacher_rows=6).with_options(teacher_index=(torch.arange(ROWS) * 5) % 6)
    problem = problem.with_options(max_workspace_bytes=4 * smallest_workspace(problem, "torch"))
    assert_accurate(run(problem, "torch"), problem)


def test_there_are_fewer_groups_than_chunks(products):
    problem = narrow_problem()
    smallest = smallest_workspace(problem, "torch")
    run(problem.with_options(max_workspace_bytes=5 * smallest), "torch")
    logits = sum(shape[1] == VOCAB for shape in products)
    weight, hidden = (sum(shape == (rows, WIDTH) for shape in products) for rows in (VOCAB, products[-2][0]))
    assert logits / 2 >= 2 * weight > 2  # a chunk has one product of either model
    assert hidden >= 1


@pytest.mark.parametrize("rows", [1, 2, 7, 4096, 8193])
@pytest.mark.parametrize("spare", [0, 100, 10_000, 10**7, 10**12])
@pytest.mark.parametrize("group_row_bytes", [0, 300])
def test_chunks_and_groups_fit(rows, spare, group_row_bytes):
    chunk, group = _chunk_and_group_rows(rows, spare, 1000, group_row_bytes)
    assert 1 <= chunk <= group <= -(-rows // 2)
    assert (chunk - 1) * 1000 + (group - 1) * group_row_bytes <= spare
    if group_row_bytes == 0:
        assert chunk == group
    elif spare > 10_000:
        assert -(-group // chunk) <= MAX_CHUNKS + 1
