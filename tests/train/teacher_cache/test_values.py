"""What a cached teacher says is what the teacher says: loss and gradients, for all that reads a cache."""

import copy

import numpy as np
import pytest
import torch

from disc_train.data.dataset import ExampleDataset, ReplayDataset, whole_documents
from disc_train.data.example import Branch, Context, Example
from disc_train.data.templates import Templates
from disc_train.objectives.methods import Settings, batch_loss
from disc_train.objectives.predictions import divergence, predict
from disc_train.packing.collator import collator
from disc_train.summary import describe_head
from disc_train.teacher_cache.cached_teacher import read_by
from tests.train.loop import gradient_error, loop_loss

# Measured: at most 1.5e-6 and 2.5e-3, a few of the dtype's roundings: all else is float64, and a gradient is smaller
# than the expected embeddings or hidden states, rounded, that it is a difference of.
FLOAT32 = 64 * 2**-24
BFLOAT16 = 4 * 2**-9


def read_alone(example):
    """The targets of an example as `loop_loss` takes them."""
    teacher, student = example.teacher_trunk.tolist(), example.student_trunk.tolist()

    def before(trunk, context):
        return [*trunk[: context.attach], *context.lead.tolist()]

    return [(before(teacher, b.teacher), before(student, b.student), b.target.tolist()) for b in example.branches]


def errors(made, method="disc", temperature=2.0, dataset=None, compare_all=True):
    """Relative errors of the loss and of the worst gradient with the cached teacher, on a whole epoch."""
    teacher, dataset = made.cache.teacher(), dataset or made.dataset
    examples = [dataset[number] for number in range(len(dataset))]
    expected = copy.deepcopy(made.student)
    expected.set_attn_implementation("eager")
    compared = [read_alone(example) for example in examples if compare_all or example.replayed]
    plain = loop_loss(expected, made.teacher, compared, temperature)
    plain.backward()
    batch = collator(made.student, read_by(teacher, made.student), compare_all)(examples)
    assert batch["teacher_input_ids"] is None
    made.student.zero_grad()
    loss = batch_loss(method, made.student, teacher, batch, Settings(temperature, kl_weight=1.0))
    loss.backward()
    return abs(float(loss.detach() / plain.detach()) - 1), gradient_error(made.student, expected)


@pytest.mark.parametrize(
    ("architecture", "frozen", "rows"),
    [
        ("llama", True, "summaries"),
        ("llama", False, "hidden states"),
        ("qwen2", True, "summaries"),  # tied
        ("gemma2", True, "hidden states"),  # soft-capped
        ("gemma2", False, "hidden states"),
    ],
)
@pytest.mark.parametrize(("stored", "bound"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)])
def test_loss_and_gradients_are_those_of_plain_float64(architecture, frozen, rows, stored, bound, make_cache):
    made = make_cache(architecture=architecture, frozen=frozen, stored=stored)
    made.fill()
    assert made.cache.identity["rows"] == rows
    loss, gradient = errors(made)
    assert loss < bound
    assert gradient < bound


def test_a_wrong_row_would_show(make_cache, monkeypatch):
    made = make_cache()
    made.fill()
    read = type(made.cache.teacher().store).read

    def shifted(store, wanted):
        rows, index = read(store, wanted)
        return rows, np.roll(index, 1)

    monkeypatch.setattr(type(made.cache.teacher().store), "read", shifted)
    assert min(errors(made)) > 100 * FLOAT32


@pytest.mark.parametrize("strategy", ["random_token_fixed", "uniform_token", "middle_sentence"])
def test_any_splits_are_drawn_from_one_cache(strategy, make_cache, make_dataset):
    make_cache().fill()
    made = make_cache(make_dataset(3, num_splits=4 if strategy != "middle_sentence" else 1, split_strategy=strategy))
    assert made.cache.missing == []
    made.dataset.set_epoch(5)
    assert max(errors(made)) < FLOAT32


HEADERS = Templates(np.array([5, 6, 7]), np.array([], dtype=np.int32), np.array([8]), start=0)


@pytest.mark.parametrize("templates", [HEADERS, HEADERS._replace(teacher_footer=np.array([9, 4]))])
def test_templates(templates, make_cache, make_dataset):
    """With a footer, what is drawn in the epochs asked for."""
    made = make_cache(make_dataset(3, num_splits=2, templates=templates))
    made.fill()
    made.dataset.set_epoch(1)
    assert max(errors(made)) < FLOAT32
    made.dataset.set_epoch(7)
    if len(templates.teacher_footer):
        with pytest.raises(ValueError, match=r"doc\d: expected its \d+ rows in the teacher's cache .*, got none"):
            errors(made)
    else:
        assert max(errors(made)) < FLOAT32


def test_records(make_cache):
    """Contexts that begin alike, one that has nothing for the student, and one sequence under two divisions."""
    rng = np.random.default_rng(0)
    common = rng.integers(0, 300, 40).astype(np.int32)
    examples = []
    for number, length in enumerate((0, 3, 7)):
        context = np.concatenate([common, rng.integers(0, 300, length).astype(np.int32)])
        student, target = common[: 2 * number], rng.integers(0, 300, 9).astype(np.int32)
        branches = [Branch(target, Context(len(context)), Context(len(student)))]
        examples.append(Example(f"r{number}", context, student, branches))
    last = examples[-1]
    earlier = np.concatenate([last.teacher_trunk[-3:], last.branches[0].target])
    branches = [Branch(earlier, Context(len(last.teacher_trunk) - 3), Context(0))]
    examples.append(Example("r3", last.teacher_trunk[:-3], common[:0], branches))
    made = make_cache(ExampleDataset(examples))
    made.fill()
    assert sum(sequence.rows for sequence in made.cache.sequences) == 8 + 9 + 11
    assert max(errors(made)) < FLOAT32


def test_whole_documents_that_are_replayed(make_cache, make_dataset):
    """The teacher of a finetuning reads those alone."""
    documents = make_dataset(5).documents
    dataset = ReplayDataset(whole_documents(documents[:2]), whole_documents(documents[2:]), 0.5, 0, by_kl=True)
    made = make_cache(dataset, compare_all=False, temperature=1.0)
    assert len(made.cache.sequences) == 3
    made.fill()
    replayed = ExampleDataset([dataset[number] for number in range(len(dataset)) if dataset[number].replayed])
    assert max(errors(made, "ft", 1.0, replayed, compare_all=False)) < FLOAT32


def test_hidden_states_serve_a_frozen_head_at_any_temperature(make_cache):
    make_cache(frozen=False).fill()
    made = make_cache(frozen=True, temperature=1.0)
    assert made.cache.missing == [] and made.cache.identity["rows"] == "hidden states"
    assert max(errors(made, temperature=1.0)) < FLOAT32


def test_summaries_are_for_the_forward_kl(make_cache):
    made = make_cache()
    made.fill()
    batch = collator(made.student, made.cache.teacher().reader)([made.dataset[0]])
    predictions = predict(made.student, made.cache.teacher(), batch)
    with pytest.raises(ValueError, match="divergence: expected forward_kl, which the cached summaries are for"):
        divergence(predictions, 2.0, kind="reverse_kl")
    made = make_cache(folder="other", forward_kl=False)
    made.fill()
    assert made.cache.teacher().head is not None
    assert "summaries are for the forward KL" in describe_head(made.student, made.cache.teacher(), True, "jsd")


def test_summaries_hold_at_their_temperature(make_cache):
    made = make_cache()
    made.fill()
    with pytest.raises(ValueError, match=r"temperature: expected 2\.0, the cached summaries', got 1\.0"):
        errors(made, temperature=1.0)
