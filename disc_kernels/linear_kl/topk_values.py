"""Check what a teacher says of its K most likely entries: which they are, and how likely."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from disc_kernels.linear_kl.inputs import Projection
from disc_kernels.linear_kl.products import take_rows

# Log-probabilities that were written with three decimals sum to 1 within this.
ROUNDING = 1e-3

# Looked at at once, so that looking takes no memory to speak of.
_BLOCK_ENTRIES = {"cpu": 2**12, "cuda": 2**20}


def check_topk_values(teacher: Projection, entries: int) -> None:
    """Raise where a row that is compared names an entry twice or none of the `entries`, or is part of no distribution.

    On CUDA the device stops with the message; the host does not wait to learn that all is well.
    """
    k, ids = teacher.vocab_size, teacher.ids
    assert ids is not None
    if k > entries:
        raise ValueError(f"topk_ids: expected at most {entries} entries a row, the whole vocabulary, got {k}")
    block = max(1, _BLOCK_ENTRIES.get(ids.device.type, _BLOCK_ENTRIES["cpu"]) // k)
    for start in range(0, teacher.rows, block):
        rows = start, min(start + block, teacher.rows)
        _check_rows(take_rows(replace(teacher, hidden=ids), *rows), take_rows(teacher, *rows), entries, start)


def _check_rows(ids: Tensor, logprobs: Tensor, entries: int, start: int) -> None:
    ids, log_p = ids.to(torch.int64), logprobs.detach().to(torch.promote_types(logprobs.dtype, torch.float32))
    missing, p = log_p == -torch.inf, log_p.exp()
    # A probability is off by as much of itself as its logarithm is.
    rounding = torch.finfo(logprobs.dtype).eps * (p * log_p.masked_fill(missing, 0.0).abs()).sum(-1, keepdim=True)
    total = p.sum(-1, keepdim=True)
    outside = ((ids < 0) | (ids >= entries)) & ~missing
    # What fills a row that has fewer entries may repeat: it becomes a different number below 0 each time.
    sorted_ids = torch.where(missing, -1 - torch.arange(ids.shape[1], device=ids.device), ids).sort(-1).values
    repeated = sorted_ids[:, 1:] == sorted_ids[:, :-1]
    above_one = total > 1 + ROUNDING + rounding
    _refuse("topk_logprobs: expected log-probabilities, none above 0", ~(log_p <= ROUNDING), log_p, start)
    _refuse("topk_logprobs: expected probabilities that sum to at most 1", above_one, total, start)
    _refuse(f"topk_ids: expected entries from 0 to {entries - 1}", outside, ids, start)
    _refuse("topk_ids: expected different entries in a row", repeated, sorted_ids[:, 1:], start)


def _refuse(expected: str, wrong: Tensor, value: Tensor, start: int) -> None:
    """Raise where any is wrong, with the first value that is; wrong and value are [R, anything]."""
    if wrong.device.type != "cpu":
        torch._assert_async(~wrong.any(), f"{expected}, got another row")
    elif wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(f"{expected}, got {value[row, column].item():.7g} in row {start + row} of those compared")
