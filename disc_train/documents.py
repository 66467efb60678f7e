"""Files, folders and Hub datasets -> documents.

A bad file or record is a ValueError that names it; nothing is left out in silence.
"""

import csv
import io
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Document:
    """One text to learn. It may be empty or white space only: it is then too short to split, and counted as that.

    The name says where it came from: "folder/a.txt", "news.jsonl:17" (the line), "news.csv:3" or "hub/name[train]:3"
    (the record, from 1).
    """

    name: str
    text: str


def load_documents(train_file: str | None, dataset_name: str | None, text_column: str = "text") -> list[Document]:
    """Read every document of a file, of a folder, or of the train split of a Hub dataset.

    A folder stands for all files with a supported suffix below it, in sorted order, hidden ones left out. A `.txt` file
    is one document, line ends kept as written; `.json` is a list of records, `.jsonl` has one a line. Text is UTF-8,
    with or without a byte order mark.

    Raises ValueError for a missing, unsupported, empty or malformed file, a record without a string under
    `text_column`, and input without any text; ImportError for an absent library.
    """
    if bool(train_file) == bool(dataset_name):
        raise ValueError(
            f"give either train_file or dataset_name, got train_file={train_file!r} and dataset_name={dataset_name!r}"
        )
    if train_file:
        documents = [document for path in _files(Path(train_file)) for document in _read(path, text_column)]
    else:
        assert dataset_name
        documents = list(_read_dataset(dataset_name, text_column))
    if not any(document.text.strip() for document in documents):
        raise ValueError(f"{train_file or dataset_name}: no text in any of its {len(documents)} documents")
    return documents


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise ValueError(f"train_file: {str(path)!r} does not exist")
    supported = ", ".join(_READERS)
    if not path.is_dir():
        if path.suffix.lower() not in _READERS:
            raise ValueError(
                f"{path}: unsupported suffix {path.suffix!r}; supported: {supported}, or a folder of these"
            )
        return [path]
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and file.suffix.lower() in _READERS
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise ValueError(f"{path}: no supported file in this folder; supported: {supported}")
    return files


def _read(path: Path, column: str) -> list[Document]:
    documents = list(_READERS[path.suffix.lower()](path, column))
    if not documents:
        raise ValueError(f"{path}: no documents in this file")
    return documents


def _decode(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start} (line {line})"
        ) from None


def _read_txt(path: Path, column: str) -> Iterator[Document]:
    yield Document(str(path), _decode(path))


def _read_jsonl(path: Path, column: str) -> Iterator[Document]:
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if line.strip():
            name = f"{path}:{number}"
            yield _document(name, _parse_json(line, name), column)


def _read_json(path: Path, column: str) -> Iterator[Document]:
    text = _decode(path)
    if not text.strip():
        return
    records = _parse_json(text, str(path))
    if not isinstance(records, list):
        raise ValueError(
            f"{path}: expected a list of records, got {type(records).__name__}; one record a line is .jsonl"
        )
    for number, record in enumerate(records, start=1):
        yield _document(f"{path}:{number}", record, column)


def _parse_json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}" if "\n" in text else f"column {error.colno}"
        raise ValueError(f"{name}: malformed JSON: {error.msg} ({where})") from None
    except (ValueError, RecursionError) as error:  # a number too long to convert, lists nested too deep
        raise ValueError(f"{name}: JSON that Python cannot read: {error}") from None


def _read_csv(path: Path, column: str) -> Iterator[Document]:
    text = _decode(path)
    # The limit, 128 KiB by default, belongs to the process: raised to what this file can need, then put back.
    previous_limit = csv.field_size_limit(len(text) + 1)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        if reader.fieldnames is None:  # an empty file
            return
        _require_column(str(path), reader.fieldnames, column)
        for number, record in enumerate(reader, start=1):
            name = f"{path}:{number}"
            if None in record:  # where DictReader puts what is beyond the header
                fields = len(reader.fieldnames)
                raise ValueError(f"{name}: more fields than the header's {fields}; a text with commas needs quotes")
            yield _document(name, record, column)
    except csv.Error as error:
        raise ValueError(f"{path}: malformed CSV after line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(previous_limit)


def _read_parquet(path: Path, column: str) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError(f"{path}: reading Parquet needs pyarrow: pip install 'disc-kernels[train]'") from None
    try:
        with pq.ParquetFile(path) as file:
            _require_column(str(path), file.schema_arrow.names, column)
            values = file.read(columns=[column]).column(column).to_pylist()
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: column {column!r} is not UTF-8: {error}") from None
    for number, value in enumerate(values, start=1):
        yield _document(f"{path}:{number}", {column: value}, column)


def _read_dataset(dataset_name: str, column: str) -> Iterator[Document]:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise ImportError("dataset_name needs the datasets library: pip install 'disc-kernels[train]'") from None
    name = f"{dataset_name}[train]"
    try:
        dataset = load_dataset(dataset_name, split="train")
    except (ValueError, OSError, DatasetsError) as error:  # OSError: not found on the Hub, or the Hub not reached
        raise ValueError(f"dataset_name: cannot load {name}: {error}") from error
    _require_column(name, dataset.column_names, column)
    for number, value in enumerate(dataset[column], start=1):
        yield _document(f"{name}:{number}", {column: value}, column)


_READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".txt": _read_txt,
}


def _require_column(name: str, columns: Collection[str], column: str) -> None:
    if column not in columns:
        raise ValueError(f"{name}: no text_column {column!r}; there is: {', '.join(columns) or 'none at all'}")


def _document(name: str, record: Any, column: str) -> Document:
    if not isinstance(record, dict):
        raise ValueError(f"{name}: expected a record with a field {column!r}, got {type(record).__name__}")
    _require_column(name, record, column)
    text = record[column]
    if not isinstance(text, str):
        raise ValueError(f"{name}: {column!r} must be a string, got {type(text).__name__}")
    try:
        text.encode()  # JSON may escape half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: {column!r} holds a lone surrogate at character {error.start}") from None
    return Document(name, text)
