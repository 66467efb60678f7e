"""Training steps: what is measured is what a case says, and only where ours gives the loop's loss and gradients."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import step_peers
from benchmarks import test_step as suite
from benchmarks.accuracy import Wrong
from benchmarks.recording import recorded
from benchmarks.step_cases import CPU_CASES, GPU_CASES, LEAST, MOST, TINY, StepCase
from benchmarks.step_run import LOOP, Problem, Run

SHAPE = replace(TINY, name="smaller", hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=300)
MIXED = replace(SHAPE, teacher_dtype=torch.bfloat16)
BFLOAT16 = replace(MIXED, student_dtype=torch.bfloat16)


class Untimed:
    """A benchmark fixture that is switched off."""

    stats = None

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, run, rounds):
        run()


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.setattr(suite, "DEVICE", "cpu")

    def measure(case, *systems):
        problem = Problem(case, case.shape.teacher("cpu"))
        return [suite.measure(Untimed(), problem, system) for system in systems]

    return measure


def test_names_are_unique():
    cases = [*CPU_CASES, *GPU_CASES]
    assert len({case.name for case in cases}) == len(cases)


def test_shapes_have_the_parameters_of_their_namesakes():
    counts = {case.shape.name: case.shape.teacher("meta").num_parameters() for case in GPU_CASES}
    assert {name: round(count / 1e6) for name, count in counts.items()} == {
        "qwen2.5-0.5b": 494,
        "qwen2.5-1.5b": 1544,
        "qwen2.5-7b": 7616,
        "llama-3.1-8b": 8030,
    }


@pytest.mark.parametrize("suffixes", ["sentence", "to-end"])
def test_documents(suffixes):
    dataset = StepCase(SHAPE, suffixes, 1).dataset()
    lengths = [len(document.input_ids) for document in dataset.documents]
    assert 390 < sum(lengths) / len(lengths) < 410
    for index, length in enumerate(lengths):
        splits = dataset.splits(index)
        assert splits[-1].stop == length
        assert 4 <= len(splits) <= 5  # the last sentence may be drawn twice, and a suffix have one token
        if suffixes == "to-end":
            assert {stop for _, stop in splits} == {length}
        else:
            assert all(LEAST <= stop - start <= MOST for start, stop in splits)


def test_documents_are_the_same_every_time():
    one, other = (StepCase(SHAPE, "sentence", 1).dataset()[3] for _ in range(2))
    assert (one.teacher_trunk == other.teacher_trunk).all()
    assert [branch.teacher.attach for branch in one.branches] == [branch.teacher.attach for branch in other.branches]


@pytest.mark.parametrize("shape", [SHAPE, MIXED, BFLOAT16], ids=lambda shape: shape.precision)
def test_a_student_has_the_teachers_weights_in_its_own_dtype(shape):
    teacher = shape.teacher("cpu")
    student = shape.student(teacher)
    assert student.get_input_embeddings().weight is student.get_output_embeddings().weight
    for own, frozen in zip(student.parameters(), teacher.parameters(), strict=True):
        assert (own.dtype, frozen.dtype) == (shape.student_dtype, shape.teacher_dtype)
        assert own.requires_grad and not frozen.requires_grad
        assert own.data_ptr() != frozen.data_ptr()
        assert torch.equal(own, frozen.to(own.dtype))


@pytest.mark.parametrize("shape", [SHAPE, MIXED, BFLOAT16], ids=lambda shape: shape.precision)
@pytest.mark.parametrize("suffixes", ["sentence", "to-end"])
def test_ours_gives_what_the_loop_gives(measure, shape, suffixes):
    loop, ours = measure(StepCase(shape, suffixes, 3), LOOP, "ours")
    assert loop["status"] == ours["status"] == "measured"
    assert set(ours["errors"]) == {"loss", "head", "first"}
    assert ours["bytes"] > ours["bytes_above"] > 0


def test_ours_alone_is_held_to_the_loop(measure):
    [ours] = measure(StepCase(SHAPE, "sentence", 1), "ours")
    assert 0 < ours["errors"]["first"] < 1e-5


def test_weights_and_states_are_counted(measure):
    [loop] = measure(StepCase(SHAPE, "sentence", 1), LOOP)
    weights = 4 * SHAPE.teacher("cpu").num_parameters()
    # The teacher, the student and its two states, and of the bytes above at least the gradient.
    assert 4 * weights <= loop["bytes"] - loop["bytes_above"] < 4.01 * weights
    assert loop["bytes_above"] > weights


@pytest.mark.parametrize("system", [LOOP, "ours"])
def test_a_step_moves_every_weight(system):
    case = StepCase(SHAPE, "sentence", 2)
    teacher = case.shape.teacher("cpu")
    run = Run(Problem(case, teacher), system)
    run.step()
    for name, parameter in run.student.named_parameters():
        assert not torch.equal(parameter, teacher.get_parameter(name)), name


def test_every_step_reads_the_next_documents(monkeypatch):
    read = []
    monkeypatch.setattr(step_peers, LOOP, lambda *_: lambda examples: read.append([e.name for e in examples]))
    case = StepCase(SHAPE, "sentence", 3)
    run = Run(Problem(case, case.shape.teacher("cpu")), LOOP)
    for documents in (None, 1, None):
        run.forward_backward(documents)
    assert read == [["0", "1", "2"], ["3"], ["4", "5", "6"]]


def scaled(backward, student):
    def twice(examples):
        loss = backward(examples)
        for parameter in student.parameters():
            parameter.grad *= 2
        return loss

    return twice


def without_gradient(backward, student):
    def zero(examples):
        loss = backward(examples)
        for parameter in student.parameters():
            parameter.grad.zero_()
        return loss

    return zero


def without_last_suffix(backward, student):
    return lambda examples: backward([replace(example, branches=example.branches[:-1]) for example in examples])


def without_last_document(backward, student):
    return lambda examples: backward(examples[:-1])


def prefix_cut(backward, student):
    def cut(example):
        branches = [
            branch._replace(teacher=branch.teacher._replace(attach=branch.teacher.attach - 1))
            for branch in example.branches
        ]
        return replace(example, branches=branches)

    return lambda examples: backward([cut(example) for example in examples])


@pytest.mark.parametrize("shape", [SHAPE, MIXED, BFLOAT16], ids=lambda shape: shape.precision)
@pytest.mark.parametrize("mutation", [scaled, without_gradient, without_last_suffix, without_last_document, prefix_cut])
def test_wrong_steps_have_no_time(measure, monkeypatch, mutation, shape):
    ours = step_peers.ours

    def mutant(case, dataset, student, teacher):
        return mutation(ours(case, dataset, student, teacher), student)

    monkeypatch.setattr(step_peers, "ours", mutant)
    with pytest.raises(Wrong, match="relative"):
        measure(StepCase(shape, "sentence", 2), LOOP, "ours")


@pytest.mark.parametrize(
    ("system", "error", "raised", "status"),
    [
        (LOOP, torch.OutOfMemoryError("CUDA out of memory"), pytest.skip.Exception, "out of memory"),
        ("ours", torch.OutOfMemoryError("CUDA out of memory"), pytest.skip.Exception, "out of memory"),
        (LOOP, TypeError("no such model"), pytest.skip.Exception, "failed: TypeError: no such model"),
        ("ours", Wrong("relative error of loss 1.0e+00"), Wrong, "wrong: relative error of loss 1.0e+00"),
    ],
)
def test_what_cannot_be_measured_is_a_row(monkeypatch, system, error, raised, status):
    rows = []

    benchmark = SimpleNamespace(extra_info={})

    def broken(*_):
        raise error

    case = StepCase(SHAPE, "sentence", 2)
    monkeypatch.setattr(suite, "measure", broken)
    monkeypatch.setattr(suite, "DEVICE", "cpu")
    with pytest.raises(raised):
        suite.test_step(benchmark, partial(recorded, rows, benchmark), case, system)
    assert rows == [{"system": system, "status": status, **case.describe()}]
