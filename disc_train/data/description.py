"""Say what was read of documents and records, in lines for the summary: how much, what is predicted, what is lost."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from disc_train.data.dataset import MIN_TOKENS, DocumentDataset, ExampleDataset, ReplayDataset
from disc_train.data.example import Ids
from disc_train.data.splits import Split, TokenizedDocument

MAX_LOST = 0.05  # of the tokens, before a warning
Lines = list[tuple[str, str]]  # (label, text)


@dataclass
class TokenCounts:
    """Count an epoch's tokens; one in a document is counted once, under the first of these that holds for it."""

    trained: int = 0  # predicted by the student
    first: int = 0  # first of a suffix, where the student has nothing before it to predict it from
    prefix: int = 0  # before the last suffix, and in none
    unread: int = 0  # after the last suffix
    suffixes: int = 0
    rows: int = 0  # predictions; more than `trained` where suffixes overlap

    @property
    def total(self) -> int:
        return self.trained + self.first + self.prefix + self.unread


def count_tokens(samples: Iterable[tuple[TokenizedDocument, Sequence[Split]]], first: int) -> TokenCounts:
    """Count over documents and their splits; the first `first` tokens (0 or 1) of a suffix are not predicted."""
    counts = TokenCounts()
    for document, splits in samples:
        end = max(split.stop for split in splits)
        trained = np.zeros(end, dtype=bool)
        for split in splits:
            trained[split.start + first : split.stop] = True
        beginnings = sum(not trained[start] for start in {split.start for split in splits})
        counts.trained += int(trained.sum())
        counts.first += beginnings
        counts.prefix += end - int(trained.sum()) - beginnings
        counts.unread += len(document.input_ids) - end
        counts.suffixes += len(splits)
        counts.rows += sum(split.stop - split.start - first for split in splits)
    return counts


def describe_documents(
    read: Sequence[TokenizedDocument], parts: Sequence[TokenizedDocument], dataset: DocumentDataset
) -> Lines:
    """Describe the documents that were read and what a pass over them predicts.

    Args:
        parts: the same where long ones are divided into chunks.
    """
    empty = [document.name for document in dataset.too_short if len(document.input_ids) == 0]
    first = f" (the first: {empty[0]})" if empty else ""
    samples = ((document, dataset.splits(index)) for index, document in enumerate(dataset.documents))
    counts = count_tokens(samples, first=dataset[0].branches[0].first)
    templates = dataset.templates
    lines = [
        (
            "documents",
            f"{len(read):,} read, {len(dataset):,} used; {len(empty):,} empty{first},"
            f" {len(dataset.too_short) - len(empty):,} too short to split into a prefix and a suffix of 2 tokens;"
            f" {_describe_long(read, parts)}",
        ),
        ("split points", f"{counts.suffixes:,} a pass, by {dataset.split_strategy}"),
        (
            "tokens",
            f"{counts.total:,} in these documents: {counts.trained:,} predicted; skipped: {counts.prefix:,} in"
            f" prefixes only, {counts.first:,} that begin a suffix, {counts.unread:,} after the last suffix;"
            f" {counts.rows:,} predictions a pass",
        ),
    ]
    if templates.longest > templates.start:
        before, after = len(templates.teacher_header), len(templates.teacher_footer)
        teacher = f"teacher: {before:,} tokens before a document and {after:,} after a prefix; "
        student = f"student: {len(templates.student_header):,} tokens before a suffix"
        lines.append(("templates", student if before + after == templates.start else teacher + student))
    return lines + _warn_of_loss(read, dataset.too_short)


def describe_whole_documents(
    read: Sequence[TokenizedDocument], parts: Sequence[TokenizedDocument], dataset: ExampleDataset
) -> Lines:
    """Describe documents that are read as a whole, see `describe_documents`."""
    short = [document.name for document in parts if len(document.input_ids) < MIN_TOKENS]
    names = f" ({', '.join(short[:5])}{', ...' if len(short) > 5 else ''})" if short else ""
    branches = [branch for example in dataset.examples for branch in example.branches]
    tokens, rows = sum(len(branch.target) for branch in branches), sum(branch.rows for branch in branches)
    return [
        (
            "documents",
            f"{len(read):,} read, {len(dataset):,} used; {len(short):,} of fewer than {MIN_TOKENS} tokens"
            f"{names}; {_describe_long(read, parts)}",
        ),
        ("tokens", f"{tokens:,} in these documents: {rows:,} predicted; skipped: {tokens - rows:,} first"),
        *_warn_of_loss(read, ()),
    ]


def _describe_long(read: Sequence[TokenizedDocument], parts: Sequence[TokenizedDocument]) -> str:
    """Say how many documents were too long, and what became of them."""
    longest = max(len(part.input_ids) for part in parts)
    tokens_of_long = [len(document.input_ids) for document in read if len(document.input_ids) > longest]
    if tokens_of_long:
        repeated = sum(len(part.input_ids) for part in parts) - sum(len(document.input_ids) for document in read)
        return (
            f"{len(tokens_of_long):,} too long, of {sum(tokens_of_long):,} tokens, divided into"
            f" {len(parts) - len(read) + len(tokens_of_long):,} chunks of up to {longest:,}"
            + (f", which repeat {repeated:,}" if repeated else "")
        )
    cut = [document for document in read if document.cut]
    dropped = sum(document.cut for document in cut)
    return f"{len(cut):,} cut" + (f" to {len(cut[0].input_ids):,} tokens ({dropped:,} dropped)" if cut else "")


def _warn_of_loss(read: Sequence[TokenizedDocument], too_short: Sequence[TokenizedDocument]) -> Lines:
    """Warn if many of the tokens are in no document that is trained on."""
    cut = sum(document.cut for document in read)
    short = sum(len(document.input_ids) for document in too_short)
    total = cut + sum(len(document.input_ids) for document in read)
    if cut + short <= MAX_LOST * total:
        return []
    lost = f"{cut + short:,} of {total:,} tokens ({(cut + short) / total:.0%}) are lost"
    return [
        (
            "WARNING",
            f"{lost}: {cut:,} beyond --max_document_tokens (--long_documents chunk keeps them), {short:,} in documents"
            " too short to split",
        )
    ]


def describe_other_files(others: Sequence[Path]) -> Lines:
    """Describe, if there are any, the files of kinds that are not read."""
    if not others:
        return []
    kinds = Counter(file.suffix.lower() or "no suffix" for file in others)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(5))
    more = f" and {len(kinds) - 5:,} more kinds" if len(kinds) > 5 else ""
    return [("not read", f"{len(others):,} files of other kinds: {counts}{more} (the first: {others[0]})")]


def describe_replay(dataset: ReplayDataset, file: str) -> str:
    """Say where what is replayed comes from, how much it is, and how it is trained on."""
    objective = "by KL to the initial model" if dataset.replays_by_kl else "by the method"
    drawn = dataset.drawn_per_epoch
    return (
        f"{drawn:,} more {dataset.replay.noun}s an epoch, {drawn / len(dataset):.0%} of all, drawn anew each time from"
        f" {len(dataset.replay):,} in {file}; trained on {objective}"
    )


def describe_records(dataset: ExampleDataset) -> Lines:
    """Describe records."""
    targets = [branch for example in dataset.examples for branch in example.branches]

    def contexts(role: str, trunks: list[Ids]) -> str:
        different = len({trunk.tobytes() for trunk in trunks})
        return f"{sum(map(len, trunks)):,} in contexts of the {role} ({different:,} different)"

    teacher = contexts("teacher", [example.teacher_trunk for example in dataset.examples])
    student = contexts("student", [example.student_trunk for example in dataset.examples])
    return [
        ("records", f"{len(dataset):,} read, all used"),
        (
            "tokens",
            f"{sum(len(branch.target) for branch in targets):,} in targets,"
            f" {sum(branch.rows for branch in targets):,} of them predicted; {teacher}; {student}",
        ),
    ]
