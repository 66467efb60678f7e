"""Read flags and YAML files into dataclasses, one field a flag; for every command."""

import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser
from yaml.composer import ComposerError


def flag(help: str, default: Any = None) -> Any:
    """Make a dataclass field with a help text."""
    return field(default=default, metadata={"help": help})


def several(help: str) -> Any:
    """Make a dataclass field for a list; given again, a flag adds to it."""
    return field(default=None, metadata={"help": help, "action": "extend"})


def check_literals(arguments: Any) -> None:
    """Raise ValueError, naming the flag, where a field holds none of the values that its type lists."""
    for name, hint in get_type_hints(type(arguments)).items():
        if get_origin(hint) is Literal:
            check_flag(
                arguments, name, getattr(arguments, name) in get_args(hint), f"one of {', '.join(get_args(hint))}"
            )


def check_flag(arguments: Any, name: str, holds: bool, expected: str) -> None:
    """Raise ValueError, saying what was expected of a flag and what it is, unless `holds`."""
    if not holds:
        raise ValueError(f"--{name}: expected {expected}, got {getattr(arguments, name)}")


def check_installed(flag: str, *packages: str, install: str = "") -> None:
    """Raise ImportError, naming the flag, if none of the packages that it can use is installed."""
    if not any(map(find_spec, packages)):
        raise ImportError(f"{flag} needs {' or '.join(packages)}: pip install {install or packages[0]}")


def check_folder(flag: str, folder: Path) -> None:
    """Raise ValueError, naming the flag, if a folder cannot be written to, nor made where it is not there yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(f"{flag}: expected a folder that can be written to, got {folder}")


# Flags with these endings take names or paths. A shell writes an empty one for a variable that is not set.
NAMES = ("_name_or_path", "_file", "_cache", "_checkpoint", "dataset_name", "compare", "tasks")
# What other trainers and libraries call the same.
OTHER_NAMES = {
    "attn_implementation": "attention",
    "batch_size": "per_device_train_batch_size",
    "bf16": "dtype",
    "dataset": "dataset_name",
    "dataset_text_field": "text_column",
    "dtype": "student_dtype",
    "epochs": "num_train_epochs",
    "eval_data": "eval_file",
    "eval_dataset": "eval_file",
    "kl_coef": "kl_weight",
    "lora_r": "lora_rank",
    "lr": "learning_rate",
    "max_length": "max_document_tokens",
    "max_seq_length": "max_document_tokens",
    "model": "model_name_or_path",
    "model_id": "model_name_or_path",
    "num_epochs": "num_train_epochs",
    "num_return_sequences": "num_generations",
    "output": "output_dir",
    "r": "lora_rank",
    "target_modules": "lora_target_modules",
    "teacher_model_name_or_path": "teacher_name_or_path",
    "torch_dtype": "student_dtype",
    "train_data": "train_file",
    "use_lora": "lora_rank",
    "use_peft": "lora_rank",
    "validation_file": "eval_file",
    "warmup_ratio": "warmup_steps",
}


class _Parser(HfArgumentParser):
    """Raise errors as exceptions, for the commands to report as they report all others."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_flags(command: str, description: str, argv: Sequence[str], *classes: type) -> tuple[Any, ...]:
    """Read `[CONFIG.yaml] [--flag value ...]` into an instance of each class; flags given win over the file.

    The file may also be given as `--config CONFIG.yaml`, anywhere.

    Raises:
        ValueError: an unknown flag or key (with the nearest known one), a value that does not fit, or an empty name.
        SystemExit: from argparse, after it has printed help.
    """
    first = _config_parser()
    first.add_argument("--version", action="store_true", help="Print it, and stop.")  # `disc_train.cli` does
    parser = _Parser(
        classes,  # type: ignore[arg-type]
        prog=command,
        usage=f"{command} [CONFIG.yaml] [--flag value ...]",
        description=description,
        allow_abbrev=False,
        parents=[first],
    )
    known = {item.name for arguments in classes for item in fields(arguments) if item.init}
    file, given = _split_config(first, argv)
    if file is not None:
        lists = {action.dest for action in parser._actions if action.nargs in ("+", "*")}
        given = _yaml_flags(file, known, lists, flag_names(given)) + given
    read, unknown = parser.parse_known_args(given)
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]}{_nearest(unknown[0], known)}")
    for name, value in vars(read).items():
        if name.endswith(NAMES) and "" in (value if isinstance(value, list) else [value]):
            raise ValueError(f"--{name}: expected a name or a path, got an empty text")
    return parser.parse_args_into_dataclasses(given, look_for_args_file=False)[: len(classes)]


def read_config(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return what the YAML file of a command line says, if there is one, and the arguments beside it."""
    file, given = _split_config(_config_parser(), argv)
    return ({} if file is None else _read_yaml(file)), given


def _config_parser() -> _Parser:
    parser = _Parser((), add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="CONFIG.yaml", help="Read flags from this file; others win over it.")
    return parser


def _split_config(parser: _Parser, argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    chosen, given = parser.parse_known_args(argv)
    file = chosen.config
    if file is None and given and not given[0].startswith("-"):
        file, *given = given
    return (None if file is None else Path(file)), given


def flag_names(given: Sequence[str]) -> set[str]:
    """Return the names of the flags among command-line arguments."""
    return {argument.split("=")[0].lstrip("-").replace("-", "_") for argument in given if argument[:1] == "-"}


def _yaml_flags(path: Path, known: set[str], lists: set[str], over: set[str]) -> list[str]:
    """Write a YAML file as flags, so that its values are read as those on the command line are (3e-6 is a number).

    Those in `over` are left out: lists would be added to each other. Those in `lists` take several values.
    """
    given: list[str] = []
    for key, value in _read_yaml(path).items():
        if key not in known:
            raise ValueError(f"{path}: unknown key {key}{_nearest(str(key), known)}")
        if key in over:
            continue
        if isinstance(value, list):
            if key not in lists and len(value) != 1:
                raise ValueError(f"{path}: {key}: expected one value, got the list {value}")
            given += [f"--{key}", *map(str, value)]
        elif value is not None:
            given.append(f"--{key}={json.dumps(value) if isinstance(value, (bool, dict)) else value}")
    return given


class _Loader(yaml.SafeLoader):
    """Read YAML as `yaml.safe_load` does, but refuse a key that is there twice, of which one would be lost."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                raise ComposerError(None, None, f"the key {key.value} a second time", key.start_mark)
            seen.add((key.tag, str(key.value)))
        return node


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: expected a readable YAML file, got: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected 'flag: value' lines, got {type(settings).__name__}")
    return settings


def _nearest(name: str, known: set[str]) -> str:
    plain = name.lstrip("-").split("=")[0].replace("-", "_")
    other = OTHER_NAMES.get(plain)
    matches = [other] if other in known else difflib.get_close_matches(plain, known, n=1, cutoff=0.7)
    return f"; did you mean {'--' if name.startswith('--') else ''}{matches[0]}?" if matches else ""
