"""Loss, gradients and statistics of every implementation against the oracle, over what can vary in a call."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disc_kernels import FusedSuffixKLLoss, LogitTransform, fused_suffix_kl
from tests.linear_kl.oracle import assert_accurate, build, build_everything, loss_of, run, smallest_workspace

CASES = {
    "aligned": {},
    "one row": {"rows": 1},
    "shared teacher rows": {"teacher_rows": 2, "teacher_index": [0, 0, 1, 1, 1, 0]},
    "permuted teacher rows": {"teacher_index": [5, 3, 1, 0, 2, 4]},
    "student rows chosen": {"student_index": [4, 1], "teacher_index": [0, 5]},
    "student rows repeated": {"student_index": [2, 2, 0, 2], "teacher_index": [1, 1, 3, 0]},
    "student index alone": {"student_index": [3, 0, 5], "teacher_rows": 3},
    "row weights": {"row_weight": [0.5, 0.0, 2.0, 0.0, 0.25, 1.0]},
    "biases": {"bias": True},
    "softcap": {"student_transform": LogitTransform(softcap=3.0), "teacher_transform": LogitTransform(softcap=5.0)},
    "student softcap alone": {"student_transform": LogitTransform(softcap=2.0)},
    "scale": {"student_transform": LogitTransform(scale=0.25), "teacher_transform": LogitTransform(scale=1.75)},
    "widths differ": {"width": 40, "teacher_width": 8},
    "vocab_size below V": {"vocab_size": 777},
    "vocabularies differ": {"vocab": 1000, "teacher_vocab": 1024, "vocab_size": 990},
    "vocab_size of one": {"vocab": 64, "teacher_vocab": 33, "vocab_size": 33},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_case(impl, divergence, case):
    problem = build(divergence=divergence, **case)
    assert_accurate(run(problem, impl), problem)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_everything_at_once(impl, divergence, temperature, reduction):
    problem = build_everything(divergence=divergence, temperature=temperature, reduction=reduction)
    assert_accurate(run(problem, impl), problem)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_dtype(impl, divergence, dtype, reduction):
    problem = build_everything(dtype, divergence=divergence, reduction=reduction)
    assert_accurate(run(problem, impl), problem)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_float64(double_impl, divergence, reduction):
    problem = build_everything(torch.float64, divergence=divergence, reduction=reduction)
    assert_accurate(run(problem, double_impl), problem)


@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16)],
    ids=str,
)
def test_models_of_different_dtypes(impl, dtypes):
    student, teacher = dtypes
    problem = build_everything(student, teacher_dtype=teacher)
    assert_accurate(run(problem, impl), problem)


@pytest.mark.parametrize("vocab", [2, 31, 1024, 1025, 32003, 131075])
def test_vocabulary(impl, divergence, vocab):
    rows = 3 if vocab < 2000 else 1  # Triton's interpreter takes seconds for a long row
    problem = build(rows=rows, width=16, vocab=vocab, divergence=divergence, temperature=2.0)
    assert_accurate(run(problem, impl), problem)


def test_vocabulary_of_one_entry(impl, divergence):
    """Both models are certain: no divergence, no entropy, no gradient."""
    got = run(build(vocab=1, divergence=divergence, bias=True, reduction="sum"), impl)
    assert abs(got.loss.item()) < 1e-6
    assert all(gradient.abs().max() < 1e-6 for gradient in got.gradients.values())
    assert got.stats["student_entropy"].abs().max() < 1e-6
    assert got.stats["teacher_entropy"].abs().max() < 1e-6
    assert torch.equal(got.stats["agreement"], torch.ones(6))


@pytest.mark.parametrize("rows", [1, 17])
def test_ragged_rows(fused_impl, divergence, rows):
    problem = build(rows=rows, vocab=203, divergence=divergence, reduction="none")
    assert_accurate(run(problem, fused_impl), problem)


def test_leading_dimensions(impl):
    problem = build(student_index=[5, 0, 3], teacher_index=[1, 2, 2])
    shaped = problem.with_tensors(
        student_hidden=problem.tensors["student_hidden"].view(2, 3, 24),
        teacher_hidden=problem.tensors["teacher_hidden"].view(3, 1, 2, 24),
    )
    got = run(shaped, impl)
    assert_accurate(got, shaped)
    assert got.gradients["student_hidden"].shape == (2, 3, 24)


@pytest.mark.parametrize("indexed", [False, True])
def test_sequences_without_their_last_position(fused_impl, indexed):
    """hidden[:, :-1] of a batch, which no view makes [M, D]."""
    rows = {"student_index": [8, 0, 5, 3], "teacher_index": [1, 8, 2, 2]} if indexed else {}
    problem = build(rows=9, reduction="none", **rows)
    longer = {
        name: torch.cat([t.view(3, 3, 24), torch.full((3, 1, 24), torch.nan)], 1)[:, :-1]
        for name, t in problem.tensors.items()
        if name.endswith("hidden")
    }
    batch = problem.with_tensors(**longer)
    assert_accurate(run(batch, fused_impl), batch)
    tight = batch.with_options(max_workspace_bytes=3 * smallest_workspace(batch, fused_impl))
    assert_accurate(run(tight, fused_impl), tight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_row_weights_of_another_dtype(impl, dtype):
    problem = build(row_weight=torch.tensor([0.5, 0.0, 2.0, 1.0, 0.25, 1.0], dtype=dtype))
    assert_accurate(run(problem, impl), problem)


def test_negative_row_weights(impl):
    """A pair of preferences, say."""
    problem = build(row_weight=[-3.0, 1.0, 0.5, -0.5, 0.0, 1.0], reduction="sum", dtype=torch.bfloat16)
    assert_accurate(run(problem, impl), problem)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_an_infinite_row_of_weight_zero_is_left_out(impl, reduction):
    """A student's bias of -inf takes out an entry that the first row's teacher expects, and the second's does not."""
    student, weight = torch.zeros(2, 3), torch.eye(5)[:, :3].contiguous()
    teacher, teacher_weight = torch.tensor([[0.0], [-1.0]]), torch.tensor([[1e4], [0.0], [0.0], [0.0], [0.0]])
    bias = torch.tensor([-torch.inf, 0.0, 0.0, 0.0, 0.0])

    def loss(weights):
        options = {"row_weight": torch.tensor(weights), "student_bias": bias, "reduction": reduction, "impl": impl}
        return fused_suffix_kl(student, weight, teacher, teacher_weight, **options).item()

    assert loss([1.0, 1.0]) == math.inf
    assert abs(loss([0.0, 1.0])) < 1e-6


@pytest.mark.parametrize("softcap", [1e4, 1e9])
def test_a_cap_far_above_the_logits_changes_nothing(impl, softcap):
    capped = build(student_transform=LogitTransform(softcap=softcap), reduction="sum")
    assert_accurate(run(capped, impl), capped)


def test_tiny_row_weights(impl):
    """Weights that carry 1 / (tokens in a step): the mean divides them out again."""
    weights = torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0, 1.0]) * 1e-12
    problem = build(row_weight=weights, dtype=torch.bfloat16)
    assert_accurate(run(problem, impl), problem)


def test_whole_numbers_are_numbers(impl):
    problem = build()
    values = [loss_of(problem, problem.tensors, impl, temperature=t) for t in (2, 2.0)]
    assert torch.equal(*values)


def strided(t):
    """The same values, every stride of which is wrong for a kernel that assumes any."""
    wide = torch.full((*(2 * n for n in t.shape[:-1]), 3 * t.shape[-1]), float("nan"), dtype=t.dtype)
    view = wide[(*(slice(None, None, 2) for _ in t.shape[:-1]), slice(1, None, 3))]
    return view.copy_(t)


LAYOUTS = {
    "transposed": lambda t: t.T.contiguous().T,
    "sliced": lambda t: torch.cat([t, torch.full_like(t, float("nan"))], -1)[:, : t.shape[-1]],
    "every stride": strided,
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layout_of_hidden_and_weight(impl, divergence, layout):
    problem = build_everything(divergence=divergence)
    names = [name for name in problem.tensors if not name.endswith("bias")]
    problem = problem.with_tensors(**{name: layout(problem.tensors[name]) for name in names})
    assert not any(problem.tensors[name].is_contiguous() for name in names)
    assert_accurate(run(problem, impl), problem)


def test_strided_biases_indices_and_row_weights(impl):
    problem = build_everything()
    problem = problem.with_tensors(
        **{name: strided(problem.tensors[name]) for name in ("student_bias", "teacher_bias")}
    )
    every_second = {
        name: torch.stack([problem.options[name], torch.full_like(problem.options[name], 3)], -1)[:, 0]
        for name in ("student_index", "teacher_index", "row_weight")
    }
    problem = problem.with_options(**every_second)
    assert_accurate(run(problem, impl), problem)


def test_expanded_rows(impl):
    """One row seen as six, and one number as six row weights: stride 0."""
    problem = build(row_weight=[0.5])
    problem = problem.with_tensors(
        student_hidden=problem.tensors["student_hidden"][:1].expand(6, -1),
        teacher_hidden=problem.tensors["teacher_hidden"][:1].expand(6, -1),
    )
    problem = problem.with_options(row_weight=problem.options["row_weight"].expand(6))
    assert_accurate(run(problem, impl), problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_many_small_chunks(fused_impl, divergence, dtype, reduction):
    """The smallest workspace the call accepts, for torch alone, and three times that: many chunks, the same numbers."""
    problem = build_everything(dtype, divergence=divergence, reduction=reduction)
    smallest = smallest_workspace(problem, fused_impl)
    whole = run(problem, fused_impl)
    for workspace in (smallest, 3 * smallest) if fused_impl == "torch" else (3 * smallest,):
        chunked = problem.with_options(max_workspace_bytes=workspace)
        got = run(chunked, fused_impl)
        assert_accurate(got, chunked)
        torch.testing.assert_close(got.loss, whole.loss, rtol=1e-5, atol=0.0)


def test_agreement_and_statistics_are_of_each_pair(impl):
    """Teacher rows 0 and 1 equal the student's, and rows that tie everywhere agree with themselves."""
    problem = build(teacher_rows=2, teacher_index=[0, 1, 0, 1, 0, 1])
    hidden = problem.tensors["student_hidden"].clone()
    hidden[4] = 0.0
    tied = problem.with_tensors(
        student_hidden=hidden, teacher_hidden=hidden[:2], teacher_weight=problem.tensors["student_weight"]
    )
    argmax = (hidden @ problem.tensors["student_weight"].T).argmax(-1)
    got = run(tied, impl).stats["agreement"]
    assert torch.equal(got[:4], (argmax[:4] == argmax[[0, 1, 0, 1]]).float())
    assert got[0] == got[1] == 1.0

    same = tied.with_tensors(teacher_hidden=hidden).with_options(teacher_index=None)
    assert torch.equal(run(same, impl).stats["agreement"], torch.ones(6))


def test_the_first_of_equal_maxima_counts(impl):
    """Equal logits in different tiles of the vocabulary: as `torch.argmax`, the lowest entry."""
    problem = build(rows=1, teacher_rows=2, width=1, vocab=9001, student_index=[0, 0], teacher_index=[0, 1], bias=True)
    zeros = {name: torch.zeros_like(t) for name, t in problem.tensors.items()}
    zeros["student_bias"][[7, 4500, 9000]] = 5.0
    for entry, agreement in ((7, 1.0), (4500, 0.0), (9000, 0.0)):
        teacher_bias = zeros["teacher_bias"].clone()
        teacher_bias[entry] = 2.0
        got = run(problem.with_tensors(**{**zeros, "teacher_bias": teacher_bias}), impl)
        assert got.stats["agreement"].tolist() == [agreement, agreement]


def test_statistics_do_not_ask_for_a_gradient_nor_change_the_loss(impl):
    problem = build_everything(reduction="none")
    leaves = problem.leaves()
    loss, stats = loss_of(problem, leaves, impl, return_stats=True)
    assert torch.equal(loss.detach(), loss_of(problem, leaves, impl).detach())
    assert torch.equal(loss.detach(), stats.divergence)
    for value in (stats.divergence, stats.student_entropy, stats.teacher_entropy, stats.agreement):
        assert value.shape == (7,)
        assert not value.requires_grad


def test_inputs_are_left_as_they_were(impl):
    problem = build_everything(torch.bfloat16)
    before = {k: v.clone() for k, v in {**problem.tensors, **problem.options}.items() if isinstance(v, torch.Tensor)}
    run(problem, impl)
    after = {**problem.tensors, **problem.options}
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_module_is_the_function(impl):
    problem = build_everything(divergence="jsd")
    rows = {name: problem.options[name] for name in ("student_index", "teacher_index", "row_weight")}
    biases = {name: problem.tensors[name] for name in ("student_bias", "teacher_bias")}
    main = [problem.tensors[f"{model}_{part}"] for model in ("student", "teacher") for part in ("hidden", "weight")]
    options = {name: value for name, value in problem.options.items() if name not in rows}
    module = FusedSuffixKLLoss(**options, impl=impl)
    assert not list(module.parameters())
    expected = loss_of(problem, problem.tensors, impl)
    assert torch.equal(module(*main, **rows, **biases), expected)


@st.composite
def calls(draw):
    rows, vocab = draw(st.integers(1, 9)), draw(st.integers(8, 130))
    count = draw(st.integers(1, 12))
    index = st.lists(st.integers(0, rows - 1), min_size=count, max_size=count)
    transform = st.builds(
        LogitTransform, scale=st.floats(0.25, 1.25), softcap=st.one_of(st.none(), st.floats(2.0, 30.0))
    )
    return {
        "rows": rows,
        "width": draw(st.integers(1, 33)),
        "teacher_width": draw(st.integers(1, 33)),
        "vocab": vocab,
        "vocab_size": draw(st.integers(8, vocab)),
        "bias": draw(st.booleans()),
        "student_index": draw(index),
        "teacher_index": draw(index),
        "row_weight": draw(st.lists(st.floats(0.125, 4.0, width=32), min_size=count, max_size=count)),
        "temperature": draw(st.floats(1.0, 4.0)),
        "divergence": draw(st.sampled_from(["forward_kl", "reverse_kl", "jsd"])),
        "beta": draw(st.floats(0.05, 0.95)),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "student_transform": draw(st.one_of(st.none(), transform)),
        "teacher_transform": draw(st.one_of(st.none(), transform)),
        "seed": draw(st.integers(0, 1000)),
    }


def test_any_call(impl):
    # Few for Triton's interpreter, which takes a second for each.
    @settings(max_examples=10 if impl == "triton" else 25, deadline=None, derandomize=True)
    @given(call=calls())
    def is_accurate(call):
        problem = build(**call)
        assert_accurate(run(problem, impl), problem)

    is_accurate()
