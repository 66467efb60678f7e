"""Documents and their splits -> one teacher sequence, one student sequence, and the rows of the two to compare."""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from disc_kernels import SharedPrefixLayout
from disc_train.splits import Split, TokenizedDocument


class Sample(NamedTuple):
    """A document and the suffixes of it, at least one, that the student is trained on."""

    document: TokenizedDocument
    splits: Sequence[Split]


class PackedBatch(TypedDict):
    """A plain mapping, so that data loaders and trainers can move it; `input_ids` is the student's, as they expect.

    Row `student_index[m]` of the student's hidden states and row `teacher_index[m]` of the teacher's predict the same
    token, given the suffix so far and, for the teacher only, the text before it.
    """

    input_ids: Tensor  # [1, L_s] int64: every suffix, a branch of its own
    layout: SharedPrefixLayout  # L_s tokens, a tree a document
    teacher_input_ids: Tensor  # [1, L_t] int64: every document once, to the end of its last suffix
    teacher_layout: SharedPrefixLayout  # L_t tokens, a tree (of a trunk only) a document
    student_index: Tensor  # [M] int64
    teacher_index: Tensor  # [M] int64
    row_weight: Tensor  # [M] float32: 1 / (rows of the suffix * suffixes of the document), so 1 in all for a document
    num_documents: int
    names: list[str]  # of the documents, for messages


def pack(samples: Sequence[Sample]) -> PackedBatch:
    """Lay out a batch of documents; nothing is padded.

    The last token of a suffix is only ever predicted, so neither model reads it: a suffix of n tokens makes n - 1 rows.
    """
    teacher_ids: list[np.ndarray] = []
    student_ids: list[np.ndarray] = []
    teacher_trees: list[tuple[int, list[tuple[int, int]]]] = []
    student_trees: list[tuple[int, list[tuple[int, int]]]] = []
    teacher_index: list[Tensor] = []
    row_weight: list[Tensor] = []
    teacher_start = 0
    for document, splits in samples:
        branches = []
        for split in splits:
            rows = split.stop - split.start - 1
            student_ids.append(document.input_ids[split.start : split.stop - 1])
            branches.append((0, rows))
            teacher_index.append(teacher_start + torch.arange(split.start, split.stop - 1))
            row_weight.append(torch.full((rows,), 1 / (rows * len(splits))))
        student_trees.append((0, branches))
        read = max(split.stop for split in splits) - 1
        teacher_ids.append(document.input_ids[:read])
        teacher_trees.append((read, []))
        teacher_start += read

    student_layout = SharedPrefixLayout.from_trees(student_trees)
    return PackedBatch(
        input_ids=_sequence(student_ids),
        layout=student_layout,
        teacher_input_ids=_sequence(teacher_ids),
        teacher_layout=SharedPrefixLayout.from_trees(teacher_trees),
        student_index=torch.arange(len(student_layout)),
        teacher_index=torch.cat(teacher_index),
        row_weight=torch.cat(row_weight),
        num_documents=len(samples),
        names=[document.name for document, _ in samples],
    )


def _sequence(pieces: Sequence[np.ndarray]) -> Tensor:
    """[1, L] int64."""
    return torch.from_numpy(np.concatenate(pieces)).long()[None]
