"""Low-rank adapters (LoRA) beside a model's linear layers, which then stay as they are."""

from transformers import PreTrainedModel


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
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
    )
    model.add_adapter(config)
    return model


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether `add_lora`, or `load_adapter`, gave the model adapters."""
    return bool(getattr(model, "peft_config", None))
