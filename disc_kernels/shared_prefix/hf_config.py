"""What the config of a Hugging Face model says about its attention; a config is whatever has its attributes."""

from typing import Any

_MASKED = {"full_attention", "sliding_attention"}
# ALiBi takes distances from the order of the keys, not from position_ids; the configs of these do not say that they do.
_ALIBI = {"bloom", "mpt"}


def text_config(config: Any) -> Any:
    """The language model's part of a composite config (transformers' own accessor), or the config itself."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def model_name(config: Any) -> str:
    """What to call a config's model in messages."""
    config = text_config(config)
    return getattr(config, "model_type", type(config).__name__)


def can_share(config: Any) -> bool:
    """Whether a model's branches can share a trunk: whether a mask and position_ids decide all that a token sees.

    They do not where a layer is no full or sliding attention (linear attention, state space, convolution, attention in
    chunks or over chosen keys) and where positions are not read from position_ids (ALiBi). Such models take one
    sequence a row. A config cannot tell everything: `disc_train.models.causal_lm.use_attention` tries the model itself.

    Args:
        config: the model's config.
    """
    config = text_config(config)
    types = _layer_types(config)
    if types is not None and not set(types) <= _MASKED:
        return False
    if getattr(config, "alibi", False) or model_name(config) in _ALIBI:
        return False
    return getattr(config, "num_attention_heads", None) is not None


def layer_windows(config: Any) -> dict[str, int | None]:
    """The window of each type of attention layer that a model has, in tokens; None: no limit.

    Args:
        config: of a model that `can_share`.

    Raises:
        ValueError: a sliding layer type in a config without `sliding_window`.
    """
    config = text_config(config)
    window = getattr(config, "sliding_window", None)
    types = _layer_types(config)
    if types is None:
        # Without layer types a window holds for all layers (Mistral).
        return {"full_attention": window} if window is None else {"sliding_attention": window}
    if window is None and "sliding_attention" in types:
        raise ValueError(f"sliding_window: expected the window of {model_name(config)}'s sliding layers, got None")
    return {layer_type: window if layer_type == "sliding_attention" else None for layer_type in sorted(set(types))}


def window_shares(config: Any) -> dict[int | None, float]:
    """The share of the layers that each window of `layer_windows` has."""
    windows = layer_windows(config)
    types = _layer_types(text_config(config)) or list(windows)
    return {window: types.count(layer_type) / len(types) for layer_type, window in windows.items()}


def attention_softcap(config: Any) -> float | None:
    """The soft cap of a model's attention logits (Gemma 2)."""
    return getattr(text_config(config), "attn_logit_softcapping", None)


def attention_dropout(config: Any) -> float:
    """The dropout of a model's attention weights in training."""
    config = text_config(config)
    return getattr(config, "attention_dropout", None) or getattr(config, "attn_pdrop", None) or 0.0


def _layer_types(config: Any) -> list[str] | None:
    # RecurrentGemma has them under another name.
    return getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
