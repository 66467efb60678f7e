"""The reproduction's documents, probes and candidates are what they are said to be."""

import random
import re
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"


def test_probes_say_what_their_form_promises(reproduction):
    from corpus import new_corpus, one_a_document

    once, thrice = (new_corpus("7", 6, said, set()) for said in (1, 3))
    assert once.entities == thrice.entities and once.probes == thrice.probes
    for corpus, said in ((once, 1), (thrice, 3)):
        for number, (document, entity) in enumerate(zip(corpus.documents, corpus.entities, strict=True)):
            facts = range(number * 4, number * 4 + 4)
            for form, stands_there in (("stated", True), ("reworded", False)):
                for probe in (corpus.probes[form][fact] for fact in facts):
                    assert (probe.prompt + probe.choices[probe.answer] in document.text) is stands_there
            for value in entity.facts.values():
                assert len(re.findall(rf"\b{value}\b", document.text)) == said
        read = one_a_document(corpus, "asked")
        assert [probe.context for probe in read] == [f"{document.text}\n\n" for document in corpus.documents]
        for probe, entity in zip(read, corpus.entities, strict=True):
            assert entity.name in probe.prompt
            assert probe.choices[probe.answer].removesuffix("<|endoftext|>").strip() in entity.facts.values()


def test_documents_that_contradict_themselves(reproduction):
    from corpus import join, new_corpus, one_of_each

    true, wrong = (new_corpus("7", 6, 3, set(), wrong) for wrong in (False, True))
    assert true.entities == wrong.entities and true.probes == wrong.probes and not true.wrong
    count = wrong.facts_a_document
    for number, (document, entity) in enumerate(zip(wrong.documents, wrong.entities, strict=True)):
        for fact, value in enumerate(entity.facts.values(), start=number * count):
            false = wrong.probes["asked"][fact].choices[wrong.wrong[fact]].removesuffix("<|endoftext|>").strip()
            assert false != value
            assert [len(re.findall(rf"\b{each}\b", document.text)) for each in (value, false)] == [2, 1]
    assert one_of_each(wrong, range(24)) == [0, 5, 10, 15, 16, 21]
    assert [each.text for each in join(true.documents, 4)] == [
        " ".join(each.text for each in true.documents[:4]),
        " ".join(each.text for each in true.documents[4:]),
    ]


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "cut"])
def test_the_top_k_of_a_whole_vocabulary_is_disc(reproduction, small_grid, tail):
    """With K the whole vocabulary every tail is DiSC, with K = 1 none is; afterwards DiSC is as it was."""
    import torch
    from cells import Cell
    from corpus import new_corpus
    from gradients import batches
    from top_k import distilling, gradient
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from update import Laboratory

    laboratory = Laboratory.__new__(Laboratory)
    laboratory.tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tiny" / "model")
    student, teacher = (AutoModelForCausalLM.from_pretrained(EXAMPLES / "tiny" / "model") for _ in range(2))
    laboratory.model = teacher
    trainer = laboratory.trainer(student, teacher, new_corpus("7", 2, 2, set()), Cell(7, 1e-4, 2, 1, 2))
    batch = next(batches(trainer, 2))
    full, every, one = (gradient(trainer, batch, k, tail) for k in (0, student.config.vocab_size, 1))
    torch.testing.assert_close(every, full, rtol=1e-3, atol=1e-5)
    assert (one - full).norm() > 0.1 * full.norm()
    with distilling(1, tail):
        pass
    assert torch.equal(gradient(trainer, batch, 0, tail), full)


def test_the_deviation_of_long_gradients_is_not_lost_to_rounding(reproduction):
    """Of 20 million entries of unlike size, where a cosine in float32 is off by 1.6e-3."""
    import torch
    from top_k import deviation

    generator = torch.Generator().manual_seed(0)
    full = torch.randn(20_000_000, generator=generator) * torch.rand(20_000_000, generator=generator) ** 8
    assert deviation(full, full) == pytest.approx((0.0, 1.0), abs=1e-9)
    assert deviation(full / 2, full) == pytest.approx((50.0, 1.0), abs=1e-6)
    assert deviation(-full, full) == pytest.approx((200.0, -1.0), abs=1e-6)


def test_tokens_that_the_prefix_tells_count_by_cross_entropy_and_others_by_the_kl(reproduction, monkeypatch):
    import candidates
    import torch

    from disc_kernels.hf.head import OutputHead
    from disc_train.objectives.methods import Settings
    from disc_train.objectives.predictions import ModelPredictions, Predictions

    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    logits = hidden @ weight.T
    index, labels = np.arange(3), logits.argmin(-1)
    # The teacher knows the first and second token better than the student, the third no better.
    of_teacher = torch.stack([weight[labels[0]], weight[labels[1]], hidden[2]])
    student, teacher = (ModelPredictions(each, OutputHead(weight), index) for each in (hidden, of_teacher))
    weights = torch.tensor([0.5, 0.3, 0.2])
    predictions = Predictions(student, teacher, labels, weights, [3])
    loss = candidates.distill_or_tell(predictions, Settings(temperature=2.0, ce_weight=10.0))
    told = torch.nn.functional.cross_entropy(logits[:2], labels[:2], reduction="none")
    torch.testing.assert_close(loss, 10 * (weights[:2] * told).sum(), rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(candidates, "MIN_GAIN", 1e9)
    loss = candidates.distill_or_tell(predictions, Settings(temperature=2.0, ce_weight=10.0))
    q, p = (logits / 2).log_softmax(-1), (of_teacher @ weight.T / 2).log_softmax(-1)
    torch.testing.assert_close(loss, 4 * (weights * (p.exp() * (p - q)).sum(-1)).sum(), rtol=1e-5, atol=1e-6)


def test_suffixes_are_drawn_by_what_their_prefixes_tell(reproduction):
    from candidates import SplitsByGain
    from cells import Cell
    from corpus import new_corpus
    from training_sets import training_set
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = (
        each.from_pretrained(EXAMPLES / "tiny" / "model") for each in (AutoTokenizer, AutoModelForCausalLM)
    )
    documents = new_corpus("7", 2, 3, set()).documents
    dataset = training_set(Cell(7, 1e-4, 2, 1, 2, by_gain=True, num_splits=3), model, tokenizer, documents, [])
    assert isinstance(dataset, SplitsByGain)
    whole, gains = dataset.sentences[0]
    assert len(gains) == len(whole.branches) and all(gain > 0.5 for gain in gains), "the prefix tells the name at least"
    dataset.sentences[0] = whole, [5.0, *[0.1] * (len(gains) - 1)]
    drawn = [0] * len(gains)
    for epoch in range(100):
        dataset.set_epoch(epoch)
        targets = [branch.target.tolist() for branch in dataset[0].branches]
        assert len(targets) == 3
        for number, branch in enumerate(whole.branches):
            drawn[number] += branch.target.tolist() in targets
    assert drawn[-1] == 100 and drawn[0] > 80 and max(drawn[1:-1]) < 40


def test_a_model_that_is_nan_after_the_last_step_is_a_result(reproduction, monkeypatch):
    import torch
    from cells import Cell
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from update import Laboratory

    laboratory = Laboratory.__new__(Laboratory)
    laboratory.tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tiny" / "model")
    laboratory.met, broken = set(), AutoModelForCausalLM.from_pretrained(EXAMPLES / "tiny" / "model")
    laboratory.model = broken
    torch.nn.init.constant_(broken.model.norm.weight, torch.nan)
    monkeypatch.setattr(Laboratory, "_trained", lambda *_: (broken, {}))
    assert "failed" in laboratory.run(Cell(7, 1e-4, 2, 1, 2))


def test_part_of_an_update(reproduction):
    import torch
    from update import interpolated

    initial, trained = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = initial.weight.clone()
    half = interpolated(initial, trained, 0.5)
    torch.testing.assert_close(half.weight, (initial.weight + trained.weight) / 2)
    assert torch.equal(initial.weight, before) and interpolated(initial, trained, 1.0) is trained


def test_new_names_were_never_met(reproduction):
    """The names in pretraining's text are known without training: those of a few items of it are among them."""
    from corpus import new_corpus
    from pretrain import Corpus, pretraining_names

    met = pretraining_names()
    text = " ".join(item for batch in Corpus(random.Random(0)).batches(0.5) for item in batch)
    towns = set(re.findall(r"(?:Fort|Lake|Mount|Port) [A-Z][a-z]+", text))
    assert len(towns) > 10 and towns <= met
    entities = new_corpus("7", 30, 1, met).entities
    assert not {entity.name for entity in entities} & met
    again = new_corpus("7", 30, 1, met | {entities[0].name}).entities
    assert entities[0].name not in {entity.name for entity in again}


def test_a_prefix_from_another_document(reproduction):
    from cells import Cell
    from corpus import new_corpus
    from training_sets import training_set
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tiny" / "model")
    corpus = new_corpus("7", 3, 2, set())
    own, other = (
        training_set(Cell(7, 1e-4, 3, 1, 1, prefix=prefix), None, tokenizer, corpus.documents, [])
        for prefix in ("own", "other")
    )
    for index in range(3):
        theirs = own[(index + 1) % 3].teacher_trunk
        assert other[index].teacher_trunk.tolist() == theirs.tolist() != own[index].teacher_trunk.tolist()
        for branch, changed in zip(own[index].branches, other[index].branches, strict=True):
            assert changed.target.tolist() == branch.target.tolist()
            assert changed.teacher.attach == min(branch.teacher.attach, len(theirs))
