"""Sequences of different lengths -> padded batches whose memory is bounded."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

MAX_BATCH_TOKENS = 16_384


def batches_by_length(lengths: Sequence[int], batch_size: int, max_batch_tokens: int) -> Iterator[list[int]]:
    """The indices of all sequences, in batches of about one length. The longest come first: what does not fit in memory
    fails at once.

    Args:
        batch_size: at most so many sequences a batch.
        max_batch_tokens: at most so many tokens a batch, padding included; a longer sequence is a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) == batch_size or lengths[batch[0]] * (len(batch) + 1) > max_batch_tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad_right(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids [B, L] with zeros behind the shorter ones, where a causal model's earlier tokens do not see them."""
    longest = max(map(len, sequences))
    return torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences], device=device)
