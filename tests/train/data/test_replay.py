"""Replay: how much of an epoch it is, what is drawn, and that it is trained on as it should be."""

import copy

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from disc_train.data.dataset import ExampleDataset, ReplayDataset, whole_documents
from disc_train.data.splits import TokenizedDocument
from disc_train.models.causal_lm import use_attention
from disc_train.objectives.methods import OBJECTIVES, Settings, batch_loss
from disc_train.objectives.predictions import predict
from disc_train.packing.collator import collator, pack
from disc_train.trainer import DiscTrainer
from tests.train.world import make_model, perturbed, run_arguments


@pytest.fixture
def old():
    """Five documents to replay, of 8 tokens and more."""
    rng = np.random.default_rng(0)
    return whole_documents(
        [TokenizedDocument(f"old{i}", rng.integers(0, 300, 8 + i).astype(np.int32), (0,)) for i in range(5)]
    )


def _drawn(dataset, epoch):
    dataset.set_epoch(epoch)
    return [dataset[i].name for i in range(len(dataset.dataset), len(dataset))]


@pytest.mark.parametrize(("share", "drawn"), [(0.5, 7), (0.1, 1), (0.01, 1), (0.75, 21)])
def test_the_share_is_of_all_examples(share, drawn, make_dataset, old):
    """Seven documents of their own; at least one more."""
    dataset = ReplayDataset(make_dataset(), old, share, seed=0)
    assert (len(dataset), dataset.drawn_per_epoch) == (7 + drawn, drawn)
    assert [dataset[i].name for i in range(7)] == [f"doc{i}" for i in range(7)]
    assert all(name.startswith("old") for name in _drawn(dataset, 0))


def test_draws_are_of_the_seed_and_the_epoch(make_dataset, old):
    one, same, other = (ReplayDataset(make_dataset(), old, 0.5, seed) for seed in (0, 0, 1))
    assert [_drawn(one, 3), _drawn(one, 0)] == [_drawn(same, 3), _drawn(same, 0)]
    assert len({tuple(_drawn(one, epoch)) for epoch in range(5)} | {tuple(_drawn(other, 0))}) > 4


def test_nothing_is_drawn_twice_before_all_were(make_dataset, old):
    names = _drawn(ReplayDataset(make_dataset(), old, 0.5, seed=0), 0)
    assert set(names) == {f"old{i}" for i in range(5)}
    assert len(set(_drawn(ReplayDataset(make_dataset(3), old, 0.5, seed=0), 0))) == 3


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_a_share_that_is_none(share, make_dataset, old):
    with pytest.raises(ValueError, match="share: expected a number between 0 and 1, got"):
        ReplayDataset(make_dataset(), old, share, seed=0)


def test_the_split_points_of_an_epoch_are_drawn_anew_too(make_dataset, old):
    documents = make_dataset(num_splits=2)
    dataset = ReplayDataset(documents, old, 0.5, seed=0)
    dataset.set_epoch(3)
    splits = [documents.splits(i) for i in range(7)]
    dataset.set_epoch(0)
    assert splits != [documents.splits(i) for i in range(7)]


@pytest.mark.parametrize("method", OBJECTIVES)
def test_replay_by_kl_is_kl_of_whole_documents_beside_the_method(method, make_dataset, old):
    teacher = make_model().double().eval()
    student = perturbed(teacher)
    plain = copy.deepcopy(teacher), copy.deepcopy(student)
    for model in (student, teacher):
        use_attention(model, "auto")
    documents = make_dataset()
    own = documents if method in ("disc", "cd") else whole_documents(documents.documents)
    mixed = ReplayDataset(own, old, 0.5, seed=0, by_kl=True)
    picked = [8, 0, 9, 1]  # replayed ones first
    collate = collator(student, teacher, compare_all=method in ("disc", "cd", "ft_kl"))
    settings = Settings(temperature=2.0, ce_weight=0.5 if method == "disc" else 0.0)
    got = batch_loss(method, student, teacher, collate([mixed[i] for i in picked]), settings)
    alone = batch_loss(method, student, teacher, collate([own[0], own[1]]), settings)

    temperature = 2.0 if method in ("disc", "cd") else 1.0
    replayed = torch.zeros(())
    for index in (8, 9):
        ids = torch.tensor(mixed[index].branches[0].target)[None].long()
        p, q = (log_softmax(model(ids).logits[0, :-1] / temperature, dim=-1) for model in plain)
        replayed = replayed + temperature**2 * (p.exp() * (p - q)).sum(-1).mean()
    assert float((got - alone).detach()) == pytest.approx(float(replayed.detach()), rel=5e-6)


def test_a_batch_of_replayed_examples_alone(old):
    teacher = make_model()
    student = perturbed(teacher)
    for model in (student, teacher):
        use_attention(model, "auto")
    mixed = ReplayDataset(old, old, 0.5, seed=0, by_kl=True)
    batch = collator(student, teacher, compare_all=False)([mixed[5], mixed[6]])
    rows, none = predict(student, teacher, batch), batch["replayed"]
    assert none == 2
    assert len(rows.teacher.index) == len(rows.targets)
    loss = batch_loss("talr", student, teacher, batch, Settings())
    loss.backward()
    assert float(loss.detach()) > 0


def test_micro_batches_of_replayed_examples_alone_have_no_part_in_tau(old, tmp_path):
    steps = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    args = run_arguments(tmp_path, **steps)
    one = whole_documents([TokenizedDocument("one", np.arange(9, dtype=np.int32), (0,))])
    trainer = DiscTrainer(make_model(), make_model(), args, ReplayDataset(one, old, 0.8, 0, by_kl=True), method="talr")
    trainer.train()
    assert (trainer.state.global_step, trainer.examples_read) == (3, 5)


def test_the_teacher_reads_the_replayed_documents_alone(old):
    mixed = ReplayDataset(old, old, 0.5, seed=0, by_kl=True)
    batch = pack([mixed[5], mixed[0]], compare_all=False)
    assert batch["names"][0] == mixed[0].name
    assert batch["teacher_input_ids"].numel() == len(mixed[5].branches[0].target) - 1


def _train(folder, model, dataset, teacher=None, resume=None):
    steps = {"per_device_train_batch_size": 2, "num_train_epochs": 2, "learning_rate": 1e-2}
    args = run_arguments(folder, save_strategy="steps", save_steps=3, **steps)
    trainer = DiscTrainer(model, teacher, args, dataset, method="ft")
    trainer.train(resume_from_checkpoint=resume and str(folder / f"checkpoint-{resume}"))
    return trainer


@pytest.mark.parametrize("resumed", [3, 6])
def test_resumed_training_draws_what_it_would_have_drawn(resumed, make_dataset, old, tmp_path):
    """7 documents and 3 of 5 others: 5 steps an epoch, so a checkpoint in each."""

    def dataset():
        return ReplayDataset(whole_documents(make_dataset().documents), old, 0.3, seed=0, by_kl=True)

    whole = _train(tmp_path, make_model(), dataset(), make_model())
    again = _train(tmp_path, make_model(), dataset(), make_model(), resumed)
    assert whole.state.global_step == again.state.global_step == 10
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_replay_by_kl_needs_a_teacher(make_dataset, old, tmp_path):
    own = whole_documents(make_dataset().documents)
    with pytest.raises(ValueError, match="teacher: expected a model"):
        _train(tmp_path, make_model(), ReplayDataset(own, old, 0.3, seed=0, by_kl=True))
    with pytest.raises(ValueError, match="teacher: expected None"):
        _train(tmp_path, make_model(), ReplayDataset(own, old, 0.3, seed=0), make_model())


def test_records_can_be_replayed(make_dataset, old):
    records = ExampleDataset([make_dataset()[0]])
    assert ReplayDataset(records, old, 0.5, seed=0).noun == "record"
