"""Read which runs to make from a YAML file: every method over its learning rates and seeds, and the controls."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from disc_train.objectives.methods import AT_TEMPERATURE, OF_SUFFIXES, WITH_TEACHER

# The methods that a setting changes anything of.
USED_BY = {
    **dict.fromkeys(("top_k", "told", "by_gain", "own_sentences", "prefix", "replay"), ("disc",)),
    **dict.fromkeys(("temperature", "ce_weight"), AT_TEMPERATURE),
    **{"kl_weight": ("ft_kl",), "kl_clip": WITH_TEACHER, "bos": OF_SUFFIXES},
}
VALUES = {"texts": ("documents", "own"), "prefix": ("own", "other"), "tail": ("bucket", "renormalise", "cut")}


@dataclass(frozen=True)
class Cell:
    """Hold the settings of one run, which identify it in the file of results."""

    seed: int  # decides the new entities, documents and probes, and the order of training
    learning_rate: float
    documents: int
    epochs: int
    batch_size: int  # documents
    method: str = "disc"  # as DiscTrainer names it
    lora_rank: int = 0  # 0: every weight is trained
    texts: str = "documents"  # or "own": what the initial model itself wrote about each document
    said: int = 3  # how often a document says each of its facts, every time in other words
    wrong: bool = False  # one of these statements, drawn at random for every fact, gives it another value
    joined: int = 1  # how many documents, of an entity each, are made one
    prefix: str = "own"  # or "other": the teacher reads the beginning of another document
    bos: bool = False  # both models read the end-of-text token before anything else
    split_strategy: str = "sentence_boundary"
    num_splits: int = 5
    temperature: float = 2.0
    kl_weight: float = 0.1
    ce_weight: float = 0.0
    top_k: int = 0  # the KL over the teacher's likeliest tokens alone, as top_k.py has it; 0: over all
    tail: str = "cut"
    kl_clip: float | None = None
    teacher_ema_decay: float | None = None  # None: the teacher stays as it is
    teacher_sync_steps: int = 1
    told: bool = False  # cross-entropy where the prefix tells the token, the KL elsewhere, as candidates.py has it
    by_gain: bool = False  # suffixes are drawn the likelier the more the prefix tells about them
    own_sentences: bool = False  # CD-base's texts beside the documents, as many examples
    freeze_head: bool = False
    frozen_layers: int = 0  # how many are not trained, counted from the embeddings up
    replay: float = 0.0  # share of examples that are documents about old entities, held to the teacher's by KL
    interpolate: float = 1.0  # afterwards the weights are initial + interpolate * (trained - initial)
    updates: int = 1  # 2: a second set of documents after the first, with the once updated model as teacher
    initial_teacher: bool = False  # the initial model is the teacher of the second update, too

    def __post_init__(self) -> None:
        if self.updates > 1 and (self.lora_rank or self.texts == "own" or self.method == "cd"):
            raise ValueError(f"a second update is for methods that train all weights on documents, got {self}")
        for name, values in VALUES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: expected one of {', '.join(values)}, got {getattr(self, name)!r}")
        changed = {each.name for each in fields(self) if getattr(self, each.name) != each.default}
        for name in changed & USED_BY.keys():
            if self.method not in USED_BY[name]:
                raise ValueError(f"{name} is for {' and '.join(USED_BY[name])}, got {self}")
        if self.top_k and (self.ce_weight or self.kl_clip or self.told):
            raise ValueError(f"top_k is for DiSC as it is, got {self}")
        if self.initial_teacher and (self.updates == 1 or self.method not in WITH_TEACHER):
            raise ValueError(f"initial_teacher is for a second update with a teacher, got {self}")
        if (self.told or self.by_gain or self.own_sentences) and self.updates > 1:
            raise ValueError(f"told, by_gain and own_sentences are for one update by DiSC, got {self}")
        if len(changed & {"prefix", "replay", "own_sentences", "by_gain"}) > 1:
            raise ValueError(f"prefix, replay, own_sentences and by_gain are one at a time, got {self}")
        if self.wrong and (self.own_sentences or self.texts == "own" or self.method == "cd"):
            raise ValueError(f"the model's own sentences are about documents that are not wrong, got {self}")

    def __str__(self) -> str:
        """Write the settings that are not the default."""
        settings = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]
        return ", ".join(f"{name} {value}" for name, value, default in settings if value != default)


@dataclass(frozen=True)
class Row:
    """Hold the runs that stand for a method, or for a variant of one."""

    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Control:
    """Hold one question: a method with one setting changed, beside its own runs with the same rates and seeds."""

    name: str
    base: Row
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Grid:
    model: Path  # folder of the initial model and its tokenizer
    pretraining_steps: int  # of examples/tiny/pretrain.py: the names in its texts are not used again
    device: str
    min_accuracy: float  # the gate: an initial model that does worse, at reading in context say, is no teacher
    methods: tuple[Row, ...]
    controls: tuple[Control, ...]

    def cells(self) -> Iterator[Cell]:
        """Yield every run once, seed by seed: those of the methods first, then those of the controls."""
        rows = [*self.methods, *(row for control in self.controls for row in (control.base, *control.rows))]
        cells = dict.fromkeys(cell for row in rows for cell in row.cells)
        yield from sorted(cells, key=lambda cell: cell.seed)


KEYS = {"model", "pretraining_steps", "device", "min_accuracy", "rate_factor"}  # of a grid's file
KEYS |= {"seeds", "control_seeds", "common", "methods", "controls"}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected a readable YAML file, got: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a grid's keys, got {type(config).__name__}")
    return config


def read_grid(path: Path, seeds: int | None = None) -> Grid:
    """Read a grid; `seeds` takes the first so many seeds of every row only.

    A file may be `like` another beside it: what it does not say is as it is there.

    Raises:
        ValueError: it is no YAML, has an unknown key or lacks one, or a row has an unknown setting or no learning
            rates, or is a control of a method that is not there; the message names file and row.
    """
    config = _read_yaml(path)
    if "like" in config:
        config = _read_yaml(path.parent / config.pop("like")) | config
    if wrong := config.keys() ^ KEYS:
        raise ValueError(f"{path}: expected {', '.join(sorted(KEYS))}; unknown or missing: {', '.join(sorted(wrong))}")
    common = config["common"]

    def row(name: str, settings: dict[str, Any], seed_numbers: list[int]) -> Row:
        changed = common | {key: value for key, value in settings.items() if key != "learning_rates"}
        unknown = changed.keys() - {field.name for field in fields(Cell)} - {"seed", "learning_rate"}
        if unknown or not settings.get("learning_rates"):
            what = f"unknown settings {sorted(unknown)}" if unknown else "no learning_rates"
            raise ValueError(f"{path}: {name}: expected settings of a run and learning_rates, got {what}")
        return Row(
            name,
            tuple(
                Cell(**changed | {"seed": seed, "learning_rate": float(rate) * config["rate_factor"]})
                for seed in seed_numbers[:seeds]
                for rate in settings["learning_rates"]
            ),
        )

    methods = config["methods"]
    controls = []
    for name, control in config["controls"].items():
        if control["of"] not in methods:
            raise ValueError(f"{path}: {name}: expected `of` to name one of {', '.join(methods)}, got {control['of']}")
        settings = methods[control["of"]] | {"learning_rates": control["learning_rates"]}
        controls.append(
            Control(
                name,
                row(control["of"], settings, config["control_seeds"]),
                tuple(
                    row(variant, settings | change, config["control_seeds"])
                    for variant, change in control["variants"].items()
                ),
            )
        )
    return Grid(
        model=Path(config["model"]),
        pretraining_steps=config["pretraining_steps"],
        device=config["device"],
        min_accuracy=config["min_accuracy"],
        methods=tuple(row(name, settings, config["seeds"]) for name, settings in methods.items()),
        controls=tuple(controls),
    )
