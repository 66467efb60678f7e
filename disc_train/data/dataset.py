"""Make training sets, whose items are the examples as they are in the current epoch."""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import Dataset

from disc_train.data.example import NO_IDS, Branch, Context, Example, Ids
from disc_train.data.splits import Split, TokenizedDocument, check_split_options, choose_splits
from disc_train.data.templates import NO_TEMPLATES, Templates

MIN_TOKENS = 2  # of a document without a context: its first token is never predicted
DRAWS = 20  # how often splits are drawn for a document before it counts as too short


class ExampleDataset(Dataset[Example]):
    """Give examples that are the same in every epoch.

    Args:
        noun: what an example is called in messages.

    Attributes:
        replays_by_kl: whether some examples are replayed (see `Example`), so that a teacher is needed.
    """

    replays_by_kl = False

    def __init__(self, examples: Sequence[Example], noun: str = "record") -> None:
        self.examples = examples
        self.noun = noun
        # Shared with the workers of a data loader, which may outlive an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """Return the epoch that `set_epoch` gave."""
        return int(self._epoch)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def set_epoch(self, epoch: int) -> None:
        """Give the examples of this epoch from now on."""
        self._epoch.fill_(epoch)

    def contexts(self) -> list[Ids]:
        """Return what the teacher reads before each example's targets; nothing where no two examples share it."""
        return [example.teacher_trunk for example in self.examples]

    def longest(self) -> tuple[int, str]:
        """Find the longest sequence that a model may read in any epoch: its tokens, and its example's name."""
        return max((example.longest, example.name) for example in self.examples)


def whole_documents(documents: Sequence[TokenizedDocument], start: Ids = NO_IDS) -> ExampleDataset:
    """Make an example of each document of at least 2 tokens: all of it is the target, after nothing but `start`.

    Raises:
        ValueError: there is none.
    """
    context = Context(len(start))
    examples = [
        Example(document.name, start, start, [Branch(document.input_ids, teacher=context, student=context)])
        for document in documents
        if len(document.input_ids) >= MIN_TOKENS
    ]
    if not examples:
        raise ValueError(f"expected a document of at least {MIN_TOKENS} tokens, got {len(documents)} shorter ones")
    return ExampleDataset(examples, noun="document")


class DocumentDataset(ExampleDataset):
    """Give the documents that can be split, each with splits drawn afresh every epoch.

    The splits depend on the seed, the epoch and the document's index alone: a run that is resumed draws those that it
    would have drawn, in any number of processes and data loader workers. A draw that leaves no suffix is repeated.

    Args:
        documents: tokenised documents.
        templates: what stands around them; nothing by default.
        split_strategy: as for `disc_train.data.splits.choose_splits`.
        num_splits: as there.
        suffix_tokens: as there.
        seed: of all draws.

    Attributes:
        documents: those that can be split; items have their order.
        too_short: the others.

    Raises:
        ValueError: options that do not go together, or no document that can be split.
    """

    def __init__(
        self,
        documents: Sequence[TokenizedDocument],
        *,
        templates: Templates = NO_TEMPLATES,
        split_strategy: str = "sentence_boundary",
        num_splits: int = 5,
        suffix_tokens: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__((), noun="document")
        check_split_options(split_strategy, num_splits, suffix_tokens)
        self.templates = templates
        self.split_strategy = split_strategy
        self.num_splits = num_splits
        self.suffix_tokens = suffix_tokens
        self.seed = seed
        self.documents: list[TokenizedDocument] = []
        self.too_short: list[TokenizedDocument] = []
        for document in documents:
            splittable = self._draw(document, index=len(self.documents), epoch=0)
            (self.documents if splittable else self.too_short).append(document)
        if not self.documents:
            raise ValueError(
                f"expected a document that can be split by {split_strategy} into a prefix and a suffix of at least 2"
                f" tokens, got {len(self.too_short)} documents that are all too short"
            )

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Example:
        document, templates = self.documents[index], self.templates
        header = len(templates.teacher_header)
        return Example(
            document.name,
            np.concatenate([templates.teacher_header, document.input_ids]),
            templates.student_header,
            [
                Branch(
                    document.input_ids[start:stop],
                    teacher=Context(header + start, templates.teacher_footer),
                    student=Context(len(templates.student_header)),
                )
                for start, stop in self.splits(index)
            ],
        )

    def longest(self) -> tuple[int, str]:
        return max((self.templates.longest + len(each.input_ids) - 1, each.name) for each in self.documents)

    def contexts(self) -> list[Ids]:
        return [NO_IDS] * len(self)

    def splits(self, index: int) -> list[Split]:
        """Draw a document's splits for the current epoch, at least one."""
        document = self.documents[index]
        return self._draw(document, index, self.epoch) or self._draw(document, index, epoch=0)

    def _draw(self, document: TokenizedDocument, index: int, epoch: int) -> list[Split]:
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        options = self.split_strategy, self.num_splits, self.suffix_tokens
        return next(filter(None, (choose_splits(document, *options, rng) for _ in range(DRAWS))), [])


class ReplayDataset(ExampleDataset):
    """Add to a data set a share of examples from another, drawn anew every epoch.

    What is drawn depends on the seed and the epoch alone. No example is drawn twice before all others were.

    Args:
        dataset: all of it is in every epoch.
        replay: where the others come from.
        share: of all examples of an epoch, and so of a step's in the mean; between 0 and 1.
        seed: of the draws.
        by_kl: the student is only held to what the teacher says of them, see `Example.replayed`.

    Raises:
        ValueError: a share that is none.
    """

    def __init__(
        self, dataset: ExampleDataset, replay: ExampleDataset, share: float, seed: int, by_kl: bool = False
    ) -> None:
        if not 0 < share < 1:
            raise ValueError(f"share: expected a number between 0 and 1, got {share}")
        super().__init__((), noun=dataset.noun)
        self.dataset = dataset
        self.replay = replay
        self.seed = seed
        self.replays_by_kl = by_kl
        self.drawn_per_epoch = max(1, round(len(dataset) * share / (1 - share)))
        self._drawn: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return len(self.dataset) + self.drawn_per_epoch

    def __getitem__(self, index: int) -> Example:
        if index < len(self.dataset):
            return self.dataset[index]
        return replace(self.replay[self._draw()[index - len(self.dataset)]], replayed=self.replays_by_kl)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.dataset.set_epoch(epoch)
        self.replay.set_epoch(epoch)

    def longest(self) -> tuple[int, str]:
        return max(self.dataset.longest(), self.replay.longest())

    def contexts(self) -> list[Ids]:
        replayed = self.replay.contexts()
        return self.dataset.contexts() + [replayed[index] for index in self._draw()]

    def _draw(self) -> list[int]:
        epoch = self.epoch
        if self._drawn[0] != epoch:
            rounds, rest = divmod(self.drawn_per_epoch, len(self.replay))
            everything = range(len(self.replay))
            rng = random.Random(f"{self.seed}/{epoch}/replay")
            self._drawn = epoch, [*everything] * rounds + rng.sample(everything, rest)
        return self._drawn[1]
