"""From the arguments to a training set, with what the summary says of it."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from disc_train.config import DiscArguments, LoopArguments
from disc_train.context_length import ContextLength, context_length
from disc_train.contexts import load_records
from disc_train.dataset import DocumentDataset, ExampleDataset
from disc_train.documents import load_documents
from disc_train.example import Example
from disc_train.splits import TokenizedDocument, tokenize_document
from disc_train.summary import describe_documents, describe_records
from disc_train.templates import Templates, read_templates


class TrainingData(NamedTuple):
    dataset: ExampleDataset
    description: list[tuple[str, str]]  # lines (label, text) for the summary


def load_training_data(disc: DiscArguments, loop: LoopArguments, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """Read, tokenise and check what the arguments name.

    Raises:
        ValueError: no data in what was given, a record or template that is wrong, or more tokens than a model's context
            holds.
    """
    context = context_length(disc.model_name_or_path, disc.teacher_name_or_path)
    notes = [("context", f"{context.tokens:,} tokens{context.note}")] if context and context.note else []
    if disc.method == "cd":
        records = ExampleDataset(load_records(disc.train_file, disc.dataset_name, tokenizer, context))
        return TrainingData(records, describe_records(records) + notes)

    templates = read_templates(disc.teacher_template, disc.student_template, tokenizer)
    documents = _read_documents(disc, loop, tokenizer, _document_limit(disc, context, templates))
    dataset = DocumentDataset(
        documents,
        templates=templates,
        split_strategy=disc.split_strategy,
        num_splits=disc.num_splits,
        suffix_tokens=disc.suffix_tokens,
        seed=loop.seed,
    )
    return TrainingData(dataset, describe_documents(documents, dataset) + notes)


def distinct_tokens(examples: Iterable[Example]) -> list[int]:
    """Every token that either model reads or predicts, in order."""
    tokens: set[int] = set()
    for example in examples:
        pieces = [example.teacher_trunk, example.student_trunk]
        for branch in example.branches:
            pieces += [branch.target, branch.teacher.lead, branch.student.lead]
        tokens.update(np.unique(np.concatenate(pieces)).tolist())
    return sorted(tokens)


def _document_limit(disc: DiscArguments, context: ContextLength | None, templates: Templates) -> int | None:
    """The tokens that a document is cut to: what the templates leave of the models' context, or fewer if asked."""
    if context is None:
        return disc.max_document_tokens
    room = f"the {context.reader}'s context of {context.tokens} tokens{context.note}"
    room += f", less {templates.longest} of the templates" if templates.longest else ""
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


def _read_documents(
    disc: DiscArguments, loop: LoopArguments, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> list[TokenizedDocument]:
    documents = load_documents(disc.train_file, disc.dataset_name, disc.text_column)
    progress = tqdm(documents, "Tokenising", unit=" documents", delay=2, disable=loop.disable_tqdm)
    return [
        tokenize_document(document, tokenizer, disc.sentence_tokenization, limit, disc.language)
        for document in progress
    ]
