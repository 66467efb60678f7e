"""Make a run's training set of its documents, or of what the initial model wrote about them."""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import world
from candidates import SplitsByGain
from cells import Cell
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from disc_train.data.chat import encode
from disc_train.data.dataset import DocumentDataset, ExampleDataset, ReplayDataset, whole_documents
from disc_train.data.documents import Document
from disc_train.data.example import NO_IDS, Branch, Context, Example
from disc_train.data.splits import tokenize_document
from disc_train.data.templates import NO_TEMPLATES, Templates
from disc_train.objectives.methods import OF_SUFFIXES


def training_set(
    cell: Cell,
    initial: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    own: Sequence[Sequence[str]],
) -> ExampleDataset:
    """Make the examples of a cell's method.

    Args:
        initial: the model before all training, for `by_gain`.
        own: its own sentences about each document, for `texts: own`, `own_sentences` and CD-base.
    """
    if cell.method == "cd":
        return _continued(documents, own, tokenizer)
    if cell.texts == "own":
        documents = [Document(document.name, " ".join(text)) for document, text in zip(documents, own, strict=True)]
    tokenized = [tokenize_document(document, tokenizer, "document", None) for document in documents]
    if cell.method not in OF_SUFFIXES:
        return whole_documents(tokenized)
    bos = np.array([tokenizer.eos_token_id], dtype=np.int32)
    dataset = DocumentDataset(
        tokenized,
        templates=Templates(teacher_header=bos, student_header=bos) if cell.bos else NO_TEMPLATES,
        split_strategy=cell.split_strategy,
        num_splits=cell.num_splits,
        seed=cell.seed,
    )
    if cell.prefix == "other":
        return OtherPrefixes(dataset)
    if cell.replay:
        return ReplayDataset(dataset, _old_documents(tokenizer), cell.replay, cell.seed, by_kl=True)
    if cell.own_sentences:
        return ReplayDataset(dataset, _continued(documents, own, tokenizer), 0.5, cell.seed)
    return SplitsByGain(dataset, initial) if cell.by_gain else dataset


def _continued(
    documents: Sequence[Document], own: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase
) -> ExampleDataset:
    pairs = zip(documents, own, strict=True)
    return ExampleDataset([_continuations(document, sentences, tokenizer) for document, sentences in pairs])


def _old_documents(tokenizer: PreTrainedTokenizerBase) -> ExampleDataset:
    """Write a document about every entity that the initial model knows by heart, as pretraining had them."""
    rng = random.Random("replay")
    documents = [
        Document(entity.name, world.document_text(entity, rng, repeats=3)) for entity in world.known_entities()[0]
    ]
    return whole_documents([tokenize_document(document, tokenizer, "document", None) for document in documents])


def _continuations(document: Document, sentences: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Example:
    """Make an example in which the teacher reads the document before each sentence, the student nothing."""
    evidence = encode(tokenizer, document.text)
    teacher, student = Context(len(evidence)), Context(0)
    branches = [Branch(encode(tokenizer, f" {sentence}"), teacher, student) for sentence in sentences]
    return Example(document.name, evidence, NO_IDS, branches)


class OtherPrefixes(ExampleDataset):
    """Give the suffixes of documents, each behind as much of the next document as stood before it in its own."""

    def __init__(self, dataset: ExampleDataset) -> None:
        self.dataset = dataset
        self.noun = dataset.noun

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        example, other = self.dataset[index], self.dataset[(index + 1) % len(self)]
        branches = [
            branch._replace(teacher=Context(min(branch.teacher.attach, len(other.teacher_trunk))))
            for branch in example.branches
        ]
        return replace(example, teacher_trunk=other.teacher_trunk, branches=branches)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)
