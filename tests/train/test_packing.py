"""Packing aligns a student row with the teacher row that has read the same token; its weights are means of means."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disc_train.packing import Sample, pack
from disc_train.splits import Split, TokenizedDocument


def _document(ids, name="doc"):
    return TokenizedDocument(name=name, input_ids=np.array(ids, dtype=np.int32), sentence_starts=(0,))


def test_a_batch_by_hand():
    batch = pack(
        [
            Sample(_document([10, 11, 12, 13, 14, 15], "a"), [Split(1, 3), Split(3, 6)]),
            Sample(_document([20, 21, 22, 23], "b"), [Split(1, 3)]),
        ]
    )
    assert batch["teacher_input_ids"].tolist() == [[10, 11, 12, 13, 14, 20, 21]]
    assert batch["teacher_layout"].tree_id.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert batch["teacher_layout"].position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch["input_ids"].tolist() == [[11, 13, 14, 21]]
    assert batch["layout"].tree_id.tolist() == [0, 0, 0, 1]
    assert batch["layout"].branch_id.tolist() == [1, 2, 2, 1]
    assert batch["layout"].position_ids.tolist() == [0, 0, 1, 0]
    assert batch["student_index"].tolist() == [0, 1, 2, 3]
    assert batch["teacher_index"].tolist() == [1, 3, 4, 6]
    assert batch["row_weight"].tolist() == [1 / 2, 1 / 4, 1 / 4, 1]
    assert batch["num_documents"] == 2
    assert batch["names"] == ["a", "b"]


@st.composite
def samples(draw):
    """A document of distinct tokens, and suffixes of it that may overlap."""
    length = draw(st.integers(3, 20))
    first_id = 100 * draw(st.integers(0, 100))
    splits = []
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(1, length - 2))
        splits.append(Split(start, draw(st.integers(start + 2, length))))
    return Sample(_document(range(first_id, first_id + length)), splits)


@settings(deadline=None, max_examples=50)
@given(st.lists(samples(), min_size=1, max_size=4))
def test_rows_read_the_same_token_and_weigh_one_a_document(batch_samples):
    batch = pack(batch_samples)
    student_tokens = batch["input_ids"][0, batch["student_index"]]
    teacher_tokens = batch["teacher_input_ids"][0, batch["teacher_index"]]
    assert torch.equal(student_tokens, teacher_tokens)

    rows = iter(zip(teacher_tokens.tolist(), batch["row_weight"].tolist(), strict=True))
    for document, splits in batch_samples:
        for start, stop in splits:
            for token in document.input_ids[start : stop - 1]:
                got, weight = next(rows)
                assert got == token
                assert weight == pytest.approx(1 / ((stop - start - 1) * len(splits)))
    assert next(rows, None) is None
    assert batch["row_weight"].sum() == pytest.approx(len(batch_samples))
    # A suffix begins at position 0 for the student; the teacher counts from its document's beginning.
    teacher_positions = batch["teacher_layout"].position_ids[batch["teacher_index"]]
    starts = torch.cat([torch.full((b - a - 1,), a) for _, splits in batch_samples for a, b in splits])
    assert torch.equal(batch["layout"].position_ids, teacher_positions - starts)
