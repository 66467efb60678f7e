"""Masks, weights and indices as people have them, each against the call that says the same in indices."""

import pytest
import torch

from disc_kernels import fused_suffix_kl
from disc_kernels.linear_kl import products
from tests.linear_kl.oracle import assert_accurate, build, oracle, run

SHAPE = (3, 4)
ROWS = 12


def problem(**options):
    """A problem of three sequences of four tokens."""
    p = build(rows=ROWS, **{"vocab": 300, "width": 16, **options})
    shaped = {f"{name}_hidden": p.tensors[f"{name}_hidden"].view(*SHAPE, -1) for name in ("student", "teacher")}
    return p.with_tensors(**shaped)


def mask(*kept):
    return torch.zeros(ROWS, dtype=torch.bool).index_fill_(0, torch.tensor(kept, dtype=torch.int64), True).view(SHAPE)


KEPT = (0, 3, 4, 10)
INDEX = torch.tensor(KEPT)
WEIGHTS = torch.arange(1.0, ROWS + 1).view(SHAPE)


def same(p, as_people_have_it, as_indices, impl):
    """The outcome of one way of saying it is as near to the oracle of the other as any."""
    stated = p.with_options(**as_indices)
    got = run(p.with_options(**as_people_have_it), impl)
    assert_accurate(got, stated)
    assert oracle(stated).loss.abs().sum() > 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mask(impl, divergence, reduction):
    p = problem(divergence=divergence, reduction=reduction)
    same(p, {"mask": mask(*KEPT)}, {"student_index": INDEX, "teacher_index": INDEX}, impl)


def test_mask_and_weights_of_all_tokens(fused_impl):
    indices = {"student_index": INDEX, "teacher_index": INDEX, "row_weight": WEIGHTS.flatten()[INDEX]}
    same(problem(), {"mask": mask(*KEPT), "row_weight": WEIGHTS}, indices, fused_impl)


def test_mask_without_a_reduction():
    """An entry a row that is kept."""
    p = problem()
    tensors = {**p.tensors, "impl": "torch", "reduction": "none"}
    expected = fused_suffix_kl(**tensors, student_index=INDEX, teacher_index=INDEX)
    assert torch.equal(fused_suffix_kl(**tensors, mask=mask(*KEPT)), expected)


def test_masked_rows_are_not_computed(monkeypatch):
    rows, multiply_into = [], products.multiply_into

    def count_rows(out, *operands, **options):
        rows.append(len(out))
        multiply_into(out, *operands, **options)

    monkeypatch.setattr(products, "multiply_into", count_rows)
    fused_suffix_kl(**problem().tensors, mask=mask(*KEPT), impl="torch")
    assert sum(rows) == 2 * len(KEPT)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_mask_that_keeps_nothing(impl, reduction):
    tensors = problem().leaves()
    loss = fused_suffix_kl(**tensors, mask=mask(), reduction=reduction, impl=impl)
    assert loss.shape == (() if reduction != "none" else (0,))
    for gradient in torch.autograd.grad(loss.sum(), [tensors["student_hidden"], tensors["student_weight"]]):
        assert (gradient == 0).all()
    assert loss.detach().sum() == 0


def test_mask_in_a_graph():
    p = problem(row_weight=None)
    leaves = p.leaves()
    asked = [leaves["student_hidden"], leaves["student_weight"]]
    call = torch.compile(fused_suffix_kl, fullgraph=True, backend="aot_eager")
    for kept in (KEPT, (1, 2)):
        losses = [f(**leaves, mask=mask(*kept), row_weight=WEIGHTS) for f in (call, fused_suffix_kl)]
        got, want = ([loss.detach(), *torch.autograd.grad(loss, asked)] for loss in losses)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)
    with pytest.raises(Exception, match="mask: expected None where the number of rows shapes"):
        call(**leaves, mask=mask(*KEPT), reduction="none")


def test_bool_weights_and_weights_of_all_tokens(fused_impl):
    keep = mask(*KEPT)
    same(problem(), {"row_weight": keep}, {"row_weight": keep.flatten().float()}, fused_impl)
    same(problem(), {"row_weight": WEIGHTS}, {"row_weight": WEIGHTS.flatten()}, fused_impl)
    chosen = {"student_index": INDEX, "teacher_index": INDEX}
    same(problem(), {"row_weight": WEIGHTS, **chosen}, {"row_weight": WEIGHTS.flatten()[INDEX], **chosen}, fused_impl)


def test_indices_of_other_dtypes(fused_impl):
    repeated = torch.tensor([5, 5, 1, 1])
    int32 = {"student_index": INDEX.int(), "teacher_index": repeated.int()}
    same(problem(), int32, {"student_index": INDEX, "teacher_index": repeated}, fused_impl)
    flags = mask(*KEPT)
    same(problem(), {"student_index": flags, "teacher_index": flags.flatten()}, dict.fromkeys(int32, INDEX), fused_impl)


def test_batchmean_is_mean(impl):
    same(problem(), {"reduction": "batchmean", "row_weight": WEIGHTS}, {"row_weight": WEIGHTS.flatten()}, impl)


@pytest.mark.parametrize("beta, kl", [(0, "forward_kl"), (1.0, "reverse_kl")])
def test_the_ends_of_beta_are_the_two_kls(impl, beta, kl):
    """As in TRL and Liger; and each is the limit of JSD over beta (1 - beta), which tells which end is which."""
    same(problem(), {"divergence": "jsd", "beta": beta}, {"divergence": kl}, impl)
    near = abs(beta - 1e-6)
    tensors = {name: tensor.double() for name, tensor in problem().tensors.items()}
    jsd = fused_suffix_kl(**tensors, divergence="jsd", beta=near) / (near * (1 - near))
    torch.testing.assert_close(jsd, fused_suffix_kl(**tensors, divergence=kl), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wider_weight_is_rounded_within_the_budget(dtype, fused_impl):
    """A logit is off by u sum |h W| at most, u half of the dtype's eps, and a divergence by as much of each model's."""
    p = problem()
    narrow = p.with_tensors(**{name: t.to(dtype) for name, t in p.tensors.items() if name.endswith("hidden")})
    rounded = p.with_tensors(**{name: t.to(dtype) for name, t in p.tensors.items()})
    got, by_hand, exact = run(narrow, fused_impl), run(rounded, fused_impl), oracle(narrow)
    assert torch.equal(got.loss, by_hand.loss)
    assert got.gradients["student_weight"].dtype == torch.float32
    assert torch.equal(got.gradients["student_weight"].to(dtype), by_hand.gradients["student_weight"])
    shift = 0.0
    for name in ("student", "teacher"):
        hidden, weight = (narrow.tensors[f"{name}_{part}"].double().abs() for part in ("hidden", "weight"))
        shift += torch.finfo(dtype).eps / 2 * float((hidden.flatten(0, 1) @ weight.T).max())
    kl = float(exact.loss)
    assert abs(float(got.loss) - kl) < 2 * shift * (1 + kl)
    assert abs(float(got.loss) - kl) > 1e-6  # they were rounded


BAD = {
    "with an index": (
        {"mask": mask(0), "student_index": INDEX},
        ValueError,
        "mask: expected None with a student_in",
    ),
    "with the teacher's": (
        {"mask": mask(0), "teacher_index": INDEX},
        ValueError,
        "mask: expected None with a teacher",
    ),
    "of floats": ({"mask": mask(0).float()}, TypeError, "mask: expected dtype torch.bool, got torch.float32"),
    "flat": ({"mask": mask(0).flatten()}, ValueError, r"mask: expected shape \[3, 4\], as student_hidden.*got \[12\]"),
    "elsewhere": ({"mask": mask(0).to("meta")}, ValueError, "mask: expected device cpu, .*got meta"),
    "a list": ({"mask": [True]}, TypeError, "mask: expected a tensor, got list"),
    "bool index": ({"student_index": mask(0)[:2]}, ValueError, "student_index: expected 12 entries.*got .2, 4."),
    "int8 index": ({"student_index": INDEX.to(torch.int8)}, TypeError, "student_index: expected dtype torch.int64"),
    "weights": (
        {"row_weight": WEIGHTS.T},
        ValueError,
        r"row_weight: expected shape \[12\].* \[3, 4\].*got \[4, 3\]",
    ),
}


@pytest.mark.parametrize("options, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        fused_suffix_kl(**problem().tensors, **options)
