"""Keep the file of results: a JSON line for every run, found again by the run's settings."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from cells import Cell
from filelock import FileLock, Timeout


class Initial(NamedTuple):
    """Identify a measurement of the initial model by the settings of the documents that it is made on."""

    seed: int
    documents: int
    said: int
    wrong: bool = False
    joined: int = 1

    @classmethod
    def of(cls, cell: Cell) -> "Initial":
        """Return the measurement on the documents of a run."""
        return cls(*(getattr(cell, name) for name in cls._fields))


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Hold a folder's lock meanwhile; raise ValueError where another process has it, or there is no folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, got none")
    lock = FileLock(folder / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"{folder}: expected no other process that makes runs here, got one") from None
    try:
        yield
    finally:
        lock.release()


class Results:
    """Hold what is in a file of results, which need not be there yet; `add` appends to both.

    A last line that was cut off, by an interruption in the middle of writing, is taken off the file.

    Attributes:
        environments: where the results came from: versions and machines, each once.

    Raises:
        ValueError: a line is no JSON of a result; the message names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environments: list[dict[str, str]] = []
        self._found: dict[Cell | Initial, dict[str, Any]] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole, _, cut_off = text.rpartition("\n")
        if cut_off:
            path.write_text(whole + "\n" if whole else "", encoding="utf-8")
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                if "environment" in record:
                    self.environments.append(record["environment"])
                    continue
                task = Cell(**record["run"]) if "run" in record else Initial(**record["initial"])
                self._found[task] = record["result"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: expected the result of a run, got {line[:80]!r}") from error

    def __contains__(self, task: Cell | Initial) -> bool:
        return task in self._found

    def __getitem__(self, task: Cell | Initial) -> dict[str, Any]:
        if task not in self._found:
            raise ValueError(f"{self.path}: expected a result of: {task}; got none, make reproduction makes it")
        return self._found[task]

    def add(self, task: Cell | Initial, result: dict[str, Any]) -> None:
        key = {"run": asdict(task)} if isinstance(task, Cell) else {"initial": task._asdict()}
        self._write(key | {"result": result})
        self._found[task] = result

    def add_environment(self, environment: dict[str, str]) -> None:
        """Say where the results that follow come from."""
        if environment not in self.environments:
            self._write({"environment": environment})
            self.environments.append(environment)

    def _write(self, record: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
