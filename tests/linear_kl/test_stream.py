"""The forward without logits in memory, in Triton's interpreter, against the float64 oracle."""

import gc
import json
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from disc_kernels import LogitTransform
from disc_kernels.linear_kl.validation import build_problem

pytest.importorskip("triton")
from disc_kernels.linear_kl import stream_triton

STATS = ("divergence", "student_entropy", "teacher_entropy", "agreement")
OPTIONAL = ("student_index", "teacher_index", "row_weight", "student_bias", "teacher_bias", "student_transform")
DEFAULTS = dict.fromkeys((*OPTIONAL, "teacher_transform", "vocab_size"))
DEFAULTS |= {"temperature": 1.0, "divergence": "forward_kl", "beta": 0.5, "reduction": "mean"}


def internal(problem, autocast=None):
    """What `fused_suffix_kl` makes of these arguments."""
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        return build_problem(**{**DEFAULTS, **problem.tensors, **problem.options})


def stream(problem, statistics=True, autocast=None):
    """In memory that starts as NaN: a number nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then fills with NaN
    try:
        return stream_triton.stream_rows(internal(problem, autocast), statistics)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["forward_kl", "reverse_kl"])
def direction(request):
    return request.param


@pytest.fixture
def check(plain, assert_accurate):
    """Statistics as near to the oracle as plain torch's. There are no gradients: plain torch's stand in."""

    def checked(problem):
        problem = replace(problem.with_options(reduction="none"), upstream=1.0)
        stats = stream(problem)
        got = replace(plain(problem), loss=stats.divergence, stats=dict(zip(STATS, stats, strict=True)))
        assert_accurate(got, problem)
        return stats

    return checked


CASES = {
    "aligned": {},
    "one row": {"rows": 1},
    "rows of several blocks, the last ragged": {"rows": 130, "vocab": 203},
    "shared teacher rows": {"teacher_rows": 2, "teacher_index": [0, 0, 1, 1, 1, 0]},
    "rows chosen and repeated": {"student_index": [4, 4, 1], "teacher_index": [0, 5, 5]},
    "student index alone": {"student_index": [3, 0, 5], "teacher_rows": 3},
    "biases": {"bias": True},
    "softcap": {"student_transform": LogitTransform(softcap=3.0), "teacher_transform": LogitTransform(softcap=5.0)},
    "student softcap alone": {"student_transform": LogitTransform(softcap=2.0)},
    "scale": {"student_transform": LogitTransform(scale=0.25), "teacher_transform": LogitTransform(scale=1.75)},
    "temperature": {"temperature": 0.7},
    "widths differ, neither a multiple of a block": {"width": 41, "teacher_width": 7},
    "wide": {"width": 130, "teacher_width": 96, "vocab": 300},
    "vocabularies differ": {"vocab": 1000, "teacher_vocab": 1024, "vocab_size": 990},
    "vocabulary of whole tiles": {"vocab": 384},
    "vocabulary within a tile": {"vocab": 31},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_case(build, check, direction, case):
    check(build(divergence=direction, **case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_everything_at_once(build_everything, check, direction, dtype):
    check(build_everything(dtype, divergence=direction))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=str)
def test_models_of_different_dtypes(build_everything, check, direction, dtypes):
    check(build_everything(dtypes[0], teacher_dtype=dtypes[1], divergence=direction))


def test_autocast_rounds_operands(build, oracle):
    """To float16: the interpreter, unlike a GPU, truncates where it should round to bfloat16."""
    problem = build(bias=True, reduction="none")
    rounded = {n: t if n.endswith("bias") else t.half().float() for n, t in problem.tensors.items()}
    stats = stream(problem, autocast=torch.float16)
    exact = oracle(problem.with_tensors(**rounded)).stats["divergence"]
    assert (oracle(problem).stats["divergence"] - exact).abs().max() > 1e-4
    torch.testing.assert_close(stats.divergence.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ranges", [1, 2, 7, 40])
def test_any_number_of_ranges(build_everything, check, direction, monkeypatch, ranges):
    """More ranges than the 16 tiles there are, too."""
    monkeypatch.setattr(stream_triton, "INTERPRETER_RANGES", ranges)
    check(build_everything(divergence=direction))


def test_unusual_strides(build, check):
    """Columns of a larger tensor, a transposed weight, every second row, an expanded row."""
    problem = build(bias=True, student_index=[0, 5, 2, 1], teacher_index=[3, 3, 0, 4])

    def spread(t):
        return torch.full((2 * len(t), 2 * t.shape[1] + 3), torch.nan)[::2, 3::2].copy_(t)

    t = problem.tensors
    strided = problem.with_tensors(
        student_hidden=spread(t["student_hidden"]).view(3, 2, 24),
        student_weight=t["student_weight"].T.contiguous().T,
        teacher_hidden=t["teacher_hidden"][:1].expand(6, 24),
        teacher_weight=spread(t["teacher_weight"]),
        student_bias=t["student_bias"].repeat_interleave(3)[::3],
    ).with_options(
        student_index=torch.tensor([0, 9, 5, 9, 2, 9, 1, 9])[::2],
    )
    assert not any(tensor.is_contiguous() for tensor in strided.tensors.values() if tensor.dim() > 1)
    check(strided)


def test_what_is_left_out_may_hold_anything(build, check, direction):
    """Rows no index names and entries beyond vocab_size are never read into a result."""
    problem = build(bias=True, vocab_size=900, student_index=[1, 3], teacher_index=[0, 4], divergence=direction)
    clean = check(problem)
    poisoned = {name: t.clone() for name, t in problem.tensors.items()}
    for name, t in poisoned.items():
        t[[2, 5] if name.endswith("hidden") else slice(900, None)] = torch.nan
    for got, expected in zip(stream(problem.with_tensors(**poisoned)), clean, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["student_hidden", "teacher_hidden"])
def test_what_is_not_finite_stays_in_its_row(build, direction, value, tensor):
    problem = build(divergence=direction)
    clean = stream(problem)
    problem.tensors[tensor][3, 5] = value
    got = stream(problem)
    others = [0, 1, 2, 4, 5]
    assert not got.divergence[3].isfinite()
    assert all(torch.equal(x[others], y[others]) for x, y in zip(got, clean, strict=True))


@pytest.mark.parametrize("masked", [slice(0, 700), slice(300, 1000), slice(250, 820)], ids=str)
def test_entries_masked_in_both_models(build, check, direction, masked):
    problem = build(bias=True, divergence=direction)
    biases = {name: problem.tensors[name].clone() for name in ("student_bias", "teacher_bias")}
    for bias in biases.values():
        bias[masked] = -torch.inf
    check(problem.with_tensors(**biases))


def test_entries_masked_in_one_model(build, check, direction):
    problem = build(bias=True, divergence=direction)
    where_it_exists, infinite = "teacher_bias", "student_bias"
    if direction == "reverse_kl":
        where_it_exists, infinite = infinite, where_it_exists
    bias = problem.tensors[where_it_exists].clone()
    bias[:700] = -torch.inf
    check(problem.with_tensors(**{where_it_exists: bias}))
    problem.tensors[infinite][7] = -torch.inf
    assert (stream(problem).divergence == torch.inf).all()


def test_no_possible_entry(build, direction):
    problem = build(bias=True, divergence=direction)
    problem.tensors["student_bias"][:] = -torch.inf
    assert stream(problem).divergence.isnan().all()


def with_logits(build, student, teacher, **options):
    """A problem whose logits are exactly these [M, V] numbers: the hidden states are the identity."""
    identity = torch.eye(len(student))
    problem = build(rows=len(student), width=len(student), vocab=student.shape[1], **options)
    return problem.with_tensors(
        student_hidden=identity, student_weight=student.T, teacher_hidden=identity, teacher_weight=teacher.T
    )


def test_logits_ten_thousand_apart(build, check, direction):
    student, teacher = torch.randn(2, 4, 403)
    rows = torch.arange(4)
    student[rows, [0, 5, 402, 7]] += 1e4
    teacher[rows, [3, 402, 2, 7]] += 1e4
    stats = check(with_logits(build, student, teacher, divergence=direction))
    assert stats.divergence[3] == 0.0


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_logits_far_from_zero(build, direction, offset):
    student, teacher = torch.randint(-64, 64, (2, 4, 403)) / 16
    near = with_logits(build, student, teacher, divergence=direction)
    far = with_logits(build, student + offset, teacher - offset, divergence=direction)
    for got, expected in zip(stream(far), stream(near), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_nearly_identical_distributions(build, oracle, direction, temperature):
    """A KL of about 10^-10 nats, far below the rounding of a log-probability."""
    teacher = torch.randn(4, 2003)
    student = teacher + 1.4e-5 * temperature * torch.randn(4, 2003)
    problem = with_logits(build, student, teacher, divergence=direction, reduction="none", temperature=temperature)
    exact, got = oracle(problem).loss, stream(problem).divergence
    assert exact.min() > 1e-11 and exact.max() < 4e-10
    budget = 0.02 * exact + (4 * torch.finfo(torch.float32).eps) ** 2
    assert ((got.double() - exact).abs() <= budget).all(), f"expected {exact.tolist()}, got {got.tolist()}"


@pytest.mark.parametrize("gap", [1e-7, 3e-7, 1e-3])
def test_never_negative(build, direction, gap):
    teacher = 3 * torch.randn(64, 517)
    problem = with_logits(build, teacher + gap * torch.randn(64, 517), teacher, divergence=direction)
    assert (stream(problem).divergence >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_identical_models(build, direction, dtype):
    problem = build(dtype=dtype, vocab=2003, bias=True, divergence=direction)
    same = {f"teacher_{n}": problem.tensors[f"student_{n}"] for n in ("hidden", "weight", "bias")}
    stats = stream(problem.with_tensors(**same))
    assert (stats.divergence >= 0).all() and stats.divergence.max() <= 1e-13
    assert torch.equal(stats.agreement, torch.ones(6))
    assert torch.equal(stats.student_entropy, stats.teacher_entropy)


def test_agreement_is_of_the_first_largest(build, direction):
    student, teacher = torch.zeros(2, 2, 403)
    student[:, [30, 300]] = 1.0  # in different tiles and ranges
    teacher[0, 30] = teacher[1, 300] = 1.0
    assert stream(with_logits(build, student, teacher, divergence=direction)).agreement.tolist() == [1.0, 0.0]


def test_no_rows(build, direction):
    none = torch.zeros(0, dtype=torch.int64)
    problem = build(divergence=direction).with_options(student_index=none, teacher_index=none)
    assert [(x.shape, x.dtype) for x in stream(problem)] == [((0,), torch.float32)] * 4


def test_without_statistics(build_everything, direction):
    problem = build_everything(divergence=direction)
    stats = stream(problem, statistics=False)
    assert torch.equal(stats.divergence, stream(problem).divergence)
    assert all(x.isnan().all() for x in stats[1:])


def test_what_is_refused(build):
    hidden = torch.randn(3, 4, 24)[:, :-1]
    cut = build(rows=9).with_tensors(student_hidden=hidden)
    for problem, reason in (
        (build(divergence="jsd"), "jsd needs both normalisers"),
        (build(dtype=torch.float64), "float32, not in torch.float64"),
        (cut, "student_hidden with strides"),
    ):
        assert reason in stream_triton.refusal(internal(problem))
        with pytest.raises(ValueError, match=rf"streaming: .*{reason}.*; compute it in chunks"):
            stream(problem)
    assert stream_triton.refusal(internal(build())) is None


@pytest.mark.parametrize("statistics", [False, True])
def test_peak_memory_is_the_formula(build, tmp_path, statistics):
    problem = internal(build(rows=300, vocab=2000, width=8))
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        stats = stream_triton.stream_rows(problem, statistics)
    trace.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    now = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    assert stats.divergence.shape == (300,)
    budget = stream_triton.peak_bytes(problem, statistics)
    assert 0.5 * budget < peak <= budget < 4 * 300 * 2000, f"peak {peak}, budget {budget}"


@pytest.mark.parametrize("multiprocessors", [108, 132, 148])
@pytest.mark.parametrize("rows", [1, 128, 700, 1536, 2048, 8192, 65536])
def test_programs_fill_a_device_in_whole_waves(monkeypatch, multiprocessors, rows):
    class Properties:
        multi_processor_count = multiprocessors

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    blocks = stream_triton.BLOCKS[2]
    ranges = stream_triton._ranges(rows, 151_936, blocks, torch.device("cuda"))
    programs = ranges * -(-rows // blocks.rows)
    waves = -(-programs // multiprocessors)
    assert stream_triton.MIN_RANGES <= ranges <= -(-151_936 // blocks.entries)
    assert programs > 0.85 * waves * multiprocessors
    assert stream_triton._ranges(rows, 100, blocks, torch.device("cuda")) == 2  # no more than there are tiles


def test_a_call_without_gradients_takes_it_where_it_is_faster(build_everything, loss_of, monkeypatch):
    """On no device yet; the rows are sorted for the teacher's sake, and the caller's order comes back."""
    problem = replace(build_everything(reduction="none"), asks=())
    expected = loss_of(problem, problem.leaves(), "torch")
    calls = []
    stream_rows = stream_triton.stream_rows
    monkeypatch.setattr(stream_triton, "stream_rows", lambda *a: calls.append(a) or stream_rows(*a))
    assert not loss_of(problem, problem.leaves(), "triton").requires_grad
    assert not calls
    monkeypatch.setattr("disc_kernels.linear_kl.function.streaming_is_faster", lambda *_: True)
    torch.testing.assert_close(loss_of(problem, problem.leaves(), "triton"), expected, rtol=1e-5, atol=1e-6)
    assert len(calls) == 1
