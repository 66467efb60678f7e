"""Make a training set of what the arguments name, with lines for the summary."""

import json
import zlib
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from disc_train.config import DiscArguments
from disc_train.data.chunks import chunk_document
from disc_train.data.context_length import ContextLength, check_lengths, context_length
from disc_train.data.contexts import FIELDS, make_examples
from disc_train.data.dataset import DocumentDataset, ExampleDataset, ReplayDataset, whole_documents
from disc_train.data.description import (
    Lines,
    describe_documents,
    describe_other_files,
    describe_records,
    describe_replay,
    describe_whole_documents,
)
from disc_train.data.documents import load_documents
from disc_train.data.files import find_files
from disc_train.data.records import read_records
from disc_train.data.sequence_start import bos_prefix, describe_start
from disc_train.data.splits import tokenize_document
from disc_train.data.templates import Templates, read_templates
from disc_train.loop_config import LoopArguments
from disc_train.objectives.methods import OF_SUFFIXES

HELD_OUT_SEED = 0  # whatever the run's, so that evaluations of all runs have the same splits


class TrainingData(NamedTuple):
    """Hold a training set and what the summary says of it."""

    dataset: ExampleDataset  # all that is trained on
    own: ExampleDataset  # of it, what is not replayed
    held_out: ExampleDataset | None  # what is evaluated
    description: Lines
    tokens: list[int]  # every one that a model reads or predicts, in order
    texts: dict[str, str]  # flag -> how many documents or records it named, with a checksum of them as they were read


def load_training_data(disc: DiscArguments, loop: LoopArguments, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """Read, tokenise and check what the arguments name.

    Raises:
        ValueError: no data in what was given, a record or template that is wrong, or more tokens than a model's context
            holds.
    """
    context = context_length(disc.model_name_or_path, disc.teacher_name_or_path)
    start = bos_prefix(tokenizer, disc.add_bos)
    load = partial(_load, disc, loop, tokenizer, context, start)
    own, description, read = load(disc.train_file, disc.dataset_name)
    texts = {"--train_file": read}
    held_out = None
    description.append(("sequences", describe_start(tokenizer, disc.add_bos, start)))
    dataset, sets = own, [own]
    if disc.replay_file:
        by_kl = disc.replay_objective == "kl"
        replay, of_replay, texts["--replay_file"] = load(disc.replay_file, whole=by_kl, flag="--replay_file")
        dataset = ReplayDataset(own, replay, disc.replay_share, loop.seed, by_kl)
        sets.append(replay)
        description.append(("replay", describe_replay(dataset, ", ".join(disc.replay_file))))
        description += [(label, f"replayed: {text}") for label, text in of_replay]
    if disc.eval_file:
        held_out, of_held_out, _ = load(disc.eval_file, flag="--eval_file")
        sets.append(held_out)
        description += [(label, f"evaluated: {text}") for label, text in of_held_out]
    if context and context.note:
        description.append(("context", f"{context.tokens:,} tokens{context.note}"))
    return TrainingData(dataset, own, held_out, description, distinct_tokens(*sets), texts)


def _load(
    disc: DiscArguments,
    loop: LoopArguments,
    tokenizer: PreTrainedTokenizerBase,
    context: ContextLength | None,
    start: Sequence[int],
    train_file: Sequence[str] | None,
    dataset_name: str | None = None,
    whole: bool = False,
    flag: str = "--train_file",
) -> tuple[ExampleDataset, Lines, str]:
    """Make the examples of one source, for the method or as `whole` documents.

    Returns:
        The examples, lines for the summary, and what `TrainingData.texts` holds of the source.
    """
    named = flag if train_file else "--dataset_name"
    others = describe_other_files(find_files(train_file, flag).others) if train_file else []
    if disc.method == "cd" and not whole:
        raw = read_records(train_file, dataset_name, FIELDS._replace(flag=flag))
        records = ExampleDataset(make_examples(raw, tokenizer, start, named, disc.teacher_system_prompt))
        check_lengths(records, context)
        checksum = _describe_texts((json.dumps(record, sort_keys=True, default=str) for _, record in raw), "records")
        return records, describe_records(records) + others, checksum
    meant = {} if whole else dict.fromkeys(("teacher_context", "privileged_context", "messages"), "--method cd")
    documents = load_documents(train_file, dataset_name, disc.text_column, flag, meant)
    split = disc.method in OF_SUFFIXES and not whole
    teacher, student = (disc.teacher_template, disc.student_template) if split else (None, None)
    templates = read_templates(teacher, student, tokenizer, start)
    limit = _document_limit(disc, context, templates)
    cut, chunk = (limit, None) if disc.long_documents == "cut" else (None, limit)
    read = [
        tokenize_document(document, tokenizer, disc.sentence_tokenization, cut, disc.language, start)
        for document in tqdm(documents, "Tokenising", unit=" documents", delay=2, disable=loop.disable_tqdm)
    ]
    parts = read
    if chunk is not None:
        parts = [part for document in read for part in chunk_document(document, chunk, disc.chunk_overlap_tokens)]
    checksum = _describe_texts((document.text for document in documents), "documents")
    try:
        if not split:
            examples = whole_documents(parts, templates.student_header)
            return examples, describe_whole_documents(read, parts, examples) + others, checksum
        dataset = DocumentDataset(
            parts,
            templates=templates,
            split_strategy=disc.split_strategy,
            num_splits=disc.num_splits,
            suffix_tokens=disc.suffix_tokens,
            seed=HELD_OUT_SEED if flag == "--eval_file" else loop.seed,
        )
    except ValueError as error:
        raise ValueError(f"{named}: {error}") from error
    return dataset, describe_documents(read, parts, dataset) + others, checksum


def _describe_texts(texts: Iterable[str], noun: str) -> str:
    count = checksum = 0
    for text in texts:
        checksum = zlib.crc32(f"{len(text)}:{text}".encode(), checksum)  # where one ends is part of what it says
        count += 1
    return f"{count:,} {noun} (checksum {checksum:08x})"


def distinct_tokens(*datasets: ExampleDataset) -> list[int]:
    """Return every token that either model reads or predicts, in order."""
    tokens: set[int] = set()
    for dataset in datasets:
        for number in range(len(dataset)):
            tokens.update(np.unique(np.concatenate(dataset[number].pieces())).tolist())
    return sorted(tokens)


def _document_limit(disc: DiscArguments, context: ContextLength | None, templates: Templates) -> int | None:
    """Return the most tokens of a document: what the templates leave of the context, or fewer if asked."""
    if context is None:
        return disc.max_document_tokens
    room = f"the {context.reader}'s context of {context.tokens} tokens{context.note}"
    started = " and what sequences start with" if templates.start else ""
    room += f", less {templates.longest} of the templates{started}" if templates.longest else ""
    left = context.tokens - templates.longest
    if left < 3:
        raise ValueError(
            "--teacher_template, --student_template: expected at least 3 tokens left for a document of"
            f" {room}, got {left}"
        )
    limit = disc.max_document_tokens or left
    if limit > left:
        raise ValueError(f"--max_document_tokens: expected at most {room}, got {limit}")
    return limit
