"""What will run, in plain words: documents, tokens, models, steps."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, TrainingArguments

from disc_train.dataset import DocumentDataset
from disc_train.packing import Sample
from disc_train.splits import TokenizedDocument


@dataclass
class TokenCounts:
    """Of one epoch. A token in a document is counted once, under the first of these that holds for it."""

    trained: int = 0  # predicted by the student
    first: int = 0  # first of a suffix: the student has nothing before it to predict it from
    prefix: int = 0  # before the last suffix, read by the teacher only
    unread: int = 0  # after the last suffix
    suffixes: int = 0
    rows: int = 0  # predictions; more than `trained` where suffixes overlap
    teacher: int = 0  # tokens the teacher reads
    teacher_unpacked: int = 0  # tokens it would read in a forward pass for every suffix

    @property
    def total(self) -> int:
        return self.trained + self.first + self.prefix + self.unread


def count_tokens(samples: Iterable[Sample]) -> TokenCounts:
    """Count over documents and their splits."""
    counts = TokenCounts()
    for document, splits in samples:
        end = max(split.stop for split in splits)
        trained = np.zeros(end, dtype=bool)
        for split in splits:
            trained[split.start + 1 : split.stop] = True
        first = sum(not trained[start] for start in {split.start for split in splits})
        counts.trained += int(trained.sum())
        counts.first += first
        counts.prefix += end - int(trained.sum()) - first
        counts.unread += len(document.input_ids) - end
        counts.suffixes += len(splits)
        counts.rows += sum(split.stop - split.start - 1 for split in splits)
        counts.teacher += end - 1
        counts.teacher_unpacked += sum(split.stop - 1 for split in splits)
    return counts


def describe_data(read: Sequence[TokenizedDocument], dataset: DocumentDataset) -> list[tuple[str, str]]:
    """Lines (label, text) on the documents that were read and what an epoch makes of them."""
    empty = sum(len(document.input_ids) == 0 for document in dataset.too_short)
    cut = [document.input_ids for document in read if document.cut]
    dropped = sum(document.cut for document in read)
    counts = count_tokens(dataset[i] for i in range(len(dataset)))
    saved = counts.teacher_unpacked / counts.teacher
    return [
        (
            "documents",
            f"{len(read):,} read, {len(dataset):,} to train on; {empty:,} empty,"
            f" {len(dataset.too_short) - empty:,} too short to split into a prefix and a suffix of 2 tokens;"
            f" {len(cut):,} cut" + (f" to {len(cut[0]):,} tokens ({dropped:,} dropped)" if cut else ""),
        ),
        ("split points", f"{counts.suffixes:,} an epoch, by {dataset.split_strategy}"),
        (
            "tokens",
            f"{counts.total:,} in these documents: {counts.trained:,} trained on; skipped: {counts.prefix:,} read as"
            f" prefix only, {counts.first:,} that begin a suffix, {counts.unread:,} after the last suffix",
        ),
        (
            "packing",
            f"{counts.rows:,} predictions an epoch; the teacher reads {counts.teacher:,} tokens ({saved:.1f}x fewer"
            f" than in a pass for every suffix), the student {counts.rows:,}; no padding",
        ),
    ]


def describe_model(model: PreTrainedModel) -> str:
    """Size and dtype, and how much of it is trained."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{type(model).__name__}, {total:,} parameters, {trained:,} trained, {dtype}"


def count_steps(args: TrainingArguments, documents: int) -> tuple[int, int]:
    """The number of optimizer steps in all and in an epoch, as `transformers.Trainer` counts them."""
    per_batch = args.train_batch_size * args.world_size
    batches = documents // per_batch if args.dataloader_drop_last else math.ceil(documents / per_batch)
    epoch = math.ceil(batches / args.gradient_accumulation_steps)
    return (args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)), epoch


def describe_steps(args: TrainingArguments, documents: int, resumed_step: int) -> str:
    total, epoch = count_steps(args, documents)
    per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    done = f"; {resumed_step:,} are done, in {args.resume_from_checkpoint}" if resumed_step else ""
    return f"{total:,} of up to {per_step:,} documents; {epoch:,} an epoch{done}"


def show(title: str, *lines: tuple[str, str]) -> None:
    """Print labelled lines under a title."""
    print(title)
    for label, text in lines:
        print(f"  {label:<13} {text}")
    print(flush=True)
