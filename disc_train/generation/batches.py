"""Put sequences of different lengths into padded batches whose memory is bounded."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

MAX_BATCH_TOKENS = 16_384


def batches_by_length(
    lengths: Sequence[int], batch_size: int, max_batch_tokens: int, equal: bool = False
) -> Iterator[list[int]]:
    """Yield the indices of all sequences in batches of similar lengths, the longest first.

    What does not fit in memory so fails at once.

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


def pad_right(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return token ids [B, L] with zeros behind shorter sequences, where causal models do not see them."""
    longest = max(map(len, sequences))
    return torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences], device=device)


def pad_left(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids [B, L] with zeros before shorter sequences, and the mask that is 0 there and 1 elsewhere."""
    longest = max(map(len, sequences))
    pads = [longest - len(ids) for ids in sequences]
    ids = torch.tensor([[*[0] * pad, *ids] for pad, ids in zip(pads, sequences, strict=True)], device=device)
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=device)
    return ids, mask
