"""Save a trained model as what it was loaded from: in its dtype, with the files of its processor."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, cached_file

from disc_train.models.adapters import has_adapters


def convert(model: PreTrainedModel, weights: dict[str, Tensor] | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Convert a model's weights to a dtype, on the CPU; tied ones stay one, and of adapters there is nothing else.

    Args:
        weights: the model's, where they are not its own (of a model that is divided over processes).

    Raises:
        OverflowError: a value that the dtype does not hold.
    """
    in_float32 = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    converted: dict[int, Tensor] = {}
    result = {}
    for name, value in (model.state_dict() if weights is None else weights).items():
        if has_adapters(model) and ".lora_" not in name:
            continue
        if value.is_floating_point() and not any(part in name for part in in_float32):
            key = id(parameters.get(name, value))  # weights of a divided model are tied no more
            if key not in converted:
                converted[key] = value.to("cpu", dtype)
                if not torch.isfinite(converted[key]).all():
                    got = str(dtype).removeprefix("torch.")
                    raise OverflowError(f"--save_dtype: expected a dtype that holds the values of {name}, got {got}")
            value = converted[key]
        result[name] = value
    return result


def write_dtype(folder: str, dtype: torch.dtype) -> None:
    """Write into the config of a saved model, where there is one, which dtype its weights have."""
    path = Path(folder, CONFIG_NAME)
    if not path.is_file():  # adapters
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *config.values()):
        if isinstance(part, dict) and "dtype" in part:
            part["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_processor(model: PreTrainedModel, folder: str) -> None:
    """Copy the files that say how images are read from where a model was loaded to where it is saved."""
    if model.config.get_text_config() is model.config or has_adapters(model):
        return
    loaded_from = str(model.name_or_path)
    for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME):
        found = cached_file(
            loaded_from,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is not None and not Path(folder, name).exists():
            shutil.copyfile(found, Path(folder, name))
