"""Peak memory is what the formula says, to the byte, and nothing of the size of [M, V] ever exists."""

from dataclasses import replace

import pytest
import torch

from disc_kernels import LogitTransform, fused_suffix_kl, fused_topk_kl
from tests.allocations import Memory
from tests.linear_kl import topk_cases
from tests.linear_kl.oracle import Problem, build, loss_of, smallest_workspace

STUDENT = ("student_hidden", "student_weight", "student_bias")
ROWS = 48


def budget(problem, result_entries):
    """Outputs, gradients, the weight's once more at 4 bytes an entry while it accumulates, and the workspace."""
    asked = [problem.tensors[name] for name in problem.asks if name in problem.tensors]
    gradients = sum(t.numel() * t.element_size() for t in asked)
    accumulating = 4 * problem.tensors["student_weight"].numel() if "student_weight" in problem.asks else 0
    return 4 * result_entries + gradients + accumulating + problem.options["max_workspace_bytes"]


def forward_backward(problem, call, upstream=None):
    """What is alive at the end: the leaves with their gradients, and the loss."""
    leaves = problem.leaves()

    def work():
        loss = call(**leaves, **problem.options)
        loss.backward(upstream)
        return loss

    return leaves, work


def plain_torch(*, student_hidden, student_weight, teacher_hidden, teacher_weight, temperature=1.0, **_):
    student, teacher = student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T
    log_q, log_p = ((u.float() / temperature).log_softmax(-1) for u in (student, teacher))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@pytest.fixture
def problem():
    def made(rows=ROWS, vocab=1003, width=8, teacher_width=12, workspace=70_000, asks=STUDENT, **options):
        problem = build(rows=rows, vocab=vocab, width=width, teacher_width=teacher_width, **options)
        return replace(problem.with_options(max_workspace_bytes=workspace), asks=asks)

    return made


def test_helper_counts_bytes(measure):
    def work():
        a = torch.zeros(1000)  # 4000
        b = torch.zeros(1000, dtype=torch.bfloat16)  # 2000
        c = a.neg()  # 4000
        del a
        return b, c, torch.zeros(10)

    assert measure(work) == Memory(peak=10_000, largest=4000, left=6040)


def test_helper_and_formula_reject_plain_torch(measure, problem):
    p = problem()
    leaves, work = forward_backward(p, plain_torch)
    seen = measure(work)
    assert seen.peak > 3 * budget(p, result_entries=1)
    assert seen.largest >= ROWS * 1003
    del leaves


def check(measure, problem, impl, autocast=None):
    none = problem.options.get("reduction") == "none"
    index = problem.options.get("student_index")
    rows = len(problem.tensors["student_hidden"] if index is None else index)
    leaves, work = forward_backward(problem, calling(impl, autocast), torch.rand(rows) if none else None)
    seen = measure(work)
    entries = rows * len(problem.tensors["student_weight"])
    assert seen.largest < entries, f"an allocation of {seen.largest} bytes could hold [M, V] with {entries} entries"
    allowed = budget(problem, result_entries=rows if none else 1)
    assert seen.peak <= allowed, f"peak {seen.peak} bytes, allowed {allowed}: {seen.peak - allowed} too many"
    assert all(leaf.grad is not None for leaf in leaves.values() if leaf.requires_grad)


@pytest.mark.parametrize("rows", [2, 3, ROWS])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_full_logits_however_large_the_workspace(measure, problem, fused_impl, rows, reduction):
    p = problem(rows=rows, reduction=reduction, workspace=None, asks=("student_hidden",))
    _, work = forward_backward(p, calling(fused_impl), torch.rand(rows) if reduction == "none" else None)
    assert measure(work).largest < 4 * rows * 1003


def calling(impl, autocast=None):
    def call(**arguments):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            return fused_suffix_kl(**arguments, impl=impl)

    return call


SHAPES = {
    "many rows": {"rows": 400, "vocab": 251, "teacher_width": 8, "workspace": 50_000},
    "wide student": {"rows": 150, "vocab": 501, "width": 32, "workspace": 60_000},
    "wide teacher": {"rows": 80, "vocab": 501, "teacher_width": 256, "workspace": 70_000},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_peak(measure, problem, fused_impl, dtype, reduction):
    check(measure, problem(dtype=dtype, bias=True, reduction=reduction), fused_impl)


@pytest.mark.parametrize("asks", [("student_hidden",), ("student_weight",), ("student_bias",)], ids="+".join)
def test_peak_by_who_asks(measure, problem, fused_impl, asks):
    check(measure, problem(dtype=torch.bfloat16, bias=True, asks=asks), fused_impl)


@pytest.mark.parametrize(
    "divergence, reduction", [("forward_kl", "mean"), ("reverse_kl", "none"), ("jsd", "mean"), ("jsd", "none")]
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_peak_by_divergence_and_shape(measure, problem, divergence, shape, reduction):
    check(measure, problem(divergence=divergence, reduction=reduction, **shape), "torch")


@pytest.mark.parametrize("dtype, reduction", [(torch.bfloat16, "mean"), (torch.float16, "none")], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_peak_by_dtype_and_shape(measure, problem, shape, reduction, dtype):
    check(measure, problem(dtype=dtype, reduction=reduction, **shape), "torch")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak_of_a_shard(measure, problem, fused_impl, divergence, reduction, lonely_group):
    p = problem(divergence=divergence, reduction=reduction, bias=True, vocab_group=lonely_group)
    check(measure, p, fused_impl)


def test_peak_with_indices_weights_and_smaller_vocabulary(measure, problem, fused_impl):
    """Chosen rows of larger hidden states; their copies count."""
    p = problem(
        rows=2 * ROWS,
        dtype=torch.bfloat16,
        student_index=torch.randint(2 * ROWS, (ROWS,)),
        teacher_index=torch.randint(2 * ROWS, (ROWS,)),
        row_weight=torch.rand(ROWS),
        vocab_size=950,
        temperature=2.0,
    )
    check(measure, p, fused_impl)


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
def test_peak_of_strided_inputs(measure, problem, layout):
    """No contiguous copy of a whole input on the side."""
    p = problem(rows=120, teacher_width=256)
    strided = {
        name: torch.cat([t, t], -1)[:, : t.shape[1]] if layout == "sliced" else t.T.contiguous().T
        for name, t in p.tensors.items()
    }
    check(measure, p.with_tensors(**strided), "torch")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak_under_autocast(measure, problem, reduction):
    """Float32 weights are rounded a piece at a time: no copy of a head in bfloat16."""
    check(measure, problem(reduction=reduction), "torch", autocast=torch.bfloat16)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak_of_sequences_without_their_last_position(measure, problem, reduction):
    """hidden[:, :-1] is gathered a chunk at a time."""
    p = problem(rows=160, width=24, teacher_width=256, vocab=501, reduction=reduction)
    shorter = {name: p.tensors[name].view(4, 40, -1)[:, :-1] for name in ("student_hidden", "teacher_hidden")}
    p = p.with_tensors(**shorter).with_options(student_index=torch.arange(156), teacher_index=torch.arange(156))
    check(measure, p, "torch")


@pytest.mark.parametrize("indexed", [False, True])
def test_peak_of_given_logits(measure, problem, fused_impl, indexed):
    """Rows of logits are gathered and widened a chunk at a time, and nothing is [V, V]."""
    p = problem()
    if indexed:
        p = p.with_options(teacher_index=torch.randperm(2 * ROWS)[:ROWS])
    p = p.with_tensors(teacher_hidden=torch.randn((1 + indexed) * ROWS, 1003).bfloat16())
    given = replace(
        p.with_options(teacher_weight=None), tensors={k: p.tensors[k] for k in (*STUDENT[:2], "teacher_hidden")}
    )
    given = given.with_options(max_workspace_bytes=smallest_workspace(given, fused_impl) + 25_000)
    check(measure, given, fused_impl)


@pytest.mark.parametrize(
    "reduction, softcap, more", [("none", None, 15_000), ("mean", None, 30_000), ("mean", 5.0, 50_000)]
)
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_peak_of_a_top_k(measure, fused_impl, tail, reduction, softcap, more):
    """One buffer of logits, another for a softcap's gradient, and some numbers for each of K + 1 outcomes."""
    made = topk_cases.build(rows=ROWS, vocab=1003, width=8, bias=False, tail=tail, reduction=reduction)
    options = {**made.options, "student_transform": LogitTransform(softcap=softcap), "impl": fused_impl}
    p = Problem(made.tensors, options, asks=STUDENT)
    with pytest.raises(ValueError, match="max_workspace_bytes") as refused:
        fused_topk_kl(**p.leaves(), **p.options, max_workspace_bytes=1)
    needed = int(str(refused.value).split("at least ")[1].split()[0])
    p = p.with_options(max_workspace_bytes=needed + more)
    _, work = forward_backward(p, fused_topk_kl, torch.rand(ROWS) if reduction == "none" else None)
    seen = measure(work)
    assert seen.largest < ROWS * 1003
    assert seen.peak <= budget(p, ROWS if reduction == "none" else 1)


def test_peak_where_weights_are_widened_once(measure, problem):
    """Copies that are kept through the call are in the plan, and nothing is copied beside them."""
    p = problem(rows=700, vocab=4001, width=32, teacher_width=32, workspace=2_300_000, dtype=torch.bfloat16)
    check(measure, replace(p, asks=("student_hidden",)), "torch")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak_of_many_rows_in_the_smallest_workspace(measure, problem, reduction):
    """A few numbers a row of the whole call are more than all the rest here."""
    p = problem(rows=600, vocab=67, row_weight=torch.rand(600), reduction=reduction)
    check(measure, p.with_options(max_workspace_bytes=smallest_workspace(p, "torch")), "torch")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak_in_the_smallest_workspace(measure, problem, fused_impl, reduction):
    """The bytes that the refusal names are enough, and are all that is used."""
    p = problem(reduction=reduction)
    check(measure, p.with_options(max_workspace_bytes=smallest_workspace(p, fused_impl)), fused_impl)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak_without_gradients(measure, problem, fused_impl, reduction):
    """The outputs and the workspace: evaluation pays for no gradient."""
    p = problem(asks=(), reduction=reduction)
    leaves = p.leaves()
    seen = measure(lambda: loss_of(p, leaves, fused_impl))
    entries = ROWS if reduction == "none" else 1
    assert seen.peak <= budget(p, entries)
    assert seen.left == 4 * entries


def test_peak_of_statistics(measure, problem, fused_impl):
    """They are four more outputs of [M]."""
    p = problem(asks=())
    leaves = p.leaves()
    seen = measure(lambda: loss_of(p, leaves, fused_impl, return_stats=True))
    assert seen.peak <= budget(p, 1 + 4 * ROWS)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_is_left_of_a_loss_nobody_uses(measure, problem, reduction):
    p = problem(bias=True, reduction=reduction)
    leaves = p.leaves()
    assert measure(lambda: loss_of(p, leaves, "torch") is None).left == 0


def test_nothing_but_gradients_is_left_after_the_backward(measure, problem, fused_impl):
    p = problem(bias=True)
    leaves, work = forward_backward(p, calling(fused_impl))
    seen = measure(work)
    assert seen.left == 4 + sum(leaves[name].grad.numel() * 4 for name in STUDENT)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("more", [0, 20_000])
@pytest.mark.parametrize("of", [1, 5, 40])
def test_peak_where_teacher_rows_are_shared(measure, problem, fused_impl, of, more, reduction):
    """Sorted rows, their order and a teacher's rows beside a chunk's own all count."""
    p = problem(teacher_index=torch.randint(of, (ROWS,)), row_weight=torch.rand(ROWS), reduction=reduction)
    check(measure, p.with_options(max_workspace_bytes=smallest_workspace(p, fused_impl) + more), fused_impl)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_peak_where_both_models_have_one_head(measure, problem, divergence, shape, shared):
    shape = {**shape, "teacher_width": shape.get("width", 8)}
    p = problem(divergence=divergence, **shape)
    p = p.with_tensors(teacher_weight=p.tensors["student_weight"])
    if shared:
        p = p.with_options(teacher_index=torch.arange(len(p.tensors["student_hidden"])) // 3)
    check(measure, p, "torch")
