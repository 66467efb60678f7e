"""Load configs, tokenizers and models by name: every call of transformers' `from_pretrained` is made here."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from disc_train.progress import say_if_slow

TRUST_HELP = "Run the code that a model's folder or repository brings, for models that transformers does not have."
_trusted = ContextVar("trust_remote_code", default=False)


def trust_remote_code(trust: bool) -> None:
    """Let models bring code of their own, or not, from here on."""
    _trusted.set(trust)


def load_pretrained(auto_class: Any, name_or_path: str, flag: str | None = None, **options: Any) -> Any:
    """Load what one of transformers' Auto classes loads.

    Raises:
        ValueError: there is none, it is of another kind, its files are damaged, or it needs code that is not trusted.
    """
    with explain_load_errors(name_or_path, flag):
        return auto_class.from_pretrained(name_or_path, trust_remote_code=_trusted.get(), **options)


@contextmanager
def explain_load_errors(name_or_path: str, flag: str | None = None) -> Iterator[None]:
    """Add to an error in loading which model and flag it was about, which many of transformers' errors do not say."""
    try:
        check_found(name_or_path)
        yield
    except (OSError, ValueError, SafetensorError) as error:
        wrong = f"expected a model's folder, or its name on the Hub, got {name_or_path}: {_explain(error)}"
        raise ValueError(f"{flag}: {wrong}" if flag else wrong) from error


@cache
def check_found(name_or_path: str) -> None:
    """Raise OSError at once where a name is no folder, was never downloaded, and the Hub cannot be asked for it.

    transformers would ask for one file after another, each six times, which takes minutes.
    """
    files = ("config.json", "adapter_config.json", "tokenizer_config.json")
    try:
        if Path(name_or_path).exists() or any(try_to_load_from_cache(name_or_path, file) for file in files):
            return
    except HFValidationError:
        raise OSError("there is no such folder, and a name on the Hub is namespace/name") from None
    with say_if_slow(f"looking for {name_or_path} on the Hub ..."):
        try:
            HfApi().model_info(name_or_path, timeout=10)
        except HfHubHTTPError:  # the Hub's answer, of which transformers says more
            pass
        except Exception as error:  # which HTTP client it uses, whose errors these are, depends on its version
            raise OSError(f"there is no such folder, and the Hub is out of reach: {error}") from error


def _explain(error: Exception) -> str:
    text = str(error)
    if isinstance(error, SafetensorError):
        return f"the weights cannot be read, a file is damaged: {text}"
    if "trust_remote_code" in text:
        return "it brings code of its own, which only --trust_remote_code true runs: read it first"
    if config := re.search(r"'transformers\.\S+\.(\w+)'> for this kind of AutoModel", text):  # then all configs' names
        return (
            f"transformers has no causal language model for a {config[1]}, which is of models that read more than text"
            " or predict no next token; name a text model"
        )
    return text


def quantisation(bits: Literal[4, 8], compute_dtype: torch.dtype) -> QuantizationConfigMixin:
    """Say how a model is loaded in 4 or 8 bits; its output head and embeddings stay as they are.

    4 bits are bitsandbytes' nf4 with its constants quantised too (QLoRA). 8 bits are bitsandbytes' LLM.int8() where it
    is installed, otherwise torchao's int8 weights.

    Args:
        compute_dtype: what 4-bit weights are multiplied in.

    Raises:
        ImportError: neither is installed.
    """
    if find_spec("bitsandbytes"):
        if bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quantised_by(model: PreTrainedModel) -> str:
    """Return the name of what a model's weights are quantised by; empty where they are not."""
    config: Any = getattr(model.config, "quantization_config", None)
    if config is None or not getattr(model, "is_quantized", False):
        return ""
    method = getattr(config, "quant_method", None)
    return str(getattr(method, "value", method))
