"""Several processes that share an epoch's examples take as many steps: its end is filled up with what does not count.

accelerate would fill it up with the epoch's first examples, which would then be trained on twice, and make of a last
step another one than a single process takes.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.utils.data import Dataset, Sampler

from disc_train.dataset import ExampleDataset
from disc_train.example import Example


class FilledUp(Dataset[Example]):
    """A data set; behind its end, an example that does not count, again and again."""

    def __init__(self, dataset: ExampleDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        if index < len(self.dataset):
            return self.dataset[index]
        return replace(self.dataset[0], counted=False)


class FillingUp(Sampler[int]):
    """An epoch's examples in the order that one process takes them in, then indices behind their end.

    Args:
        examples: how many there are.
        multiple: the number of indices is one of it: the examples of a batch in every process.
        seed: of the order, with the epoch, which `set_epoch` gives.
    """

    def __init__(self, examples: int, multiple: int, seed: int) -> None:
        self.examples = examples
        self.multiple = multiple
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.examples // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        # As accelerate shuffles for one process.
        order = torch.randperm(self.examples, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        yield from order.tolist()
        yield from range(self.examples, len(self))

    def set_epoch(self, epoch: int) -> None:
        """Give the order of this epoch from now on."""
        self.epoch = epoch
