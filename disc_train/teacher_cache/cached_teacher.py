"""Stand in for a teacher whose rows are in a cache."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from disc_kernels.hf import OutputHead
from disc_train.data.example import Branch, Example
from disc_train.packing.collator import ReadRows
from disc_train.teacher_cache.sequences import sequence_of
from disc_train.teacher_cache.store import Rows, Store


def move_head(head: OutputHead, device: torch.device) -> OutputHead:
    """Move a head, without gradients, to a device."""
    bias = None if head.bias is None else head.bias.detach().to(device)
    return head._replace(weight=head.weight.detach().to(device), bias=bias)


@dataclass(frozen=True)
class CachedTeacher:
    """Hold all that is kept of a teacher while a student trains."""

    store: Store  # its rows, on disk
    head: OutputHead | None  # the teacher's, for hidden states; None: the rows are summaries, which need none
    temperature: float | None  # of summaries, which hold for it alone
    vocab_size: int | None
    note: str  # what the cache is, for the summary

    @property
    def reader(self) -> ReadRows:
        """Return what a collator reads the teacher's rows by; a data loader's worker reads for itself."""
        return partial(_read_rows, self.store)

    def to(self, device: torch.device) -> "CachedTeacher":
        """Move the head, if there is one, to a device."""
        return self if self.head is None else replace(self, head=move_head(self.head, device))


def _read_rows(store: Store, branches: Sequence[tuple[Example, Branch]]) -> tuple[Rows, np.ndarray]:
    return store.read([sequence_of(example, branch) for example, branch in branches])


Teacher = PreTrainedModel | CachedTeacher | None  # None: the student with its adapters switched off


def live(teacher: Teacher) -> PreTrainedModel | None:
    """Return the teacher if it is a model."""
    return None if isinstance(teacher, CachedTeacher) else teacher


def read_by(teacher: Teacher, student: PreTrainedModel) -> PreTrainedModel | ReadRows:
    """Return what a collator asks for the teacher's part of a batch."""
    return teacher.reader if isinstance(teacher, CachedTeacher) else teacher or student
