"""Keep the rows of sequences in a folder of safetensors files, memory-mapped, each complete or absent.

A shard holds whole sequences: `key` [n, 16], `first` [n] and `count` [n] say which and how many rows each has, `crc`
[n] is the checksum of those, and every other tensor has one row for each row of a sequence, one sequence after another.
The metadata has a checksum of these four and of all tensors' names, dtypes and shapes.
`cache.json` says what the rows are of, see `identity.py`. The fill order and the size of a shard are fixed, so what was
interrupted and is continued has the same bytes.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from disc_train.progress import show_progress
from disc_train.teacher_cache.sequences import KEY_BYTES, TeacherSequence

DESCRIPTION, LOCK, HEAD, UNFINISHED = "cache.json", "lock", "head.safetensors", ".unfinished"
INDEX = ("key", "first", "count", "crc")
FORMAT = 1
SHARD_BYTES = 256 << 20  # what an interruption may cost, and what a writer holds in memory

Rows = dict[str, Tensor]  # [N, ...] each


class _Entry(NamedTuple):
    row: int  # of all rows of all shards
    first: int
    rows: int
    crc: int


class Store:
    """Read the rows of a cache; they stay on disk until they are asked for. Raises ValueError for a damaged file."""

    shard_bytes = SHARD_BYTES

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._entries: dict[bytes, _Entry] = {}
        self._checked: set[bytes] = set()
        self._shards: list[Rows] = []
        self._paths: list[Path] = []  # of the shards
        self._begins = [0]  # row of each shard's first, and of all that there are
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            self._add(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.folder,)  # a data loader's worker maps the files itself

    def _add(self, path: Path) -> None:
        with explain_damage(path):
            with safe_open(path, framework="pt") as file:  # maps the file, and reads its header
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                checksum = (file.metadata() or {}).get("index")
            if checksum != _index_checksum(tensors):
                raise ValueError("its index does not have the checksum that it was written with")
            index = {name: tensors.pop(name) for name in INDEX}
        begin, counts = self._begins[-1], index["count"].numpy()
        rows = begin + np.concatenate([[0], counts.cumsum()])
        keys = index["key"].numpy().tobytes()
        for number, entry in enumerate(zip(rows.tolist(), *(index[name].tolist() for name in INDEX[1:]), strict=False)):
            key = keys[number * KEY_BYTES : (number + 1) * KEY_BYTES]
            if key not in self._entries or entry[1] < self._entries[key].first:
                self._entries[key] = _Entry(*entry)
        self._shards.append(tensors)
        self._paths.append(path)
        self._begins.append(int(rows[-1]))

    @property
    def rows(self) -> int:
        """Count the rows of all shards."""
        return self._begins[-1]

    def has(self, sequence: TeacherSequence) -> bool:
        """Tell whether all rows of a sequence that are wanted are there."""
        entry = self._entries.get(sequence.key)
        return entry is not None and entry.first <= sequence.first

    def read(self, wanted: Sequence[tuple[TeacherSequence, int]]) -> tuple[Rows, np.ndarray]:
        """Read rows of some sequences, each once.

        Args:
            wanted: of each sequence, the rows from its `first` up to what predicts the token before this one.

        Returns:
            Rows [U, ...], and which of them each wanted row is, [M] int64, in order.

        Raises:
            ValueError: rows that are not there, or are not what was written.
        """
        numbers = []
        for sequence, end in wanted:
            key = sequence.key
            entry = self._entries.get(key)
            if entry is None or entry.first > sequence.first:
                raise ValueError(
                    f"{sequence.name}: expected its {end - 1 - sequence.first} rows in the teacher's cache"
                    f" {self.folder}, got none: it was filled for other documents, templates or epochs"
                )
            if key not in self._checked:
                self._check(sequence.name, entry)
                self._checked.add(key)
            start = entry.row + sequence.first - entry.first
            numbers.append(np.arange(start, start + end - 1 - sequence.first))
        distinct, index = np.unique(np.concatenate(numbers), return_inverse=True)
        parts: list[Rows] = []
        for shard in np.unique(np.searchsorted(self._begins, distinct, side="right") - 1):
            begin, end = self._begins[shard], self._begins[shard + 1]
            rows = torch.from_numpy(distinct[(distinct >= begin) & (distinct < end)] - begin)
            parts.append({name: tensor[rows] for name, tensor in self._shards[shard].items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, index.reshape(-1)

    def _check(self, name: str, entry: _Entry) -> None:
        shard = int(np.searchsorted(self._begins, entry.row, side="right")) - 1
        start = entry.row - self._begins[shard]
        rows = {key: tensor[start : start + entry.rows] for key, tensor in self._shards[shard].items()}
        with explain_damage(self._paths[shard]):
            if _checksum(rows) != entry.crc:
                raise ValueError(f"the rows of {name} are not what was written")

    def fill(
        self,
        sequences: Sequence[TeacherSequence],
        compute: Callable[[Sequence[TeacherSequence]], Rows],
        batch_size: int,
        row_bytes: int,
    ) -> None:
        """Compute the rows of sequences that are not there, and write them shard by shard; the caller holds the lock.

        Args:
            compute: returns the rows of at most `batch_size` sequences.
            row_bytes: of a token's rows together; how many sequences make a shard depends on it.

        Raises:
            OSError: a shard cannot be written; nothing of it is left.
        """
        missing = [sequence for sequence in sequences if not self.has(sequence)]
        shards = _divide(missing, self.shard_bytes // row_bytes)
        for shard in show_progress(shards, len(missing), "sequences read by the teacher"):
            parts = [compute(shard[first : first + batch_size]) for first in range(0, len(shard), batch_size)]
            self._write(shard, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def _write(self, sequences: Sequence[TeacherSequence], rows: Rows) -> None:
        counts = [sequence.rows for sequence in sequences]
        parts = zip(*(tensor.split(counts) for tensor in rows.values()), strict=True)
        keys = b"".join(sequence.key for sequence in sequences)
        tensors = rows | {
            "key": torch.from_numpy(np.frombuffer(keys, dtype=np.uint8).copy()),
            "first": torch.tensor([sequence.first for sequence in sequences]),
            "count": torch.tensor(counts),
            "crc": torch.tensor([_checksum(dict(zip(rows, part, strict=True))) for part in parts]),
        }
        paths = (self.folder / f"shard-{number:05}.safetensors" for number in count())
        path = next(path for path in paths if not path.exists())
        write_tensors(path, tensors, {"index": _index_checksum(tensors)})
        self._add(path)


def _divide(sequences: Sequence[TeacherSequence], rows: int) -> list[list[TeacherSequence]]:
    """Put sequences into shards of at most so many rows, or of one sequence."""
    shards: list[list[TeacherSequence]] = []
    room = 0
    for sequence in sequences:
        if not shards or sequence.rows > room:
            shards.append([])
            room = rows
        shards[-1].append(sequence)
        room -= sequence.rows
    return shards


@contextmanager
def writer(folder: str | Path) -> Iterator[Store]:
    """Lock a folder for one writer, and yield the store that is in it.

    Raises ValueError where another process holds it, OSError where it cannot be made or written to.
    """
    folder = Path(folder)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"--teacher_cache: {folder} is being filled by another process: wait until that has ended, or choose"
            " another folder"
        ) from None
    except OSError as error:
        raise OSError(f"--teacher_cache: {folder} cannot be written to: {error}") from error
    try:
        for leftover in folder.glob("*" + UNFINISHED):  # of a process that was stopped
            leftover.unlink()
        yield Store(folder)
    finally:
        lock.release()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file that is complete or absent; raise OSError if it cannot be written."""
    with _complete_or_absent(path) as unfinished:
        save_file(dict(tensors), unfinished, metadata)


@contextmanager
def _complete_or_absent(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename the file to `path` once it is on the disk."""
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        yield unfinished
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        unfinished.rename(path)
    except (SafetensorError, OSError) as error:
        with suppress(OSError):  # what failed may be the folder itself
            unfinished.unlink()
        raise OSError(
            f"--teacher_cache: {path} cannot be written: {error}; what was written before is complete, and the same"
            " command goes on from there"
        ) from error


def write_description(folder: str | Path, description: Mapping[str, Any]) -> None:
    """Write into a cache's folder which teacher, texts and settings its rows belong to."""
    content = {"format": FORMAT, **description, "checksum": _description_checksum(description)}
    with _complete_or_absent(Path(folder, DESCRIPTION)) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_description(folder: str | Path) -> dict[str, Any] | None:
    """Read which teacher, texts and settings a cache's rows belong to; None where there is no cache yet.

    Raises ValueError for what is no folder, or holds something else or a damaged file.
    """
    path = Path(folder, DESCRIPTION)
    if not str(folder) or (path.parent.exists() and not path.parent.is_dir()):
        raise ValueError(f"--teacher_cache: expected a folder, got {str(folder)!r}")
    if not path.is_file():
        ours = (LOCK, HEAD)  # of a process that was stopped before it came to describe them
        others = [path.name for path in Path(folder).glob("*") if path.name not in ours and path.suffix != UNFINISHED]
        if others:
            raise ValueError(
                f"--teacher_cache: expected a teacher's cache or an empty folder, got {folder} with {min(others)}"
            )
        return None
    with explain_damage(path, f"delete the folder {folder}, and what it held"):
        description = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(description, dict) or description.pop("format", None) != FORMAT:
            raise ValueError(f"expected a cache of format {FORMAT}")
        if description.pop("checksum", None) != _description_checksum(description):
            raise ValueError("it does not have the checksum that it was written with")
    return description


@contextmanager
def explain_damage(path: Path, remedy: str = "delete it, and what it held") -> Iterator[None]:
    """Turn an error in reading a file into one that names the file and says what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(f"--teacher_cache: {path} cannot be read: {error}") from error
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(
            f"--teacher_cache: {path} cannot be read, the file is damaged: {error}; {remedy} is computed again"
        ) from error


def _checksum(tensors: Rows) -> int:
    value = 0
    for name in sorted(tensors):
        flat = tensors[name].reshape(-1)  # a damaged one may have no dimensions, whose bytes torch does not show
        value = zlib.crc32(flat.view(torch.uint8).numpy().data, value)
    return value


def _index_checksum(tensors: Rows) -> str:
    """Compute the checksum of a shard's index, and of what the names, dtypes and shapes of all its tensors are."""
    layout = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in sorted(tensors)]
    index = _checksum({name: tensors[name] for name in INDEX if name in tensors})
    return f"{zlib.crc32(json.dumps(layout).encode(), index):08x}"


def _description_checksum(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
