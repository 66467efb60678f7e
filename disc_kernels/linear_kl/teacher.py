"""Check a teacher: a head, given logits, or the K entries that it names in each row."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from disc_kernels.host import to_device
from disc_kernels.linear_kl.inputs import LogitTransform, Projection, SuffixKLInputs
from disc_kernels.linear_kl.products import take_rows
from disc_kernels.linear_kl.validation import (
    check_choice,
    check_float_tensor,
    check_projection,
    check_tensor,
    is_traced,
)

TAILS = ("bucket", "renormalise")

# Log-probabilities that were written with three decimals sum to 1 within this.
ROUNDING = 1e-3

# Looked at at once, so that looking takes no memory to speak of.
_BLOCK_ENTRIES = {"cpu": 2**12, "cuda": 2**20}


def check_teacher(x: SuffixKLInputs, device: torch.device, sharded: bool) -> tuple[Projection, str, str | None]:
    """Return the teacher, which argument its rows are of, and which its entries are of, if it has all."""
    rows_of = "teacher_hidden" if x.teacher_index is None else "teacher_index"
    if x.topk_ids is not None:
        return _check_topk(x, x.topk_ids, device), "topk_ids", None
    if x.teacher_weight is None:
        return _check_logits(x, device, sharded), rows_of, "teacher_hidden (logits, where teacher_weight is None)"
    given = x.teacher_hidden, x.teacher_weight, x.teacher_bias, x.teacher_index, x.teacher_transform
    return check_projection("teacher_", *given, device, x.autocast_dtype, sharded), rows_of, "teacher_weight"


def _check_logits(x: SuffixKLInputs, device: torch.device, sharded: bool) -> Projection:
    """Return a teacher that has no head because `teacher_hidden` are its logits."""
    if sharded:
        raise ValueError("teacher_weight: expected a tensor with a vocab_group, got None")
    logits = check_float_tensor("teacher_hidden", x.teacher_hidden, device)
    if logits.dim() < 2 or logits.shape[-1] == 0:
        raise ValueError(f"teacher_hidden: expected logits [..., V], V not 0, got shape {list(logits.shape)}")
    head = logits.new_empty(logits.shape[-1], 1)
    given = logits[..., :1], head, x.teacher_bias, x.teacher_index, x.teacher_transform
    model = check_projection("teacher_", *given, device, None)  # autocast rounds no logits
    return replace(model, hidden=logits, weight=head[:, :0])


def _check_topk(x: SuffixKLInputs, ids: Tensor, device: torch.device) -> Projection:
    """Return a teacher that names entries, with their log-probabilities in the place of hidden states."""
    check_choice("tail", x.tail, TAILS)
    logprobs = check_float_tensor("topk_logprobs", x.teacher_hidden, device)
    if logprobs.dim() < 2 or logprobs.shape[-1] == 0:
        raise ValueError(f"topk_logprobs: expected shape [..., K], K not 0, got {list(logprobs.shape)}")
    if check_tensor("topk_ids", ids).dtype not in (torch.int64, torch.int32):
        raise TypeError(f"topk_ids: expected dtype torch.int64 or torch.int32, got {ids.dtype}")
    if ids.layout != torch.strided:
        raise TypeError(f"topk_ids: expected a dense tensor, got layout {ids.layout}")
    if ids.shape != logprobs.shape:
        raise ValueError(f"topk_ids: expected shape {list(logprobs.shape)}, as topk_logprobs, got {list(ids.shape)}")
    if ids.device != device:
        raise ValueError(f"topk_ids: expected device {device}, as the hidden states, got {ids.device}")
    wide, no_head = torch.float32, logprobs.new_empty(logprobs.shape[-1], 0)
    index = None if x.teacher_index is None else to_device(x.teacher_index, device)  # of a mask
    return Projection(logprobs, no_head, None, index, LogitTransform(), wide, wide, logprobs.shape[-1], ids)


def compared_teacher(teacher: Projection, vocab_size: int, sharded: bool) -> Projection:
    """Return the teacher with the entries that are compared; of given logits and a top k after a look at them."""
    if teacher.ids is not None:
        if not sharded and not is_traced(teacher.hidden):  # ranks look when they know how many entries all have
            check_topk_values(teacher, vocab_size)
        return teacher
    if not teacher.is_given:
        return replace(teacher, vocab_size=vocab_size)
    hidden, no_head = teacher.hidden[..., :vocab_size], teacher.weight[:vocab_size]
    if hidden.device.type == "cpu" and not is_traced(hidden):
        largest = hidden.amax(-1).flatten()
        largest = largest if teacher.index is None else largest[teacher.index]
        if not largest.isfinite().all():
            row = int(largest.isfinite().int().argmin())
            raise ValueError(
                "teacher_hidden: expected logits of which none is NaN and the largest of each row is finite, "
                f"got {float(largest[row])} as the largest in row {row} of those that are compared"
            )
    return replace(teacher, hidden=hidden, weight=no_head, vocab_size=vocab_size)


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
