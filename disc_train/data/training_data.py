"""From the arguments to a training set, with what the summary says of it."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from disc_train.config import DiscArguments, LoopArguments
from disc_train.data.context_length import ContextLength, context_length
from disc_train.data.contexts import load_records
from disc_train.data.dataset import DocumentDataset, ExampleDataset, ReplayDataset, whole_documents
from disc_train.data.documents import Document, load_documents
from disc_train.data.example import Example
from disc_train.data.splits import TokenizedDocument, tokenize_document
from disc_train.data.templates import NO_TEMPLATES, Templates, read_templates
from disc_train.summary import describe_documents, describe_records, describe_replay, describe_whole_documents


class TrainingData(NamedTuple):
    dataset: ExampleDataset  # all that is trained on
    own: ExampleDataset  # of it, what is not replayed
    description: list[tuple[str, str]]  # lines (label, text) for the summary
    tokens: list[int]  # every one that a model reads or predicts, in order


Loaded = tuple[ExampleDataset, list[tuple[str, str]]]


def load_training_data(disc: DiscArguments, loop: LoopArguments, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """Read, tokenise and check what the arguments name.

    Raises:
        ValueError: no data in what was given, a record or template that is wrong, or more tokens than a model's context
            holds.
    """
    context = context_length(disc.model_name_or_path, disc.teacher_name_or_path)
    loader = _Loader(disc, loop, tokenizer, context)
    own, description = loader.load(disc.train_file, disc.dataset_name, by_kl=False)
    dataset, sets = own, [own]
    if disc.replay_file is not None:
        by_kl = disc.replay_objective == "kl"
        replay, of_replay = loader.load(disc.replay_file, None, by_kl)
        dataset = ReplayDataset(own, replay, disc.replay_share, loop.seed, by_kl)
        sets.append(replay)
        description.append(("replay", describe_replay(dataset, disc.replay_file)))
        description += [(label, f"replayed: {text}") for label, text in of_replay]
    if context and context.note:
        description.append(("context", f"{context.tokens:,} tokens{context.note}"))
    return TrainingData(dataset, own, description, distinct_tokens(part[i] for part in sets for i in range(len(part))))


class _Loader(NamedTuple):
    """Makes examples of files, for the method of the arguments."""

    disc: DiscArguments
    loop: LoopArguments
    tokenizer: PreTrainedTokenizerBase
    context: ContextLength | None

    def load(self, train_file: str | None, dataset_name: str | None, by_kl: bool) -> Loaded:
        """The examples, whole documents where they are replayed by KL, and lines for the summary."""
        disc, tokenizer = self.disc, self.tokenizer
        if disc.method == "cd" and not by_kl:
            records = ExampleDataset(load_records(train_file, dataset_name, tokenizer, self.context))
            return records, describe_records(records)
        documents = load_documents(train_file, dataset_name, disc.text_column)
        if disc.method != "disc" or by_kl:
            read = self._tokenize(documents, _document_limit(disc, self.context, NO_TEMPLATES))
            whole = whole_documents(read)
            return whole, describe_whole_documents(read, whole)
        templates = read_templates(disc.teacher_template, disc.student_template, tokenizer)
        read = self._tokenize(documents, _document_limit(disc, self.context, templates))
        dataset = DocumentDataset(
            read,
            templates=templates,
            split_strategy=disc.split_strategy,
            num_splits=disc.num_splits,
            suffix_tokens=disc.suffix_tokens,
            seed=self.loop.seed,
        )
        return dataset, describe_documents(read, dataset)

    def _tokenize(self, documents: Sequence[Document], limit: int | None) -> list[TokenizedDocument]:
        disc = self.disc
        progress = tqdm(documents, "Tokenising", unit=" documents", delay=2, disable=self.loop.disable_tqdm)
        return [
            tokenize_document(document, self.tokenizer, disc.sentence_tokenization, limit, disc.language)
            for document in progress
        ]


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
