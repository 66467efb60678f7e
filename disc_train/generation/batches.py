"""Put sequences of different lengths into padded batches whose memory is bounded."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

MAX_BATCH_TOKENS = 16_384


def batches_by_length(
    lengths: Sequence[int], batch_size: int, max_batch_tokens: int, equal: bool = False
) -> Iterator[list[int]]:
    """Yield the indices of sequences in batches of similar lengths, the longest first: too long ones fail at once.

    Args:
        batch_size: the most sequences in a batch.
        max_batch_tokens: the most tokens in a batch, padding included; a longer sequence is a batch of its own.
        equal: put only sequences of equal lengths together, for models that padding disturbs.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[batch[0]] if batch else 0
        full = len(batch) == batch_size or longest * (len(batch) + 1) > max_batch_tokens
        if batch and (full or (equal and lengths[index] < longest)):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad(
    sequences: Sequence[Sequence[int]], side: Literal["left", "right"], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return token ids [B, L] with zeros on a side of shorter sequences, and the mask that is 0 there and 1 elsewhere.

    Causal models do not see what is padded on the right, and need no mask for it.
    """
    rows = [torch.tensor(ids) for ids in sequences]
    both = rows, [torch.ones_like(row) for row in rows]
    ids, mask = (pad_sequence(each, batch_first=True, padding_side=side).to(device) for each in both)
    return ids, mask
