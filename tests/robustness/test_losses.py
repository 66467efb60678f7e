"""Losses that other property tests leave out, with random shapes and options, against plain torch in float64."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disc_kernels import LogitTransform, fused_cross_entropy, fused_suffix_kl
from disc_kernels.hf import OutputHead
from tests.frozen_head.calls import run as run_frozen
from tests.linear_kl.oracle import assert_accurate, build

EXAMPLES = settings(max_examples=20, deadline=None, derandomize=True)
REDUCTIONS = st.sampled_from(["mean", "sum", "none"])
SCALES = st.floats(0.25, 1.25)
TRANSFORMS = st.builds(LogitTransform, scale=SCALES, softcap=st.none() | st.floats(2.0, 30.0))


@st.composite
def frozen_calls(draw):
    rows, vocab, count = draw(st.integers(1, 9)), draw(st.integers(8, 130)), draw(st.integers(1, 12))
    index = st.lists(st.integers(0, rows - 1), min_size=count, max_size=count)
    return {
        "rows": rows,
        "width": draw(st.integers(4, 33)),
        "teacher_width": draw(st.integers(1, 33)),
        "vocab": vocab,
        "vocab_size": draw(st.integers(8, vocab)),
        "bias": draw(st.booleans()),
        "student_index": draw(index),
        "teacher_index": draw(index),
        "row_weight": draw(st.lists(st.floats(0.125, 4.0, width=32), min_size=count, max_size=count)),
        "temperature": draw(st.floats(1.0, 4.0)),
        "reduction": draw(REDUCTIONS),
        "student_transform": LogitTransform(scale=draw(SCALES)),
        "teacher_transform": draw(TRANSFORMS),
        "seed": draw(st.integers(0, 1000)),
    }


@EXAMPLES
@given(call=frozen_calls())
def test_a_frozen_head(call):
    problem = replace(build(**call), asks=("student_hidden",))
    assert_accurate(run_frozen(problem, "torch"), problem)


@st.composite
def labelled(draw):
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    width, vocab = draw(st.integers(1, 24)), draw(st.integers(2, 90))
    entries = draw(st.integers(1, vocab))
    ignored = draw(st.sampled_from([-100, 0, -1]))
    return {
        "shape": shape,
        "width": width,
        "vocab": vocab,
        "ignore_index": ignored,
        "share": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "options": {
            "reduction": draw(REDUCTIONS),
            "transform": draw(st.none() | TRANSFORMS),
            "vocab_size": entries,
            "max_workspace_bytes": draw(st.none() | st.just(1 << 16)),
        },
        "bias": draw(st.booleans()),
        "weights": draw(st.sampled_from([None, torch.float32, torch.bool])),
        "labels": draw(st.sampled_from([torch.int64, torch.int32])),
        "seed": draw(st.integers(0, 1000)),
    }


@EXAMPLES
@given(call=labelled())
def test_cross_entropy(call):
    generator = torch.Generator().manual_seed(call["seed"])
    shape, options = call["shape"], call["options"]

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64, requires_grad=True)

    hidden, weight = normal(*shape, call["width"]), normal(call["vocab"], call["width"])
    bias = normal(call["vocab"]) if call["bias"] else None
    labels = torch.randint(options["vocab_size"], shape, generator=generator)
    labels = labels.masked_fill(torch.rand(shape, generator=generator) < call["share"], call["ignore_index"])
    row_weight = None
    if call["weights"] is not None:
        row_weight = torch.rand(shape, generator=generator).mul(2).to(call["weights"])
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    given_labels = labels.to(call["labels"])
    loss = fused_cross_entropy(
        hidden, weight, given_labels, bias=bias, row_weight=row_weight, ignore_index=call["ignore_index"], **options
    )

    transform = options["transform"] or LogitTransform()
    z = transform.scale * (hidden @ weight.T + (0.0 if bias is None else bias))
    z = z if transform.softcap is None else transform.softcap * torch.tanh(z / transform.softcap)
    log_p = z[..., : options["vocab_size"]].log_softmax(-1)
    counts = labels != call["ignore_index"]
    losses = -log_p.gather(-1, labels.where(counts, torch.zeros_like(labels)).unsqueeze(-1)).squeeze(-1) * counts
    weights = counts * (1.0 if row_weight is None else row_weight.double())
    expected = {"none": losses, "sum": (weights * losses).sum()}
    expected["mean"] = expected["sum"] / weights.sum() if weights.sum() > 0 else expected["sum"] * 0
    right = expected[options["reduction"]]
    torch.testing.assert_close(loss, right, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(loss.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad(loss, leaves, upstream), torch.autograd.grad(right, leaves, upstream)
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@st.composite
def masked(draw):
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    return {
        "shape": shape,
        "kept": draw(st.sampled_from([0.0, 0.4, 1.0])),
        "weighted": draw(st.booleans()),
        "teacher": draw(st.sampled_from(["head", "logits", "logits with -inf"])),
        "as_heads": draw(st.booleans()),
        "transform": draw(TRANSFORMS),
        "vocab": draw(st.integers(2, 60)),
        "seed": draw(st.integers(0, 1000)),
        "options": {
            "divergence": draw(st.sampled_from(["forward_kl", "reverse_kl", "jsd"])),
            "beta": draw(st.floats(0.05, 0.95)),
            "temperature": draw(st.floats(0.5, 4.0)),
            "reduction": draw(REDUCTIONS),
        },
    }


@EXAMPLES
@given(call=masked())
def test_masks_heads_and_given_logits(call):
    """As an index into rows, a weight and its options, and a product, which `tests/linear_kl` holds to float64."""
    generator = torch.Generator().manual_seed(call["seed"])
    shape, vocab, width = call["shape"], call["vocab"], 5

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    hidden, weight = normal(*shape, width).requires_grad_(), normal(vocab, width).requires_grad_()
    teacher_hidden, teacher_weight = normal(*shape, width), normal(vocab, width)
    keeps = torch.rand(shape, generator=generator) < call["kept"]
    row_weight = torch.rand(shape, generator=generator) if call["weighted"] else None
    rows = keeps.flatten().nonzero().squeeze(1)
    options = call["options"]
    if call["teacher"] != "head":
        logits = teacher_hidden @ teacher_weight.T
        if call["teacher"] != "logits" and options["divergence"] != "reverse_kl":
            logits[..., 0] = -torch.inf
        teacher = logits, None
    elif call["as_heads"]:
        teacher = teacher_hidden, OutputHead(teacher_weight)
    else:
        teacher = teacher_hidden, teacher_weight
    transform = {} if call["as_heads"] else {"student_transform": call["transform"]}
    student = OutputHead(weight, transform=call["transform"]) if call["as_heads"] else weight
    loss = fused_suffix_kl(hidden, student, *teacher, mask=keeps, row_weight=row_weight, **transform, **options)

    z_t = teacher[0] if teacher[1] is None else teacher_hidden @ teacher_weight.T
    z_s = call["transform"].scale * (hidden @ weight.T)
    cap = call["transform"].softcap
    z_s = z_s if cap is None else cap * torch.tanh(z_s / cap)
    log_p, log_q = ((z.flatten(0, -2)[rows] / options["temperature"]).log_softmax(-1) for z in (z_t, z_s))
    d = by_definition(log_p, log_q, options["divergence"], options["beta"])
    weights = torch.ones(len(rows)) if row_weight is None else row_weight.flatten()[rows].double()
    total = (weights * d).sum()
    mean = total / weights.sum() if len(rows) else total
    right = {"none": d, "sum": total, "mean": mean}[options["reduction"]]
    torch.testing.assert_close(loss, right, rtol=1e-9, atol=1e-12)
    upstream = torch.randn(loss.shape, generator=generator, dtype=torch.float64)
    got = torch.autograd.grad(loss, [hidden, weight], upstream)
    want = torch.autograd.grad(right, [hidden, weight], upstream)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def by_definition(log_p, log_q, divergence, beta):
    def kl(a, b):
        return (a.exp() * torch.where(a > -torch.inf, a - b, 0.0)).sum(-1)

    if divergence != "jsd":
        return kl(log_p, log_q) if divergence == "forward_kl" else kl(log_q, log_p)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
