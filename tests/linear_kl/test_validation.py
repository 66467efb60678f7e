"""Every bad input is refused with a message that names the argument and says what was expected and what was got."""

import os
import subprocess
import sys

import pytest
import torch

from disc_kernels import FusedSuffixKLLoss, LogitTransform, fused_suffix_kl
from tests.linear_kl.oracle import build, loss_of, smallest_workspace

INTEGERS = torch.arange(6)


def bad(argument, value, *said, error=ValueError, **others):
    """A call that differs from a good one in `argument` and `others`; the message has its name and each of `said`."""
    options = {argument: value, **others}
    return pytest.param(argument, options, said, error, id=f"{argument}={str(value)[:40]}")


OPTIONS = [
    *(bad("temperature", t, str(t)) for t in (0.0, -1.0, float("nan"), float("inf"))),
    bad("temperature", "hot", "str", error=TypeError),
    bad("temperature", None, "NoneType", error=TypeError),
    *(bad("beta", b, str(b), divergence="jsd") for b in (-0.1, 1.5, float("nan"))),
    bad("divergence", "kl", "'kl'", "forward_kl", "reverse_kl", "jsd"),
    bad("reduction", "average", "'average'", "mean", "sum", "none"),
    bad("impl", "cuda", "'cuda'", "triton", "torch", "reference"),
    bad("vocab_size", 0, "0"),
    bad("vocab_size", -3, "-3"),
    bad("vocab_size", 51, "51", "50"),
    bad("vocab_size", 10.0, "float", error=TypeError),
    bad("max_workspace_bytes", 0, "0"),
    bad("max_workspace_bytes", -5, "-5"),
    bad("max_workspace_bytes", 1.5, "float", error=TypeError),
    bad("student_transform", 2.0, "LogitTransform", "float", error=TypeError),
    bad("teacher_transform", "tanh", "LogitTransform", "str", error=TypeError),
]

ROWS = [
    bad("row_weight", torch.ones(5), "5", "6"),
    bad("row_weight", torch.ones(6, 1), "[6, 1]"),
    bad("row_weight", torch.ones(6, dtype=torch.int64), "int64", error=TypeError),
    bad("row_weight", torch.ones(6, requires_grad=True), "grad"),
    bad("row_weight", torch.ones(6, device="meta"), "meta", "cpu"),
    bad("row_weight", [1.0] * 6, "list", error=TypeError),
    *(
        param
        for name in ("student_index", "teacher_index")
        for param in (
            bad(name, torch.tensor([0, 1, 2, 3, 4, 6]), "6"),
            bad(name, torch.tensor([0, 1, 2, 3, 4, -1]), "-1"),
            bad(name, torch.tensor([0, 1, 2, 3, 4, 2**40]), str(2**40)),
            bad(name, INTEGERS[:5], "5", "6"),
            bad(name, INTEGERS.view(2, 3), "[2, 3]"),
            bad(name, INTEGERS.to(torch.int16), "int64", "int16", error=TypeError),
            bad(name, INTEGERS.float(), "int64", "float32", error=TypeError),
            bad(name, INTEGERS.to("meta"), "meta", "cpu"),
            bad(name, list(range(6)), "list", error=TypeError),
        )
    ),
]

TENSORS = [
    *(
        param
        for model in ("student", "teacher")
        for param in (
            bad(f"{model}_hidden", torch.zeros(6, 7), "7", "8"),
            bad(f"{model}_hidden", torch.zeros(()), "[]"),
            bad(f"{model}_hidden", torch.zeros(6, 8, dtype=torch.int64), "int64", error=TypeError),
            bad(f"{model}_hidden", torch.zeros(6, 8).double(), "float64", "float32", error=TypeError),
            bad(f"{model}_hidden", torch.zeros(6, 8, dtype=torch.complex64), "complex64", error=TypeError),
            bad(f"{model}_hidden", [[0.0] * 8] * 6, "list", error=TypeError),
            bad(f"{model}_weight", torch.zeros(50), "[50]"),
            bad(f"{model}_weight", torch.zeros(1, 50, 8), "[1, 50, 8]"),
            bad(f"{model}_weight", torch.zeros(0, 8), "[0, 8]"),
            bad(f"{model}_weight", torch.zeros(50, 8, device="meta"), "meta", "cpu"),
            bad(f"{model}_weight", torch.zeros(50, 8, dtype=torch.float16), "float16", "float32", error=TypeError),
            bad(f"{model}_weight", [], "list", error=TypeError),
            bad(f"{model}_bias", torch.zeros(49), "49", "50"),
            bad(f"{model}_bias", torch.zeros(50, 1), "[50, 1]"),
            bad(f"{model}_bias", torch.zeros(50, dtype=torch.int64), "int64", error=TypeError),
            bad(f"{model}_bias", torch.zeros(50, device="meta"), "meta", "cpu"),
        )
    ),
    bad("teacher_hidden", torch.zeros(6, 8, device="meta"), "meta", "cpu"),
    bad("teacher_hidden", torch.zeros(5, 8), "5", "6"),
    bad("vocab_size", None, "50", "40", teacher_weight=torch.zeros(40, 8)),
    bad("student_weight", None, "NoneType", error=TypeError),
    bad("teacher_weight", None, "8 of teacher_hidden (logits"),
    bad("vocab_size", 45, "45", "40", teacher_weight=torch.zeros(40, 8)),
]


def good_call(**changed):
    arguments = {
        "student_hidden": torch.randn(6, 8),
        "student_weight": torch.randn(50, 8),
        "teacher_hidden": torch.randn(6, 8),
        "teacher_weight": torch.randn(50, 8),
    }
    return fused_suffix_kl(**{**arguments, **changed})


@pytest.mark.parametrize("argument, options, said, error", [*OPTIONS, *ROWS, *TENSORS])
def test_bad_argument(argument, options, said, error):
    with pytest.raises(error) as refused:
        good_call(**options)
    message = str(refused.value)
    for part in (argument, *said):
        assert part in message, f"{part!r} is not in {message!r}"
    assert "expected" in message and "got" in message, f"{message!r} does not say what was expected and got"


def test_checks_know_no_implementation(impl):
    for options in (
        {"temperature": 0.0},
        {"student_index": torch.tensor([0, 1, 2, 3, 4, 6])},
        {"row_weight": torch.ones(5)},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            good_call(**options, impl=impl)


def test_message_of_a_short_index_says_both_lengths():
    with pytest.raises(ValueError, match=r"(?=.*student_index)(?=.*teacher_index)(?=.*\b3\b)(?=.*\b4\b)"):
        good_call(student_index=torch.zeros(3, dtype=torch.int64), teacher_index=torch.zeros(4, dtype=torch.int64))


def test_workspace_too_small_for_a_row(fused_impl):
    """One row needs two rows of logits at least. As many bytes as the message says will do; one less is refused."""
    problem = build(vocab=1000)
    need = smallest_workspace(problem, fused_impl)
    assert 2 * 1000 <= need < 100 * 1000
    with pytest.raises(ValueError, match=rf"max_workspace_bytes.*{need}"):
        loss_of(problem, problem.tensors, fused_impl, max_workspace_bytes=need - 1)
    assert loss_of(problem, problem.tensors, fused_impl, max_workspace_bytes=need).isfinite()


@pytest.mark.parametrize("softcap", [0.0, -1.0, float("nan"), float("inf")])
def test_softcap_must_be_positive(softcap):
    with pytest.raises(ValueError, match=rf"softcap.*{softcap}"):
        LogitTransform(softcap=softcap)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale_must_be_finite(scale):
    with pytest.raises(ValueError, match=rf"scale.*{scale}"):
        LogitTransform(scale=scale)


@pytest.mark.parametrize(
    "option, value", [("temperature", -1.0), ("divergence", "kl"), ("reduction", "average"), ("impl", "cuda")]
)
def test_module_refuses_bad_options_at_the_latest_when_called(option, value):
    with pytest.raises(ValueError, match=option):
        FusedSuffixKLLoss(**{option: value})(torch.randn(2, 4), torch.randn(5, 4), torch.randn(2, 4), torch.randn(5, 4))


def test_module_refuses_unknown_options():
    with pytest.raises(TypeError, match="temprature"):
        FusedSuffixKLLoss(temprature=2.0)(torch.randn(2, 4), torch.randn(5, 4), torch.randn(2, 4), torch.randn(5, 4))


def test_vocab_group_is_a_process_group():
    with pytest.raises(TypeError, match=r"vocab_group: expected a torch\.distributed\.ProcessGroup, got object"):
        good_call(vocab_group=object())


def test_vocab_group_of_others():
    with pytest.raises(ValueError, match="vocab_group: expected a group that this process is a member of"):
        good_call(vocab_group=torch.distributed.GroupMember.NON_GROUP_MEMBER)


def test_triton_refuses_float64():
    double = {
        f"{model}_{part}": torch.randn(6, 6).double()
        for model in ("student", "teacher")
        for part in ("hidden", "weight")
    }
    with pytest.raises(ValueError, match=r"impl.*triton.*float64"):
        good_call(**double, impl="triton")


def test_float16_on_one_side_only_is_fine_between_models():
    assert good_call(teacher_hidden=torch.randn(6, 8).half(), teacher_weight=torch.randn(50, 8).half()).isfinite()


def test_a_refused_call_leaves_nothing_behind():
    """Also no poisoned state: the next good call gives what it gave before."""
    torch.manual_seed(1)
    before = good_call()
    with pytest.raises(ValueError, match="student_index"):
        good_call(student_index=torch.tensor([6] * 6))
    torch.manual_seed(1)
    assert torch.equal(good_call(), before)


def in_a_new_process(code):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_cold_import_needs_torch_only():
    heavy = ("triton", "transformers", "accelerate", "datasets", "peft", "torch.distributed.tensor")
    code = (
        "import torch, sys; before = set(sys.modules); import disc_kernels;"
        f"print([name for name in {heavy} if name in set(sys.modules) - before])"
    )
    assert in_a_new_process(code) == "[]"


def test_torch_implementation_never_imports_triton_nor_dtensor():
    code = (
        "import torch, sys; from disc_kernels import fused_suffix_kl as f; t = torch.ones(2, 3); f(t, t, t, t);"
        "print('triton' in sys.modules, 'torch.distributed.tensor' in sys.modules)"
    )
    assert in_a_new_process(code) == "False False"


def test_triton_refuses_cpu_tensors_outside_the_interpreter():
    """An explicit implementation never falls back to another."""
    code = """
import torch
from disc_kernels import fused_suffix_kl
t = torch.ones(2, 3)
try:
    fused_suffix_kl(t, t, t, t, impl="triton")
except (ValueError, RuntimeError) as error:
    print(type(error).__name__, error)
"""
    said = in_a_new_process(code)
    assert "impl" in said and "cpu" in said.lower() and "TRITON_INTERPRET" in said, said
