"""Add low-rank adapters (LoRA) beside a model's linear layers, and load them."""

from pathlib import Path

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
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
    from peft import load_peft_weights

    expected = f"{folder}: expected the adapters of this model"
    if not Path(folder, ADAPTER_SAFE_WEIGHTS_NAME).is_file():
        raise ValueError(f"{expected} in {ADAPTER_SAFE_WEIGHTS_NAME}, got no such file")
    # Files leave out the adapter's name, and put a prefix before the model's own names.
    named = {name.replace(".default.", "."): name for name, _ in model.named_parameters() if ".lora_" in name}
    saved = {
        name.removeprefix("base_model.model."): value for name, value in load_peft_weights(folder, device="cpu").items()
    }
    others = sorted(saved.keys() ^ named.keys()) or [
        f"{name} of shape {list(value.shape)}"
        for name, value in saved.items()
        if value.shape != model.get_parameter(named[name]).shape
    ]
    if others:
        raise ValueError(f"{expected}, got others: {', '.join(others)}")
    # peft's own function does not take whole values for parameters that FSDP2 has divided.
    set_model_state_dict(
        model,
        {named[name]: value for name, value in saved.items()},
        options=StateDictOptions(full_state_dict=True, strict=False),
    )


def has_adapters(model: nn.Module) -> bool:
    """Tell whether `add_lora`, or transformers' `load_adapter`, gave the model adapters."""
    return bool(getattr(model, "peft_config", None))
