"""Read flags and YAML files into dataclasses, one field a flag; for every command."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser


def flag(help: str, default: Any = None) -> Any:
    """Make a dataclass field with a help text."""
    return field(default=default, metadata={"help": help})


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


class _Parser(HfArgumentParser):
    """Raise errors as exceptions, for the commands to report as they report all others."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_flags(command: str, description: str, argv: Sequence[str], *classes: type) -> tuple[Any, ...]:
    """Read `[CONFIG.yaml] [--flag value ...]` into an instance of each class; flags given win over the file.

    Raises:
        ValueError: an unknown flag or key (with the nearest known one), or a value that does not fit.
        SystemExit: from argparse, after it has printed help.
    """
    parser = _Parser(
        classes,  # type: ignore[arg-type]
        prog=command,
        usage=f"{command} [CONFIG.yaml] [--flag value ...]",
        description=description,
        allow_abbrev=False,
    )
    known = {item.name for arguments in classes for item in fields(arguments) if item.init}
    given = list(argv)
    if given and not given[0].startswith("-"):
        file, *given = given
        over = {argument.split("=")[0].lstrip("-").replace("-", "_") for argument in given if argument[:1] == "-"}
        given = _yaml_flags(Path(file), known, over) + given
    _, unknown = parser.parse_known_args(given)
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]}{_nearest(unknown[0], known)}")
    return parser.parse_args_into_dataclasses(given, look_for_args_file=False)


def _yaml_flags(path: Path, known: set[str], over: set[str]) -> list[str]:
    """Write a YAML file as flags, so that its values are read as those on the command line are (3e-6 is a number).

    Those in `over` are left out: lists would be added to each other.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: expected a readable YAML file, got: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected 'flag: value' lines, got {type(settings).__name__}")
    given: list[str] = []
    for key, value in settings.items():
        if key not in known:
            raise ValueError(f"{path}: unknown key {key}{_nearest(str(key), known)}")
        if key in over:
            continue
        if isinstance(value, list):
            given += [f"--{key}", *map(str, value)]
        elif value is not None:
            given.append(f"--{key}={json.dumps(value) if isinstance(value, (bool, dict)) else value}")
    return given


def _nearest(name: str, known: set[str]) -> str:
    matches = difflib.get_close_matches(name.lstrip("-").split("=")[0].replace("-", "_"), known, n=1)
    return f"; did you mean {matches[0]}?" if matches else ""
