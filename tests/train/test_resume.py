"""Training that is interrupted and resumed gives, bit for bit, the weights of training that is not."""

import pytest
import torch

from disc_train.resume import changed_settings, save_settings
from disc_train.trainer import DiscTrainer
from tests.train.world import make_model, run_arguments


@pytest.fixture
def train(make_dataset, tmp_path):
    """train(resume, **arguments): the trained model, after 2 epochs of 4 steps on 7 documents; saves every 3 steps."""

    def run(resume=None, **arguments):
        steps = {"per_device_train_batch_size": 2, "num_train_epochs": 2, "learning_rate": 1e-2}
        saves = {"save_strategy": "steps", "save_steps": 3}
        args = run_arguments(tmp_path / "out", **steps, **saves | arguments)
        trainer = DiscTrainer(make_model(), make_model(), args, make_dataset(num_splits=3))
        trainer.train(resume_from_checkpoint=None if resume is None else str(tmp_path / "out" / f"checkpoint-{resume}"))
        assert trainer.state.global_step == 8
        return trainer.model

    return run


def test_what_makes_other_examples_of_the_same_texts_may_change(tmp_path):
    """A teacher with a shorter context, say, divides them into other chunks."""
    before = {"teacher_name_or_path": None, "text_column": "text", "temperature": 2.0, "examples": 3}
    before |= {"training data": "3 documents (checksum 0)", "texts": {"--train_file": "3 documents (checksum 1)"}}
    save_settings(before, tmp_path)
    drawn_otherwise = before | {"training data": "3 documents (checksum 2)"}
    changed = changed_settings(str(tmp_path), drawn_otherwise | {"teacher_name_or_path": "t"})
    assert changed == ["--teacher_name_or_path t (was None)"]
    with pytest.raises(ValueError, match="--train_file: expected the data of"):
        changed_settings(str(tmp_path), drawn_otherwise | {"temperature": 1.0})
    other_column = {"text_column": "body", "texts": {"--train_file": "3 documents (checksum 3)"}}
    with pytest.raises(ValueError, match=r"--text_column: expected the data of .* got 3 documents .checksum 3"):
        changed_settings(str(tmp_path), drawn_otherwise | other_column)


def _equal(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_in_the_middle_of_an_epoch(workers, train):
    uninterrupted = train(dataloader_num_workers=workers)
    assert _equal(train(resume=3, dataloader_num_workers=workers), uninterrupted)
    # The second epoch's splits are not the first's, which a resumed run must know.
    assert _equal(train(resume=6, dataloader_num_workers=workers), uninterrupted)


def test_resumed_between_epochs(train):
    uninterrupted = train(save_strategy="epoch")
    assert _equal(train(resume=4, save_strategy="epoch"), uninterrupted)


def test_persistent_workers_draw_the_splits_of_every_epoch(train):
    assert _equal(train(dataloader_num_workers=1, dataloader_persistent_workers=True), train())


def test_forgetting_the_epoch_would_show(train, monkeypatch):
    uninterrupted = train()
    monkeypatch.setattr("disc_train.data.dataset.DocumentDataset.set_epoch", lambda self, epoch: None)
    assert not _equal(train(resume=6), uninterrupted)
