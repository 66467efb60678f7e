"""Tokenised documents as a training set: an item is a document with the splits of the current epoch."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from disc_train.packing import Sample
from disc_train.splits import Split, TokenizedDocument, check_split_options, choose_splits

DRAWS = 20  # how often splits are drawn for a document before it counts as too short


class DocumentDataset(Dataset[Sample]):
    """The documents that can be split, each with splits drawn afresh every epoch.

    The splits depend on the seed, the epoch and the document's index alone: a run that is resumed draws those that it
    would have drawn, in any number of processes and data loader workers. A draw that leaves no suffix is repeated.

    Args:
        documents: tokenised documents.
        split_strategy, num_splits, suffix_tokens: as for `disc_train.splits.choose_splits`.
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
        split_strategy: str = "sentence_boundary",
        num_splits: int = 5,
        suffix_tokens: int = 0,
        seed: int = 0,
    ) -> None:
        check_split_options(split_strategy, num_splits, suffix_tokens)
        self.split_strategy = split_strategy
        self.num_splits = num_splits
        self.suffix_tokens = suffix_tokens
        self.seed = seed
        # Shared with the workers of a data loader, which may outlive an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
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

    def __getitem__(self, index: int) -> Sample:
        document = self.documents[index]
        splits = self._draw(document, index, int(self._epoch))
        return Sample(document, splits or self._draw(document, index, epoch=0))

    def few_tokens(self) -> Tensor:
        """[1, at most 16] int64: the beginning of the first document, to try a model on."""
        return torch.from_numpy(self.documents[0].input_ids[:16]).long()[None]

    def set_epoch(self, epoch: int) -> None:
        """Draw the splits of this epoch from now on."""
        self._epoch.fill_(epoch)

    def _draw(self, document: TokenizedDocument, index: int, epoch: int) -> list[Split]:
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        for _ in range(DRAWS):
            splits = choose_splits(document, self.split_strategy, self.num_splits, self.suffix_tokens, rng)
            if splits:
                return splits
        return []
