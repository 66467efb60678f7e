"""The signal is what a plain loop over split points measures, and the warning comes where the prefix tells nothing."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from disc_train.data.dataset import DocumentDataset
from disc_train.data.documents import Document
from disc_train.data.example import Branch, Context, Example
from disc_train.data.splits import sentence_spans, tokenize_document
from disc_train.models.causal_lm import use_attention
from disc_train.objectives import signal as signal_module
from disc_train.objectives.signal import Signal, measure_signal, take_evenly
from tests.train.world import make_model, perturbed


def _log_probabilities(model, prefix, suffix, temperature=1.0):
    """[n - 1, V]: of what follows each token of the suffix but the last."""
    logits = model(torch.tensor([prefix + suffix])).logits[0, len(prefix) : -1]
    return log_softmax(logits / temperature, dim=-1)


@torch.no_grad()
def test_the_signal_of_every_document_is_that_of_a_loop(make_dataset):
    teacher, student = make_model().eval(), perturbed(make_model()).train()
    dataset = make_dataset(4, num_splits=3)
    examples = [dataset[i] for i in range(4)]
    for model in (teacher, student):
        use_attention(model, "auto")
    signal = measure_signal(student, teacher, examples, temperature=2.0)
    assert student.training

    for number, document in enumerate(dataset.documents):
        ids = document.input_ids.tolist()
        other = dataset.documents[(number + 2) % 4].input_ids.tolist()
        prefixes = [start for start, _ in dataset.splits((number + 2) % 4)]
        divergence, gain_over_student, gain_over_other_context = [], [], []
        for start, stop in dataset.splits(number):
            suffix = ids[start:stop]
            foreign = other[: min(prefixes, key=lambda end: abs(end - start))]
            p, q = _log_probabilities(teacher, ids[:start], suffix, 2.0), _log_probabilities(student, [], suffix, 2.0)
            divergence.append(kl_div(q, p, log_target=True, reduction="sum") / len(p))
            own, none, after = (
                _log_probabilities(model, prefix, suffix)[range(len(suffix) - 1), suffix[1:]].mean()
                for model, prefix in ((teacher, ids[:start]), (student, []), (teacher, foreign))
            )
            gain_over_student.append(own - none)
            gain_over_other_context.append(own - after)
        for got, expected in zip(signal, (divergence, gain_over_student, gain_over_other_context), strict=True):
            assert got[number] == pytest.approx(float(torch.stack(expected).mean()), abs=1e-5)


def test_documents_are_taken_evenly(make_dataset):
    dataset = make_dataset()
    assert [example.name for example in take_evenly(dataset, 3)] == ["doc0", "doc2", "doc4"]
    assert len(take_evenly(dataset, 100)) == 7


@pytest.mark.parametrize(
    ("gain_over_student", "gain_over_other_context", "message"),
    [
        ([0.5, 0.7, 0.3], [1.0, 0.9, 1.1], None),
        ([-0.9, -1.1, -1.0], [0.5, 0.5, 0.5], "than without it"),
        ([0.5, 0.5, 0.5], [0.01, 0.015, 0.01], "than after another document's"),
        ([0.5, 0.5, 0.5], [1.5, -1.5, 0.3], "not certain that there is a signal"),  # the mean of 0.1 is all noise
        ([float("nan")], [0.5], "than without it"),
        ([0.5, 0.7, 0.3], [], None),
    ],
)
def test_the_warning(gain_over_student, gain_over_other_context, message):
    signal = Signal([0.4] * len(gain_over_student), gain_over_student, gain_over_other_context)
    warning = signal.warning("document")
    assert (warning is None) == (message is None)
    if message:
        assert message in warning
    assert [label for label, _ in signal.describe("document", 2.0)][2:] == ([] if message is None else ["WARNING"])


@pytest.mark.parametrize(("kl_clip", "warned"), [(None, False), (0.5, False), (0.4, True)])
def test_a_clip_below_the_mean_is_warned_of(kl_clip, warned):
    lines = Signal([0.2, 0.7], [0.5, 0.7], []).describe("document", 2.0, kl_clip)
    message = "--kl_clip 0.4 is less than the 0.4500 nats of a token in the mean"
    assert [text.startswith(message) for label, text in lines if label == "WARNING"] == [True] * warned


@pytest.mark.parametrize("examples", [1, 2])
def test_without_another_context_no_comparison_is_claimed(examples, make_dataset):
    model, teacher, dataset = make_model(), make_model(), make_dataset(1)
    for prepared in (model, teacher):
        use_attention(prepared, "auto")
    signal = measure_signal(model, teacher, [dataset[0]] * examples, temperature=2.0)
    assert (len(signal.gain_over_student), signal.gain_over_other_context) == (examples, [])
    lines = dict(signal.describe("document", 2.0))
    assert "another document" not in str(lines)
    assert " nats a token at T = 2, over the whole vocabulary: mean KL" in lines["signal"]
    assert lines["contexts"].startswith("make the target itself likelier to the teacher, in nats a token at T = 1: ")


def test_a_copy_of_a_document_is_not_another_document(make_dataset):
    model, teacher, dataset = make_model(), make_model(), make_dataset(4)
    for prepared in (model, teacher):
        use_attention(prepared, "auto")
    samples = [dataset[0], dataset[1], dataset[0], dataset[1]]  # the one two further on is the same text
    signal = measure_signal(model, teacher, samples, temperature=2.0)
    plain = measure_signal(model, teacher, samples[:2], temperature=2.0)
    assert signal.gain_over_other_context[:2] == pytest.approx(plain.gain_over_other_context, abs=1e-5)
    assert max(map(abs, plain.gain_over_other_context)) > 1e-3  # after itself: 0


@torch.no_grad()
def test_records_are_compared_with_another_records_context():
    teacher, student = make_model().eval(), perturbed(make_model())
    records = [
        Example(
            f"r{i}",
            np.array(context, dtype=np.int32),
            np.array([7, 8], dtype=np.int32),
            [Branch(np.array([i, 60, 61], dtype=np.int32), Context(len(context)), Context(2))],
        )
        for i, context in enumerate(([1, 2, 3], [1, 2, 3], [4, 5]))
    ]
    for model in (teacher, student):
        use_attention(model, "auto")
    signal = measure_signal(student, teacher, records, temperature=2.0)
    for number, other in enumerate(([4, 5], [4, 5], [1, 2, 3])):
        record = records[number]
        target = record.branches[0].target.tolist()
        own, none, after = (
            model(torch.tensor([context + target])).logits[0, len(context) - 1 : -1].log_softmax(-1)[range(3), target]
            for model, context in ((teacher, record.teacher_trunk.tolist()), (student, [7, 8]), (teacher, other))
        )
        assert signal.gain_over_student[number] == pytest.approx(float((own - none).mean()), abs=1e-5)
        assert signal.gain_over_other_context[number] == pytest.approx(float((own - after).mean()), abs=1e-5)


@torch.no_grad()
def test_in_batches_the_signal_is_that_of_examples_alone(make_dataset, monkeypatch):
    teacher, student, dataset = make_model().eval(), perturbed(make_model()), make_dataset(7)
    for model in (teacher, student):
        use_attention(model, "auto")
    examples = take_evenly(dataset, 7)
    together = measure_signal(student, teacher, examples, temperature=2.0)
    monkeypatch.setattr(signal_module, "MAX_BATCH_TOKENS", 4000)
    batches = list(signal_module._batches(examples))
    assert sorted(number for batch in batches for number in batch) == list(range(7))
    assert 1 < max(map(len, batches)) < 7
    for bound in ("MAX_BATCH", "MAX_BATCH_TOKENS"):
        monkeypatch.setattr(signal_module, bound, 1)
        assert max(map(len, signal_module._batches(examples))) == 1
        for alone, batched in zip(measure_signal(student, teacher, examples, temperature=2.0), together, strict=True):
            assert alone == pytest.approx(batched, abs=1e-5)


def test_a_target_is_not_put_after_a_context_that_leaves_out_its_first_token():
    """Behind an empty context nothing predicts it, so the two could not be compared."""
    model, teacher = make_model(), make_model()
    header = np.array([7, 8], dtype=np.int32)
    records = [
        Example(str(i), np.arange(n), header, [Branch(np.arange(5, 8), Context(n), Context(2))])
        for i, n in enumerate((3, 0, 4))
    ]
    for prepared in (model, teacher):
        use_attention(prepared, "auto")
    signal = measure_signal(model, teacher, records, temperature=2.0)
    assert (len(signal.gain_over_student), len(signal.gain_over_other_context)) == (3, 2)


def test_another_context_is_cut_to_what_the_teacher_can_read():
    """Learned positions end where the longest record does."""
    config = GPT2Config(vocab_size=300, n_positions=52, n_embd=32, n_layer=1, n_head=4)
    model, teacher = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    records = [
        Example(
            str(i), np.full(length, i), np.zeros(0, dtype=np.int32), [Branch(np.arange(n), Context(length), Context(0))]
        )
        for i, (length, n) in enumerate([(50, 2), (1, 50)])
    ]
    for prepared in (model, teacher):
        use_attention(prepared, "auto")
    assert len(measure_signal(model, teacher, records, temperature=2.0).gain_over_other_context) == 2


TINY = Path(__file__).parents[3] / "examples" / "tiny"


@pytest.fixture
def tiny_signal():
    """tiny_signal(texts): measured with the model of examples/tiny, which can read."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    student, teacher = (AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32) for _ in range(2))

    def measure(texts):
        documents = [
            tokenize_document(Document(str(i), text), tokenizer, "document", None) for i, text in enumerate(texts)
        ]
        dataset = DocumentDataset(documents)
        for model in (student, teacher):
            use_attention(model, "auto")
        return measure_signal(student, teacher, take_evenly(dataset, 100), temperature=2.0)

    return measure


def test_documents_of_unrelated_sentences_are_warned_of(tiny_signal):
    """The same sentences, as they stand and shuffled among the documents."""
    with (TINY / "documents.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    assert tiny_signal(texts).warning("document") is None
    documents = [[text[start:stop] for start, stop in sentence_spans(text)] for text in texts]
    sentences = list(itertools.chain(*documents))
    random.Random(0).shuffle(sentences)
    remaining = iter(sentences)
    unrelated = [" ".join(itertools.islice(remaining, len(document))) for document in documents]
    warning = tiny_signal(unrelated).warning("document")
    assert "to the teacher, a target is hardly likelier after its own context: by " in warning
    assert "(--ce_weight 1, or --method ft)" in warning
