"""Read and write the file of results, a line a run; no row is taken for a run of another model or other data."""

import json
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from disc_train.teacher_cache.identity import weights_checksum

Record = dict[str, Any]
INITIAL = "initial model"
PREPARED = "prepared.json"  # of a data folder: its size in grid.yaml, and a checksum of all that was written
MADE_OF = ("model", "data")  # checksums in every row but the first ones that were made
# What prepare.py decides of a size.
DECIDED = ("entities", "ecbd", "texts", "items", "one_at_a_time", "false_texts", "release_notes")


def made_of(data: Path, model: str, settings: Record) -> Record:
    """Return the checksums of the model and the prepared data.

    Raises:
        ValueError: the folder was not prepared with these settings of a size.
    """
    path = data / PREPARED
    if not path.exists():
        raise ValueError(f"--data_folder: expected a folder that prepare.py has written whole, got {data}")
    prepared = json.loads(path.read_text(encoding="utf-8"))
    for name in DECIDED:
        if prepared.get(name) != settings.get(name):
            raise ValueError(
                f"--size: expected that with which {data} was prepared ({name}: {prepared.get(name)}), got one with"
                f" {name}: {settings.get(name)}; each size needs a folder of its own"
            )
    return {"model": weights_checksum(model), "data": prepared["checksum"]}


def environment() -> Record:
    return {
        "machine": f"{os.cpu_count()} {platform.machine()} cores, {torch.get_num_threads()} threads a run",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def parse(path: Path, text: str) -> list[Record]:
    """Parse the JSON record of each line; raise ValueError naming the line."""
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            with suppress(ValueError):
                records.append(json.loads(line))
                if isinstance(records[-1], dict):
                    continue
            raise ValueError(f"{path}:{number}: expected a JSON record, got {line[:80]!r}")
    return records


def read(path: Path) -> list[Record]:
    """Read the JSON record of each line of a file."""
    return parse(path, path.read_text(encoding="utf-8"))


def read_results(path: Path) -> list[Record]:
    """Read the rows of a file that need not be there; a last line that an interruption cut off is none.

    Raises:
        ValueError: naming what does not belong into one file: two rows of a run, or of one size rows of two models or
            of other prepared data.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    rows = parse(path, text[: text.rfind("\n") + 1])
    found: dict[str, Record] = {}
    runs = set()
    for row in rows:
        run = tuple(row.get(name) for name in ("size", "name", "learning_rate", "seed", "entity"))
        if run in runs:
            raise ValueError(f"{path}: expected one row of a run, got two of {run}")
        runs.add(run)
        if MADE_OF[0] in row:
            check_alike(path, row, found.setdefault(row["size"], row))
    return rows


def check_alike(path: Path, row: Record, other: Record) -> None:
    """Raise ValueError if two rows, where they say so, are of different models or prepared data."""
    for name in MADE_OF:
        if row.get(name, other[name]) != other[name]:
            raise ValueError(
                f"{path}: expected in the size {row['size']} rows of one {name} alone, got two (checksums"
                f" {row[name][:12]} and {other[name][:12]}); another needs a file of results of its own"
            )


def open_results(path: Path, size: str, ours: Record) -> list[Record]:
    """Read the rows of a size from a file that will be added to, and take a line that was cut off off the file.

    Raises:
        ValueError: rows of another model, or of other prepared data.
    """
    rows = [row for row in read_results(path) if row["size"] == size]
    for row in rows:
        check_alike(path, row, ours)
    text = path.read_text(encoding="utf-8") if path.exists() else "\n"
    if not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    return rows


def add(path: Path, row: Record) -> None:
    """Append a row to a file that need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{row['name']}: {row['seconds']} s", flush=True)
