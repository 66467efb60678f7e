"""Attention of a run: both models are prepared once, from the run's own batches, and the summary says why."""

import numpy as np
import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM, PreTrainedModel, TrainingArguments

from disc_kernels.shared_prefix import attention_implementation
from disc_train.data.dataset import DocumentDataset
from disc_train.data.splits import TokenizedDocument
from disc_train.data.templates import Templates
from disc_train.models import attention
from disc_train.models.attention import Attention, flex_savings, prepare_attention
from disc_train.packing.drawing import sample_batches
from disc_train.summary import describe_attention
from disc_train.trainer import DiscTrainer
from tests.train.world import make_model

IDS = np.arange(200, dtype=np.int32)


@pytest.fixture(scope="module")
def documents():
    """Sixteen of 300 to 500 different tokens, in sentences of 25."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(12, 20, 16, endpoint=True) * 25
    return [
        TokenizedDocument(str(i), generator.integers(0, 300, n, dtype=np.int32), tuple(range(0, n, 25)))
        for i, n in enumerate(lengths.tolist())
    ]


def _savings(model, documents, batch_size, **templates):
    dataset = DocumentDataset(documents, templates=Templates(**templates))
    return flex_savings(model, model, sample_batches(dataset, batch_size))


def test_savings_follow_the_trees(documents):
    model = make_model(hidden_size=1536)
    alone = _savings(model, documents, 1)
    assert -0.05 < alone["teacher"] <= 0  # one document is one sequence
    assert abs(alone["student"]) < 0.05  # few tokens, of which a dense mask has few pairs
    padded = _savings(model, documents, 16)
    assert padded["teacher"] == pytest.approx(1 - np.mean([len(d.input_ids) for d in documents]) / 500, abs=0.05)
    footers = _savings(model, documents, 16, teacher_header=IDS[:40], teacher_footer=IDS[:12], student_header=IDS)
    assert footers["teacher"] > 0.1 and footers["student"] > 0.1


def test_reasons_on_the_cpu(make_dataset):
    apart = Lfm2ForCausalLM(
        Lfm2Config(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            layer_types=["conv", "full_attention"],
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    prepared = prepare_attention(make_model(), make_model("gemma2"), "auto", make_dataset(), 4)
    assert prepared == {
        "student": Attention("sdpa", "flex trains on CUDA only"),
        "teacher": Attention("eager", "sdpa leaves out the softcap of attention logits"),
    }
    prepared = prepare_attention(make_model(), apart, "sdpa", make_dataset(), 4)
    assert prepared["student"] == Attention("sdpa", "as asked for")
    assert prepared["teacher"].reason.startswith("its layers do not let branches share a trunk")


def test_an_implementation_that_failed_is_named(make_dataset, monkeypatch):
    monkeypatch.setattr(attention, "use_attention", lambda *_: "eager")
    prepared = prepare_attention(make_model(), make_model(), "auto", make_dataset(), 4)
    assert prepared["student"] == Attention("eager", "sdpa failed its check")


@pytest.fixture
def on_cuda(monkeypatch):
    """Models that say they are on CUDA; nothing is checked by running them."""
    monkeypatch.setattr(PreTrainedModel, "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(
        attention,
        "use_attention",
        lambda model, requested, saving: attention_implementation(model.config, requested, "cuda", saving),
    )


def test_teacher_and_student_may_differ_on_cuda(on_cuda, documents):
    """A header of 200 tokens before five suffixes is a tree; the documents are one sequence each, and as long."""
    same = [TokenizedDocument(d.name, np.resize(d.input_ids, 400), tuple(range(0, 400, 25))) for d in documents]
    dataset = DocumentDataset(same, templates=Templates(student_header=IDS))
    model = make_model(hidden_size=1536)
    prepared = prepare_attention(model, model, "auto", dataset, 16)
    assert prepared["teacher"].implementation == "sdpa"
    assert "flex would save" in prepared["teacher"].reason
    assert prepared["student"].implementation == "shared_prefix_flex"
    text = describe_attention(prepared)
    assert text.startswith("student: shared_prefix_flex (it saves ")
    assert "; teacher: sdpa (flex would save " in text


def test_what_both_models_got_is_said_once():
    same = Attention("sdpa", "as asked for")
    assert describe_attention({"student": same, "teacher": same}) == "sdpa (as asked for)"


def test_models_are_prepared_once(make_dataset, monkeypatch, tmp_path):
    prepared, use_attention = [], attention.use_attention

    def counted(model, *rest):
        prepared.append(model)
        return use_attention(model, *rest)

    monkeypatch.setattr(attention, "use_attention", counted)
    student, teacher = make_model(), make_model()
    trainer = DiscTrainer(student, teacher, TrainingArguments(tmp_path, use_cpu=True), make_dataset())
    assert prepared == [student, teacher]
    assert student.config._attn_implementation == teacher.config._attn_implementation == "sdpa"
    assert [got.implementation for got in trainer.attention.values()] == ["sdpa", "sdpa"]
