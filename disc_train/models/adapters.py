"""Add low-rank adapters (LoRA) beside a model's linear layers and experts, load saved ones, merge them."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import transformers
from packaging.version import Version
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.pytorch_utils import Conv1D
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME
from transformers.utils.peft_utils import find_adapter_config_file

from disc_kernels.hf.forward import decoder_of
from disc_train.flags import check_installed
from disc_train.models.frozen_head import head_is_tied

# Layers of these take the weights of some linear layers without calling them, so that adapters would change nothing.
STATE_SPACE = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}


def add_lora(
    model: PreTrainedModel,
    rank: int,
    alpha: int,
    dropout: float,
    targets: Sequence[str] | None = None,
    *,
    rslora: bool = False,
    dora: bool = False,
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
        rslora: multiply the product by alpha / sqrt(rank) instead.
        dora: train the norms of the adapted weight's rows apart from their directions.

    Raises:
        ImportError: without peft.
        ValueError: a target that is none of the model's layers or experts, or that peft cannot adapt; DoRA of experts;
            a peft that this transformers refuses.
    """
    check_installed("--lora_rank", "peft", install="'disc-kernels[train]'")
    import peft

    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        raise ValueError(
            f"--lora_rank: expected peft {MIN_PEFT_VERSION} or newer, which transformers {transformers.__version__}"
            f" needs, got {peft.__version__}"
        )
    layers, parameters = _choose_targets(model, targets)
    if dora and parameters:
        raise ValueError(
            "--lora_use_dora: expected linear layers, got experts, which peft cannot adapt so: leave it out, or name"
            " layers by --lora_target_modules"
        )
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0 if parameters else dropout,
        target_modules=layers,
        target_parameters=parameters,
        use_rslora=rslora,
        use_dora=dora,
    )
    return _add(model, config)


def _add(model: PreTrainedModel, config: Any) -> PreTrainedModel:
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
    named = {
        name.replace(".default.", ".").replace("_vector.weight", "_vector"): name
        for name, _ in model.named_parameters()
        if ".lora_" in name
    }
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


def base_of_adapter(name_or_path: str) -> str | None:
    """Return the model that an adapter, a folder or on the Hub, was trained on; None: it is no adapter.

    Raises:
        ValueError: its config does not say.
    """
    config = find_adapter_config_file(name_or_path)
    if config is None:
        return None
    try:
        base = json.loads(Path(config).read_text(encoding="utf-8"))["base_model_name_or_path"]
        if not isinstance(base, str):
            raise TypeError(base)
        return base
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config}: expected JSON with a base_model_name_or_path, got: {error!r}") from error


def model_below(name_or_path: str) -> str:
    """Return the model below an adapter, or below an adapter of a model with an adapter; of a model, itself."""
    while (base := base_of_adapter(name_or_path)) is not None:
        name_or_path = base
    return name_or_path


def put_adapter(model: PreTrainedModel, name_or_path: str, *, trained: bool) -> PreTrainedModel:
    """Put a saved adapter beside a model's layers: to be trained, in float32, or as it is.

    Raises:
        ValueError: it is of another model or damaged, or the loss would leave out part of what it does.
    """
    from peft import LoraConfig, PeftConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = PeftConfig.from_pretrained(name_or_path)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"expected a LoRA adapter, got one of type {config.peft_type}")
    exact = trained or config.use_dora  # transformers rounds to the model's dtype, and leaves out DoRA's norms
    if exact:
        config.inference_mode = False
        _add(model, config)
    else:
        report = model.load_adapter(name_or_path)
        if others := sorted({*report.missing_keys, *report.unexpected_keys, *map(str, report.mismatched_keys)}):
            raise ValueError(f"expected an adapter of {model.name_or_path}, got others: {', '.join(others)}")
    head: Any = model.get_output_embeddings()
    on_head = isinstance(head, BaseTunerLayer)
    others = [name for name, parameter in model.named_parameters() if parameter.requires_grad and ".lora_" not in name]
    if (trained and (others or on_head)) or (on_head and head_is_tied(model)):
        raise ValueError(
            "expected low-rank adapters beside layers other than the output head and nothing else, got"
            f" {', '.join(others) or 'adapters on the head'}"
            + ("; --lora_rank merges them into the model and trains new ones" if trained else "")
        )
    if exact:
        load_adapters(model, str(Path(str(find_adapter_config_file(name_or_path))).parent))
    if on_head:
        head.merge()  # the loss takes the weight itself
    return model


def merge_adapter(model: PreTrainedModel, name_or_path: str) -> PreTrainedModel:
    """Add a saved adapter to a model's weights, each rounded once to its dtype.

    Raises:
        ValueError: it would have to change a weight that serves as embeddings and as head in one of the two only.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = PeftModel.from_pretrained(model, name_or_path)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if head_is_tied(model) and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise ValueError(
            "expected adapters beside layers other than the output head and the embeddings, which are one weight here"
        )
    merged: PreTrainedModel = adapted.merge_and_unload()
    merged.name_or_path = name_or_path  # the base of adapters that are trained on it
    return merged
