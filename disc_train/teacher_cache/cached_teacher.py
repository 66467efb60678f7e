"""Stand in for a teacher whose rows are in a cache."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from disc_kernels.hf import OutputHead
from disc_train.data.example import Branch, Example
from disc_train.teacher_cache.readings import reading_of
from disc_train.teacher_cache.store import Rows, Store


def move_head(head: OutputHead, device: torch.device) -> OutputHead:
    """Move a head, without gradients, to a device."""
    bias = None if head.bias is None else head.bias.detach().to(device)
    return head._replace(weight=head.weight.detach().to(device), bias=bias)


@dataclass(frozen=True)
class RowReader:
    """Read what a teacher says of branches, for the collator; a data loader's worker reads for itself."""

    store: Store

    def __call__(self, branches: Sequence[tuple[Example, Branch]]) -> tuple[Rows, np.ndarray]:
        """Return rows, each once, and which of them each predicted token of the branches has, [M] int64."""
        return self.store.read([reading_of(e.name, e.teacher_trunk, branch) for e, branch in branches])


@dataclass(frozen=True)
class CachedTeacher:
    """Hold all that is kept of a teacher while a student trains.

    Args:
        store: its rows, on disk.
        head: with hidden states, the teacher's head; None: the rows are summaries, which need none.
        temperature, vocab_size: of summaries, which hold for these alone.
        note: what the cache is, for the summary.
    """

    store: Store
    head: OutputHead | None
    temperature: float | None
    vocab_size: int | None
    note: str

    @property
    def reader(self) -> RowReader:
        return RowReader(self.store)

    def to(self, device: torch.device) -> "CachedTeacher":
        """Move the head, if there is one, to a device."""
        return self if self.head is None else replace(self, head=move_head(self.head, device))


Teacher = PreTrainedModel | CachedTeacher | None  # None: the student with its adapters switched off


def live(teacher: Teacher) -> PreTrainedModel | None:
    """Return the teacher if it is a model."""
    return None if isinstance(teacher, CachedTeacher) else teacher


def read_by(teacher: Teacher, student: PreTrainedModel) -> PreTrainedModel | RowReader:
    """Return what a collator asks for the teacher's part of a batch."""
    return teacher.reader if isinstance(teacher, CachedTeacher) else teacher or student
