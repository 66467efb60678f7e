"""Say which token sequences a teacher reads for a training set, whatever is drawn of it.

A teacher reads a document's prefix and suffix, which is the document whatever the split. So one sequence serves all
split strategies, unless a template puts a footer between the two: then each split drawn is a sequence of its own.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from disc_train.data.dataset import MIN_TOKENS, DocumentDataset, ExampleDataset, ReplayDataset
from disc_train.data.example import Branch, Example, Ids

KEY_BYTES = 16


class TeacherSequence(NamedTuple):
    """Hold a sequence that a teacher reads, and the first token whose row (its prediction of the next one) is wanted.

    The last token is only ever predicted, so there are `len(tokens) - 1 - first` rows.
    """

    name: str  # of the example, for messages
    tokens: Ids
    first: int

    @property
    def rows(self) -> int:
        return len(self.tokens) - 1 - self.first

    @property
    def key(self) -> bytes:
        """Return what a cache finds the sequence by, `KEY_BYTES` bytes."""
        tokens = np.ascontiguousarray(self.tokens, dtype=np.int32)
        return hashlib.blake2b(tokens.tobytes(), digest_size=KEY_BYTES).digest()


def sequence_of(example: Example, branch: Branch) -> tuple[TeacherSequence, int]:
    """Return the sequence that an example's branch belongs to, and the token that its target ends before."""
    name, trunk = example.name, example.teacher_trunk
    text = np.concatenate([branch.teacher.lead, branch.target])
    end = branch.teacher.attach + len(text)
    first = end - 1 - branch.rows
    if np.array_equal(text, trunk[branch.teacher.attach : end]):  # the branch goes on as its trunk does
        return TeacherSequence(name, trunk, first), end
    return TeacherSequence(name, np.concatenate([trunk[: branch.teacher.attach], text]), first), end


def sources(dataset: ExampleDataset, compare_all: bool = True) -> list[ExampleDataset]:
    """List the data sets that a teacher reads examples of: all, or without `compare_all` what is replayed by KL."""
    if not isinstance(dataset, ReplayDataset):
        return [dataset] if compare_all else []
    own = [dataset.dataset] if compare_all else []
    return own + ([dataset.replay] if compare_all or dataset.replays_by_kl else [])


def texts(dataset: ExampleDataset) -> Iterator[TeacherSequence]:
    """Yield all that a teacher may read of a data set without a template's footer: documents and records as a whole."""
    if isinstance(dataset, DocumentDataset):
        header = dataset.templates.teacher_header
        for document in (*dataset.documents, *dataset.too_short):  # too short for this split strategy
            if len(document.input_ids) >= MIN_TOKENS:
                tokens = np.concatenate([header, document.input_ids])
                yield TeacherSequence(document.name, tokens, first=max(0, len(header) - 1))
    else:
        yield from _as_drawn(dataset)


def sequences_of(dataset: ExampleDataset, epochs: int) -> list[TeacherSequence]:
    """List what a teacher reads of a data set in some epochs, each sequence once, always in the same order."""
    if not (isinstance(dataset, DocumentDataset) and len(dataset.templates.teacher_footer)):
        return merge(texts(dataset))
    several: list[TeacherSequence] = []
    current = dataset.epoch
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        several += _as_drawn(dataset)
    dataset.set_epoch(current)
    return merge(several)


def _as_drawn(dataset: ExampleDataset) -> Iterator[TeacherSequence]:
    for number in range(len(dataset)):
        example = dataset[number]
        for branch in example.branches:
            yield sequence_of(example, branch)[0]


def merge(several: Iterable[TeacherSequence]) -> list[TeacherSequence]:
    """Leave out repeated sequences, and keep of each all rows that are wanted."""
    distinct: dict[bytes, TeacherSequence] = {}
    for sequence in several:
        key = sequence.key
        if key not in distinct or sequence.first < distinct[key].first:
            distinct[key] = sequence
    return list(distinct.values())


def digest(several: Iterable[TeacherSequence]) -> str:
    """Compute a checksum of sequences, whatever their order."""
    return hashlib.blake2b(b"".join(sorted({sequence.key for sequence in several})), digest_size=KEY_BYTES).hexdigest()
