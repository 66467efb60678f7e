"""Load a model or an adapter that is evaluated or generates texts, and its tokenizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from disc_train.models.adapters import base_of_adapter
from disc_train.models.causal_lm import load_model, use_attention
from disc_train.models.pretrained import check_found, explain_load_errors, load_pretrained


def load_for_inference(
    name_or_path: str,
    dtype: str = "auto",
    use_cpu: bool = False,
    attention: str = "auto",
    flag: str = "--model_name_or_path",
) -> PreTrainedModel:
    """Load a causal language model, or an adapter with the model it was trained on, in evaluation mode.

    Args:
        dtype: a torch dtype's name; "auto": bfloat16 on CUDA, float32 elsewhere.
        use_cpu: leave an accelerator alone, if there is one.
        attention: "sdpa", "eager", or "auto": "sdpa" where it computes what the model does, else "eager".
        flag: the one that named the model, for messages.

    Raises:
        ValueError, OSError: it cannot be loaded, its logits are not its head's on its hidden states, or the attention
            asked for leaves out part of what the model does.
        ImportError: it is an adapter, and peft is not installed.
    """
    accelerator = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    device = accelerator or torch.device("cpu")
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    with _flag_named(flag):
        model = load_model(name_or_path, getattr(torch, dtype)).to(device)  # type: ignore[arg-type]
        use_attention(model, attention, dense=True)
    return model.eval()


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; for an adapter that comes without one, that of the model it was trained on.

    Raises:
        ValueError, OSError: there is none.
    """
    with _flag_named("--model_name_or_path"):
        with explain_load_errors(name_or_path):
            while not Path(name_or_path, "tokenizer_config.json").is_file() and (base := base_of_adapter(name_or_path)):
                name_or_path = base
        tokenizer: PreTrainedTokenizerBase = load_pretrained(AutoTokenizer, name_or_path)
        return tokenizer


def check_same_tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase, reference: str) -> None:
    """Raise ValueError if a reference's tokenizer, where it comes with one, reads a text as other tokens."""
    with explain_load_errors(reference, "--reference_name_or_path"):
        check_found(reference)
    try:
        other = load_tokenizer(reference)
    except (OSError, ValueError):  # weights alone
        return
    for text in texts:
        if tokenizer.encode(text, add_special_tokens=False) != other.encode(text, add_special_tokens=False):
            raise ValueError(
                "--reference_name_or_path: expected a model with the same tokenizer, got one that reads the text"
                f" {text[:40]!r}... as other tokens"
            )


@contextmanager
def _flag_named(flag: str) -> Iterator[None]:
    """Put the flag that the user wrote before what is wrong with its value."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error
