"""Add low-rank adapters (LoRA) beside a model's linear layers and experts, and load them."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from disc_train.models.parts import decoder_of

# Layers of these take the weights of some linear layers without calling them, so that adapters would change nothing.
STATE_SPACE = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}


def add_lora(
    model: PreTrainedModel, rank: int, alpha: int, dropout: float, targets: Sequence[str] | None = None
) -> PreTrainedModel:
    """Put adapters beside the linear layers and routed experts that read text; from then on they alone are trained.

    They are float32 whatever the model's dtype, since in 16 bits most updates would be lost to rounding.

    Args:
        rank: r of B [out, r] and A [r, in], whose product is added to a layer's weight; at first it is zero.
        alpha: the product is multiplied by alpha / rank.
        dropout: of what the adapters read, from 0 to 1 exclusive; none where experts are adapted, beside which peft has
            none.
        targets: names, or their last parts, of the layers and experts to adapt; None: all but the head and what peft
            cannot adapt.

    Raises:
        ImportError: without peft.
        ValueError: a target that is none of the model's layers or experts, or that peft cannot adapt.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise ImportError("--lora_rank needs peft: pip install 'disc-kernels[train]'") from None
    layers, parameters = _choose_targets(model, targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0 if parameters else dropout,
        target_modules=layers,
        target_parameters=parameters,
    )
    model.add_adapter(config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _choose_targets(model: PreTrainedModel, wanted: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Name what to adapt: layers that peft wraps, and parameters that it adds a product to."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    layers, experts = _adaptable(model)
    if wanted is not None:
        for target in wanted:
            if not any(_matches(name, target) for name in [*layers, *experts]):
                raise ValueError(
                    f"--lora_target_modules: expected names of linear layers or experts, such as"
                    f" {', '.join(sorted(_last_parts([*layers, *experts])))}, got {target}"
                )
        layers, experts = (
            [name for name in names if any(_matches(name, target) for target in wanted)] for names in (layers, experts)
        )
    # Of some families peft takes a gate_proj for an expert of transformers 4, and would adapt no layer of that name.
    config = LoraConfig(target_modules=layers)
    convert_peft_config_for_transformers(config, model, None)
    kept = [name for name in layers if name in set(config.target_modules or ())]
    return kept, [*experts, *(f"{name}.weight" for name in layers if name not in kept)]


def _adaptable(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Name the linear layers that read text, but the head, and the parameters [experts, ., .] of routed experts."""
    head, inside = model.get_output_embeddings(), set(decoder_of(model).modules())
    layers, experts = [], []
    for name, module in model.named_modules():
        if module not in inside or module is head:
            continue
        if isinstance(module, nn.Linear | Conv1D):
            if not (name.endswith(("out_proj", "dt_proj")) and model.config.model_type in STATE_SPACE):
                layers.append(name)
        elif count := getattr(module, "num_experts", None):
            matrices = [key for key, value in module.named_parameters(recurse=False) if value.ndim == 3]
            experts += [f"{name}.{key}" for key in matrices if getattr(module, key).shape[0] == count]
    return layers, experts


def describe_unadapted(model: PreTrainedModel) -> str:
    """Say which matrices beside embeddings and head have no adapters, and whether adapters have no dropout."""
    embeddings = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    names = [
        name.removesuffix(".weight")
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and not {"base_layer", "lora_A", "lora_B"} & set(name.split("."))
        if id(parameter) not in embeddings
    ]
    config: Any = model.peft_config["default"]
    return (f"; not adapted: {', '.join(sorted(_last_parts(names)))}" if names else "") + (
        "; no dropout: peft has none beside experts" if config.target_parameters else ""
    )


def _last_parts(names: Iterable[str]) -> set[str]:
    return {".".join(name.split(".")[-2:]) for name in names}


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


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
