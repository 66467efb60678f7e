"""Run a teacher over readings, and keep what it says in a cache."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from disc_kernels import teacher_summary
from disc_kernels.hf import OutputHead, output_head
from disc_train.data.example import Context
from disc_train.models.causal_lm import hidden_states
from disc_train.packing.branch_inputs import make_branch_inputs
from disc_train.packing.rows import arrange, row_rule
from disc_train.progress import show_progress
from disc_train.teacher_cache.readings import Reading
from disc_train.teacher_cache.store import Rows, Store, write_shard


class FrozenHead(NamedTuple):
    """Hold what a summary is made with, beside the teacher."""

    head: OutputHead  # the student's
    temperature: float
    vocab_size: int | None
    autocast: torch.dtype | None  # of the training, which rounds both heads in its products


@torch.no_grad()
def read_as_teacher(model: PreTrainedModel, readings: Sequence[Reading]) -> tuple[Tensor, Tensor]:
    """Run a model on readings.

    Returns:
        Hidden states [rows, L, D], and which of their rows, flattened, are wanted, [N] int64, in order.
    """
    rule = row_rule(model)
    branches = [(r.tokens[: r.first + 1], Context(r.first + 1), r.tokens[r.first + 1 :]) for r in readings]
    rows = arrange(make_branch_inputs(branches, rule.share), rule)
    index = np.concatenate([at[-reading.rows :] for at, reading in zip(rows.positions, readings, strict=True)])
    device = model.device
    with torch.autocast(device.type, enabled=False):
        hidden = hidden_states(model, rows.input_ids.to(device), rows.layout.to(device))
    return hidden, torch.from_numpy(index).to(device)


def rows_of(model: PreTrainedModel, readings: Sequence[Reading], frozen: FrozenHead | None, dtype: torch.dtype) -> Rows:
    """Compute the rows of readings on the host: hidden states, or summaries for a frozen head.

    Args:
        dtype: of hidden states and embeddings. A summary's entropy and bias stay float32.
    """
    hidden, index = read_as_teacher(model, readings)
    if frozen is None:
        return {"hidden": hidden.flatten(0, -2)[index].to("cpu", dtype)}
    device = hidden.device
    with torch.autocast(device.type, dtype=frozen.autocast, enabled=frozen.autocast is not None):
        summary = teacher_summary(
            *(hidden, output_head(model), frozen.head),
            teacher_index=index,
            temperature=frozen.temperature,
            vocab_size=frozen.vocab_size,
        )
    return {
        "embedding": summary.embedding.to("cpu", dtype),
        "entropy": summary.entropy.to("cpu", torch.float32),
        "bias": summary.bias.to("cpu", torch.float32),
    }


def fill(
    store: Store,
    readings: Sequence[Reading],
    compute: Callable[[Sequence[Reading]], Rows],
    batch_size: int,
    row_bytes: int,
) -> None:
    """Compute the rows of readings that a cache lacks, and write them shard by shard.

    Args:
        store: a `writer`'s.
        compute: as `rows_of`, of at most `batch_size` readings at once.
        row_bytes: of a token's rows together; how many readings make a shard depends on it.
    """
    missing = [reading for reading in readings if not store.has(reading)]
    shards = _divide(missing, store.shard_bytes // row_bytes)
    for shard in show_progress(shards, len(missing), "sequences read by the teacher"):
        parts = [compute(shard[first : first + batch_size]) for first in range(0, len(shard), batch_size)]
        write_shard(store, shard, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    store.refresh()


def _divide(readings: Sequence[Reading], rows: int) -> list[list[Reading]]:
    """Put readings into shards of at most so many rows, or of one reading."""
    shards: list[list[Reading]] = []
    room = 0
    for reading in readings:
        if not shards or reading.rows > room:
            shards.append([])
            room = rows
        shards[-1].append(reading)
        room -= reading.rows
    return shards


def row_bytes(hidden_size: int, summarised: bool, dtype: torch.dtype) -> int:
    """Count the bytes of a token's rows."""
    return hidden_size * dtype.itemsize + (8 if summarised else 0)
