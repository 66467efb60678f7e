"""Open a run's teacher cache: check that it is the run's, fill what is missing, and hold what training needs of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from disc_kernels import LogitTransform
from disc_kernels.hf import OutputHead, output_head
from disc_train.data.dataset import DocumentDataset, ExampleDataset
from disc_train.models.frozen_head import head_is_frozen
from disc_train.teacher_cache.cached_teacher import CachedTeacher, move_head
from disc_train.teacher_cache.fill import FrozenHead, row_bytes, rows_of
from disc_train.teacher_cache.identity import check_identity, head_checksum, tokenizer_checksum, weights_checksum
from disc_train.teacher_cache.sequences import TeacherSequence, digest, merge, sequences_of, texts
from disc_train.teacher_cache.store import (
    HEAD,
    Store,
    explain_damage,
    read_description,
    write_description,
    write_tensors,
    writer,
)

HIDDEN, SUMMARIES = "hidden states", "summaries"


@dataclass(frozen=True)
class CacheSettings:
    """Hold the settings that decide what a run's cache contains."""

    folder: str  # where it is, or is to be
    teacher_name_or_path: str
    dtype: torch.dtype  # of the teacher's weights
    stored: torch.dtype  # of hidden states and summaries on disk
    temperature: float  # of the run's divergence
    autocast: torch.dtype | None  # of the training
    forward_kl: bool  # the divergence is the forward KL, so that summaries serve
    start: list[int]  # token ids that every sequence starts with


class TeacherCache:
    """Compare a run with what is in a cache's folder, and make it the run's teacher.

    Args:
        read: the data sets that the teacher reads, each with the number of epochs.
        student: as it is before it is trained.
        identity: another process's, which has computed the checksums.

    Raises:
        ValueError: naming the first field in which the cache is not this run's, or a damaged file.
    """

    def __init__(
        self,
        settings: CacheSettings,
        read: Sequence[tuple[ExampleDataset, int]],
        tokenizer: PreTrainedTokenizerBase,
        student: PreTrainedModel,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.settings = settings
        self.sequences = merge(sequence for source, epochs in read for sequence in sequences_of(source, epochs))
        self._description = read_description(settings.folder)
        self._student_head = output_head(student)
        no_cap = self._student_head.transform.softcap is None
        self.summarises = head_is_frozen(student) and no_cap and settings.forward_kl
        # Hidden states serve any head, a frozen one too.
        self.summarises &= self._description is None or self._description.get("rows") != HIDDEN
        self.identity = identity or self._identify([source for source, _ in read], tokenizer)
        self._store = Store(settings.folder)
        if self._description is not None:
            check_identity(settings.folder, self._description, self.identity, self.missing)

    def _identify(self, read: list[ExampleDataset], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        settings, head = self.settings, self._student_head
        templates = [
            [source.templates.teacher_header.tolist(), source.templates.teacher_footer.tolist()]
            for source in read
            if isinstance(source, DocumentDataset) and source.templates.longest > source.templates.start
        ]
        identity: dict[str, Any] = {
            "rows": SUMMARIES if self.summarises else HIDDEN,
            "teacher": weights_checksum(settings.teacher_name_or_path),
            "dtype": _name(settings.dtype),
            "tokenizer": tokenizer_checksum(tokenizer),
            "start": settings.start,
            "template": templates,
            "documents": digest(sequence for source in read for sequence in texts(source)),
            "stored": _name(settings.stored),
        }
        if self.summarises:
            identity |= {
                "temperature": settings.temperature,
                "student_head": head_checksum(head),
                "autocast": settings.autocast and _name(settings.autocast),
            }
        return identity

    @property
    def missing(self) -> list[TeacherSequence]:
        """List the sequences that are to be read before the cache can be used."""
        return [sequence for sequence in self.sequences if not self._store.has(sequence)]

    @property
    def complete(self) -> bool:
        """Tell whether the cache can be used: no sequence is missing, nor the teacher's head."""
        return not self.missing and (self.summarises or Path(self.settings.folder, HEAD).is_file())

    @property
    def rows(self) -> int:
        """Count the rows of all sequences."""
        return sum(sequence.rows for sequence in self.sequences)

    def row_bytes(self, hidden_size: int) -> int:
        """Count the bytes of a row on disk, for a teacher of this hidden size."""
        width = self._student_head.weight.shape[1] if self.summarises else hidden_size
        return row_bytes(width, self.summarises, self.settings.stored)

    def describe(self) -> str:
        """Say what the cache holds once it is filled, and how much of that is missing."""
        what = f"{self.identity['rows']} of {self.rows:,} tokens in {self.identity['stored']}"
        what += f", in {self.settings.folder}"
        missing = len(self.missing)
        return what + (f"; {missing:,} of {len(self.sequences):,} sequences are missing" if missing else "")

    def fill(self, teacher: PreTrainedModel, batch_size: int) -> None:
        """Run a teacher, which `use_attention` has prepared, over what is missing, and write it.

        Raises:
            ValueError: another process is filling the cache, or another run has begun it since it was opened.
            OSError: it cannot be written.
        """
        settings, teacher_head, frozen = self.settings, output_head(teacher), None
        vocab_size = min(head.vocab_size or len(head.weight) for head in (self._student_head, teacher_head))
        if self.summarises:
            head = move_head(self._student_head, teacher.device)
            frozen = FrozenHead(head, settings.temperature, vocab_size, settings.autocast)
        with writer(settings.folder) as self._store:
            self._description = read_description(settings.folder)  # another run may have begun it since
            if self._description is not None:
                check_identity(settings.folder, self._description, self.identity, self.missing)
            path = Path(settings.folder, HEAD)
            if not self.summarises and not (self._description and path.is_file()):
                tensors = {"weight": teacher_head.weight, "bias": teacher_head.bias}
                on_host = {name: t.detach().cpu().contiguous() for name, t in tensors.items() if t is not None}
                write_tensors(path, on_host, {})
            if self._description is None:
                self._description = {**self.identity, "vocab_size": vocab_size}
                if not self.summarises:
                    self._description |= {**vars(teacher_head.transform), "head": head_checksum(teacher_head)}
                write_description(settings.folder, self._description)
            self._store.fill(
                self.sequences,
                lambda some: rows_of(teacher, some, frozen, settings.stored),
                batch_size,
                self.row_bytes(teacher_head.weight.shape[1]),
            )

    def teacher(self) -> CachedTeacher:
        """Return what training needs of the teacher, all of which is cached; raise ValueError for a damaged head."""
        description = self._description
        assert description is not None and not self.missing
        head = None if self.summarises else read_head(Path(self.settings.folder, HEAD), description)
        return CachedTeacher(
            store=self._store,
            head=head,
            temperature=self.settings.temperature if head is None else None,
            vocab_size=description["vocab_size"],
            note=self.describe(),
        )


def read_head(path: Path, description: Mapping[str, Any]) -> OutputHead:
    """Read the teacher's head, with what the cache's description says of it; raise ValueError for a damaged file."""
    with explain_damage(path):
        tensors = load_file(path)
        transform = LogitTransform(description["scale"], description["softcap"])
        head = OutputHead(tensors["weight"], tensors.get("bias"), transform, description["vocab_size"])
        if head_checksum(head) != description["head"]:
            raise ValueError("it does not have the checksum that it was written with")
    return head


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
