"""Low-rank adapters (LoRA) beside a model's linear layers, which then stay as they are."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME


def add_lora(model: PreTrainedModel, rank: int, alpha: int, dropout: float) -> PreTrainedModel:
    """Put adapters beside every linear layer but the head; from then on they alone are trained.

    They are float32 whatever the model's dtype, since in 16 bits most updates would be lost to rounding.

    Args:
        rank: r of B [out, r] and A [r, in], whose product is added to a layer's weight; at first it is zero.
        alpha: the product is multiplied by alpha / rank.
        dropout: of what the adapters read, from 0 to 1 exclusive.

    Raises:
        ImportError: without peft.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise ImportError("--lora_rank needs peft: pip install 'disc-kernels[train]'") from None
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear"
    )
    model.add_adapter(config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def load_adapters(model: nn.Module, folder: str) -> None:
    """Give a model's adapters the values that were saved in a folder.

    Raises:
        ValueError: the folder has no adapters, or adapters of other layers or another rank.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    expected = f"{folder}: expected the adapters of this model"
    if not Path(folder, ADAPTER_SAFE_WEIGHTS_NAME).is_file():
        raise ValueError(f"{expected} in {ADAPTER_SAFE_WEIGHTS_NAME}, got no such file")
    saved = load_peft_weights(folder, device="cpu")
    try:
        result: Any = set_peft_model_state_dict(model, saved)
    except RuntimeError as error:
        raise ValueError(f"{expected}, got others: {error}") from error
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise ValueError(f"{expected}, got others: {missing or result.unexpected_keys}")


def has_adapters(model: nn.Module) -> bool:
    """Whether `add_lora`, or `load_adapter`, gave the model adapters."""
    return bool(getattr(model, "peft_config", None))
