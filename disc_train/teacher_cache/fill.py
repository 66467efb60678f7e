"""Compute the rows of a cache: run the teacher over token sequences."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from disc_kernels import teacher_summary
from disc_kernels.hf import OutputHead, output_head
from disc_train.data.example import Context
from disc_train.models.causal_lm import target_states
from disc_train.teacher_cache.sequences import TeacherSequence
from disc_train.teacher_cache.store import Rows


class FrozenHead(NamedTuple):
    """Hold what a teacher is summarised for."""

    head: OutputHead  # the student's
    temperature: float
    vocab_size: int | None
    autocast: torch.dtype | None  # of the training, which rounds both heads in its products


@torch.no_grad()
def rows_of(
    model: PreTrainedModel, sequences: Sequence[TeacherSequence], frozen: FrozenHead | None, dtype: torch.dtype
) -> Rows:
    """Run a model on sequences; return its rows on the host: hidden states, or summaries for a frozen head.

    Args:
        dtype: of hidden states and embeddings. A summary's entropy and bias stay float32.
    """
    device = model.device
    branches = [(s.tokens[: s.first + 1], Context(s.first + 1), s.tokens[s.first + 1 :]) for s in sequences]
    with torch.autocast(device.type, enabled=False):
        hidden, index = target_states(model, branches)
    index = index.to(device)
    if frozen is None:
        return {"hidden": hidden.flatten(0, -2)[index].to("cpu", dtype)}
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


def row_bytes(hidden_size: int, summarised: bool, dtype: torch.dtype) -> int:
    """Count the bytes of a token's rows."""
    return hidden_size * dtype.itemsize + (8 if summarised else 0)
