"""Find how many tokens the models read, the smaller of the two contexts, and refuse longer examples."""

from typing import Any, NamedTuple

from transformers import AutoConfig

from disc_train.data.dataset import ExampleDataset
from disc_train.models.adapters import model_below
from disc_train.models.pretrained import explain_load_errors, load_pretrained

LONGROPE = " (its original context: beyond it, longrope positions depend on the longest text of a batch)"
DOGE = " (its keep_window_size: beyond it, which of equal tokens it reads depends on what else a batch holds)"


class ContextLength(NamedTuple):
    """Say how many tokens can be read, and which model sets that limit."""

    tokens: int
    reader: str  # "model" or "teacher": whose it is
    note: str = ""  # why it is not what the config says


def context_length(model: str, teacher: str | None) -> ContextLength | None:
    """Return the smaller context of two models, given by name or path; None: neither has a limit."""
    readers = {"model": model} | ({} if teacher is None else {"teacher": teacher})
    lengths = []
    for reader, name in readers.items():
        flag = f"--{reader}_name_or_path"
        with explain_load_errors(name, flag):
            below = model_below(name)
        lengths.append(length_of(load_pretrained(AutoConfig, below, flag), reader))
    return smaller(*lengths)


def check_lengths(dataset: ExampleDataset, limit: ContextLength | None) -> None:
    """Raise ValueError, naming the example, if a sequence is longer than a context.

    Beyond it there are no positions, or none that were trained; those of longrope and dynamic NTK would depend on what
    else a batch holds, so that the loss would be wrong without a word.
    """
    longest, name = dataset.longest()
    if limit is not None and longest > limit.tokens:
        raise ValueError(
            f"{name}: expected a context and a target of at most {limit.tokens} tokens together, which is what the"
            f" {limit.reader} can read{limit.note}, got {longest} without the target's last, which is not read"
        )


def smaller(*lengths: ContextLength | None) -> ContextLength | None:
    """Return the smallest of several contexts; None: none has a limit."""
    return min(filter(None, lengths), key=lambda length: length.tokens, default=None)


def length_of(config: Any, reader: str) -> ContextLength | None:
    """Return how many tokens a model with this config reads; None: any number."""
    config = config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for rope in (ropes, *ropes.values()):  # of the model, or of each layer type
        if isinstance(rope, dict) and "longrope" in (rope.get("rope_type"), rope.get("type")):
            original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
            return ContextLength(original, reader, LONGROPE)
    tokens = getattr(config, "max_position_embeddings", None)
    if (window := getattr(config, "keep_window_size", None)) and (tokens is None or window < tokens):
        return ContextLength(window, reader, DOGE)
    return None if tokens is None or tokens < 0 else ContextLength(tokens, reader)  # XLNet's -1 is no limit
