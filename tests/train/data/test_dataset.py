"""Documents as a training set: fresh but reproducible splits, and what is too short."""

import numpy as np
import pytest
from torch.utils.data import DataLoader

from disc_train.data.dataset import DocumentDataset
from disc_train.data.splits import TokenizedDocument


def _splits(dataset, epoch):
    dataset.set_epoch(epoch)
    return [dataset.splits(i) for i in range(len(dataset))]


def test_splits_change_with_epoch_and_seed_and_with_nothing_else(make_dataset):
    dataset, again = make_dataset(num_splits=3), make_dataset(num_splits=3)
    first, second = _splits(dataset, 0), _splits(dataset, 1)
    assert first != second
    assert _splits(dataset, 0) == first
    assert (_splits(again, 1), _splits(again, 0)) == (second, first)
    assert _splits(make_dataset(num_splits=3, seed=1), 0) != first


def test_workers_that_outlive_an_epoch_see_the_next(make_dataset):
    dataset = make_dataset(num_splits=3)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    header = len(dataset.templates.teacher_header)
    for epoch in (0, 1):
        expected = _splits(dataset, epoch)
        splits = [
            [(b.teacher.attach - header, b.teacher.attach - header + len(b.target)) for b in example.branches]
            for example in loader
        ]
        assert splits == expected


def _document(name, sentence_lengths):
    starts = np.cumsum([0, *sentence_lengths])
    return TokenizedDocument(name, np.arange(starts[-1], dtype=np.int32), tuple(starts[:-1].tolist()))


def test_what_cannot_be_split_is_set_apart():
    documents = [
        _document("empty", []),
        _document("good", [3, 3]),
        _document("one sentence", [9]),
        _document("last sentence of one token", [5, 1]),
        _document("some sentences of one token", [5, 2, 1]),
    ]
    dataset = DocumentDataset(documents, num_splits=2)
    assert [document.name for document in dataset.documents] == ["good", "some sentences of one token"]
    assert [document.name for document in dataset.too_short] == ["empty", "one sentence", "last sentence of one token"]


def test_a_draw_without_a_suffix_is_repeated():
    """One sentence of fifty can be a suffix; most draws of four miss it."""
    dataset = DocumentDataset([_document("d", [5, 4] + [1] * 49)], num_splits=9)
    for epoch in range(50):
        assert _splits(dataset, epoch) == [[(5, 9)]]


def test_all_too_short_is_an_error():
    with pytest.raises(ValueError, match="2 documents that are all too short"):
        DocumentDataset([_document("a", [9]), _document("b", [])])


def test_options_are_checked():
    with pytest.raises(ValueError, match="num_splits"):
        DocumentDataset([_document("a", [9, 9])], num_splits=0)
