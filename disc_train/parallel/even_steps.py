"""Give all processes of an epoch equally many steps: its end is padded with examples that do not count.

accelerate would pad it with the epoch's first examples, which would then be trained on twice, and make of a last
step another one than a single process takes.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.utils.data import Dataset, Sampler

from disc_train.data.dataset import ExampleDataset
from disc_train.data.example import Example
from disc_train.packing.drawing import draw_together, group_contexts


class PaddedDataset(Dataset[Example]):
    """Give an example that does not count for every index beyond the end of a data set."""

    def __init__(self, dataset: ExampleDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        if index < len(self.dataset):
            return self.dataset[index]
        return replace(self.dataset[0], counted=False)

    def set_epoch(self, epoch: int) -> None:
        """Give the examples of this epoch from now on."""
        self.dataset.set_epoch(epoch)


class PaddedSampler(Sampler[int]):
    """Give an epoch's examples in the order that one process takes them in, then indices beyond their end.

    Args:
        multiple: the number of indices is a multiple of it: the examples of all processes' batches together.
        seed: of the order, with the epoch.
        step: examples a step, into which those whose contexts begin alike are drawn together.
    """

    def __init__(self, dataset: PaddedDataset, multiple: int, seed: int, step: int = 1) -> None:
        self.dataset, self.multiple, self.seed, self.step = dataset, multiple, seed, step

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        # As accelerate shuffles for one process.
        generator = torch.Generator().manual_seed(self.seed + self.dataset.dataset.epoch)
        drawn = torch.randperm(len(self.dataset), generator=generator).tolist()
        yield from draw_together(drawn, group_contexts(self.dataset.dataset.contexts()), self.step)
        yield from range(len(self.dataset), len(self))
