"""Read files, folders and Hub datasets as records, each with a name.

A bad file or record is a ValueError that names it; nothing is left out in silence.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from disc_train.data.files import decode, find_files, kind_of


class Fields(NamedTuple):
    """Name the fields of a record that are read, and the words for messages about them."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    forms: tuple[tuple[str, ...], ...] = ()  # other sets of fields that do as well as the required ones
    records: str = "records"  # what the records are
    field: str = "field"  # what a missing field is a missing one of: the flag that names it, say
    flag: str = "--train_file"  # that named the file
    meant: Mapping[str, str] = MappingProxyType({})  # a field of other records -> the flag that reads those


Record = tuple[str, dict[str, Any]]


def read_records(
    train_file: str | Path | Sequence[str] | None, dataset_name: str | None, fields: Fields
) -> list[Record]:
    """Read every record of files, or of the train split of a Hub dataset, as (name, fields).

    `.jsonl` has one record a line; `.json` the same, or a list of records. A `.txt`, `.md` or `.rst` file is one
    record, if it needs one field only; line ends are kept as written. Text is UTF-8, with or without a byte order mark,
    and may be gzipped. The name says where a record came from: "folder/a.txt", "news.jsonl:17" (the line), "news.csv:3"
    or "hub/name[train]:3" (the record, from 1).

    Args:
        train_file: paths, folders and patterns, see `disc_train.data.files.find_files`.

    Raises:
        ValueError: naming the flag: a missing, unsupported, empty or malformed file, a record without a required field.
        ImportError: an absent library.
    """
    if bool(train_file) == bool(dataset_name):
        raise ValueError(
            f"give either {fields.flag} or --dataset_name, got {fields.flag} {train_file!r} and --dataset_name"
            f" {dataset_name!r}"
        )
    if dataset_name:
        return [_record(name, record, fields) for name, record in _read_dataset(dataset_name, fields)]
    assert train_file
    paths = find_files(train_file, fields.flag).read
    try:
        return [_record(name, record, fields) for path in paths for name, record in _read(path, fields)]
    except (OSError, ValueError) as error:
        raise ValueError(f"{fields.flag}: {error}") from error


def check_text(name: str, field: str, text: Any) -> str:
    """Return `text` if it is a string that a tokenizer takes; raise ValueError if not."""
    if not isinstance(text, str):
        raise ValueError(f"{name}: {field!r} must be a string, got {type(text).__name__}")
    try:
        text.encode()  # JSON may escape half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: {field!r} holds a lone surrogate at character {error.start}") from None
    return text


def _read(path: Path, fields: Fields) -> list[tuple[str, Any]]:
    records = list(_READERS[kind_of(path)](path, fields))
    if not records:
        raise ValueError(f"{path}: no {fields.records} in this file")
    return records


def _read_text(path: Path, fields: Fields) -> Iterator[tuple[str, Any]]:
    if len(fields.required) != 1:
        names = ", ".join(fields.required or fields.optional)
        meant = _suggest(["text"], fields)
        raise ValueError(f"{path}: a text cannot hold {fields.records} with the fields {names}{meant}")
    yield str(path), {fields.required[0]: decode(path)}


def _read_jsonl(path: Path, fields: Fields) -> Iterator[tuple[str, Any]]:
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(decode(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _parse_json(line, f"{path}:{number}")


def _read_json(path: Path, fields: Fields) -> Iterator[tuple[str, Any]]:
    text = decode(path)
    try:
        records = _parse_json(text, str(path)) if text.strip() else []
    except ValueError as error:
        if "Extra data" not in str(error):  # json's words for a value after the first: one record a line
            raise
        yield from _read_jsonl(path, fields)
        return
    if not isinstance(records, list | dict):
        raise ValueError(f"{path}: expected a list of records, or one record a line, got {type(records).__name__}")
    for number, record in enumerate(records if isinstance(records, list) else [records], start=1):
        yield f"{path}:{number}", record


def _parse_json(text: str, name: str) -> Any:
    def make(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"expected every key once, got {twice!r} twice in {str(made)[:100]}")
        return made

    try:
        return json.loads(text, object_pairs_hook=make)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}" if "\n" in text else f"column {error.colno}"
        raise ValueError(f"{name}: malformed JSON: {error.msg} ({where})") from None
    except (ValueError, RecursionError) as error:  # a key twice, a number too long to convert, lists nested too deep
        raise ValueError(f"{name}: JSON that Python cannot read: {error}") from None


def _read_csv(path: Path, fields: Fields) -> Iterator[tuple[str, Any]]:
    text = decode(path)
    # The limit, 128 KiB by default, belongs to the process: raised to what this file can need, then put back.
    previous_limit = csv.field_size_limit(len(text) + 1)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        _check_columns(path, reader.fieldnames or (), fields)
        for number, record in enumerate(reader, start=1):
            expected = f"the header's {len(reader.fieldnames or ())}"
            if None in record:  # where DictReader puts what is beyond the header
                raise ValueError(f"{path}:{number}: more fields than {expected}; a text with commas needs quotes")
            if any(record.get(field, "") is None for field in fields.required):
                raise ValueError(f"{path}:{number}: fewer fields than {expected}")
            yield f"{path}:{number}", record
    except csv.Error as error:
        raise ValueError(f"{path}: malformed CSV after line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(previous_limit)


def _read_parquet(path: Path, fields: Fields) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError(f"{path}: reading Parquet needs pyarrow: pip install 'disc-kernels[train]'") from None
    columns: dict[str, list[Any]] = {}
    field = ""  # that is being read
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names, fields)
            for field in _require_fields(str(path), file.schema_arrow.names, fields):
                columns[field] = file.read(columns=[field]).column(field).to_pylist()
    except UnicodeDecodeError as error:
        what = f"column {field!r}" if field else "a column's name"
        raise ValueError(f"{path}: {what} is not UTF-8: {error}") from None
    # OSError: what Arrow says of some damaged files, in several lines; OverflowError: times that Python does not have.
    except (pa.ArrowException, OSError, OverflowError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())}") from None
    for number, values in enumerate(zip(*columns.values(), strict=True), start=1):
        yield f"{path}:{number}", dict(zip(columns, values, strict=True))


def _read_dataset(dataset_name: str, fields: Fields) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ImportError("--dataset_name needs the datasets library: pip install 'disc-kernels[train]'") from None
    name = f"{dataset_name}[train]"
    try:
        if not Path(dataset_name).exists():
            HfApi().dataset_info(dataset_name, timeout=10)
    except Exception as error:  # unless the Hub has answered, load_dataset would ask again for half a minute
        datasets.config.HF_HUB_OFFLINE |= not isinstance(error, HfHubHTTPError)
    try:
        dataset = datasets.load_dataset(dataset_name, split="train")
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:  # OSError: not found, or no answer
        raise ValueError(f"--dataset_name: cannot load {name}: {error}") from error
    columns = _require_fields(name, dataset.column_names, fields)
    for number, record in enumerate(dataset.select_columns(columns), start=1):
        yield f"{name}:{number}", record


_READERS: dict[str, Callable[[Path, Fields], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".txt": _read_text,
    ".md": _read_text,
    ".rst": _read_text,
}


def _require_fields(name: str, present: Collection[str], fields: Fields) -> list[str]:
    """Return those of the fields that are present; raise ValueError if required ones are not."""
    if not any(set(form) <= set(present) for form in (fields.required, *fields.forms)):
        missing = next(field for field in fields.required if field not in present)
        there = (", ".join(present) or "none at all") + _suggest(present, fields)
        forms = f" (also read: {'; '.join(map(', '.join, fields.forms))})" if fields.forms else ""
        raise ValueError(f"{name}: no {fields.field} {missing!r}; there is: {there}{forms}")
    wanted = (*fields.required, *fields.optional, *chain(*fields.forms))
    return [field for field in wanted if field in present]


def _check_columns(path: Path, columns: Sequence[str], fields: Fields) -> None:
    """Raise ValueError where a field that is read is there twice."""
    for field in (*fields.required, *fields.optional, *chain(*fields.forms)):
        if columns.count(field) > 1:
            raise ValueError(f"{path}: expected one column {field!r}, got {columns.count(field)}")


def _suggest(present: Collection[str], fields: Fields) -> str:
    meant = {fields.meant[field] for field in present if field in fields.meant}
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def _record(name: str, record: Any, fields: Fields) -> Record:
    if not isinstance(record, dict):
        wanted = f"a field {', '.join(map(repr, fields.required))}" if fields.required else "fields"
        raise ValueError(f"{name}: expected a record with {wanted}, got {type(record).__name__}")
    return name, {field: record[field] for field in _require_fields(name, record, fields)}
