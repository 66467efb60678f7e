"""Read from the config of a Hugging Face model how its attention works; any object with the attributes will do."""

import re
from typing import Any

# Layers whose attention is decided by a mask alone; "global" is GPT-Neo's word.
_MASKED_LAYERS = {"full_attention", "sliding_attention", "global"}
# ALiBi takes distances from the order of the keys, not from position_ids; the configs of these do not say that they do.
_ALIBI = {"bloom", "mpt"}
# Windows and chunks that a model cuts out of the packed sequence itself, whatever the mask says; `sliding_window` is
# the one that transformers applies by the mask. Masks made here replace that mask and apply the window along a branch.
_OWN_WINDOW = re.compile(r"(?!sliding_window$)\w*(window|window_size|window_len|(attention|attn)_chunk_\w+)")


def text_config(config: Any) -> Any:
    """Return the language model's part of a composite config (transformers' own accessor), or the config itself."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def model_name(config: Any) -> str:
    """Return what messages call a config's model."""
    config = text_config(config)
    return getattr(config, "model_type", type(config).__name__)


def can_share(config: Any) -> bool:
    """Return whether branches can share a trunk: whether a mask and position_ids decide all that a token sees.

    They do not where a layer is no full or sliding attention (linear attention, state space, convolution, attention in
    chunks or over chosen keys), where the model cuts out a window by itself (GPT-Neo, Doge), or where positions are not
    read from position_ids (ALiBi). Such models take one sequence a row. A config cannot tell everything:
    `disc_train.models.causal_lm.use_attention` tries the model itself.

    Args:
        config: the model's config.
    """
    config = text_config(config)
    if not set(_layer_types(config)) <= _MASKED_LAYERS:
        return False
    if any(_OWN_WINDOW.fullmatch(name) and type(value) is not bool and value for name, value in vars(config).items()):
        return False
    if getattr(config, "alibi", False) or model_name(config) in _ALIBI:
        return False
    return getattr(config, "num_attention_heads", None) is not None


def layer_windows(config: Any) -> list[tuple[str, int | None]]:
    """Return each layer's type and its window in tokens (None: no limit); of a model of equal layers, only one.

    Args:
        config: of a model that `can_share`.

    Raises:
        ValueError: a sliding layer type in a config without `sliding_window`.
    """
    config = text_config(config)
    window = getattr(config, "sliding_window", None)
    # Without layer types a window holds for all layers (Mistral).
    types = _layer_types(config) or ["full_attention" if window is None else "sliding_attention"]
    if window is None and "sliding_attention" in types:
        raise ValueError(f"sliding_window: expected the window of {model_name(config)}'s sliding layers, got None")
    return [(layer_type, window if layer_type == "sliding_attention" else None) for layer_type in types]


def attention_softcap(config: Any) -> float | None:
    """Return the soft cap of a model's attention logits (Gemma 2)."""
    return getattr(text_config(config), "attn_logit_softcapping", None)


def attention_dropout(config: Any) -> float:
    """Return the dropout of a model's attention weights in training."""
    config = text_config(config)
    return getattr(config, "attention_dropout", None) or getattr(config, "attn_pdrop", None) or 0.0


def _layer_types(config: Any) -> list[str]:
    """Return the type of each layer, also under RecurrentGemma's and GPT-Neo's names; [] if the config has none."""
    names = ("layer_types", "layers_block_type", "attention_layers")
    return next((types for name in names if (types := getattr(config, name, None))), [])
