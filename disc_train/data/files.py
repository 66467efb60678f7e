"""Find the files that paths, folders and patterns stand for, and decode their text."""

import glob
import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

KINDS = (".jsonl", ".json", ".parquet", ".csv", ".txt", ".md", ".rst")
BINARY = (".parquet",)  # all others are text, which may be gzipped
FILES_HELP = (
    "a .jsonl, .json, .parquet or .csv file of them, or a .txt, .md or .rst file, which is one document; a folder or a"
    " quoted pattern of such files; several of these; text also gzipped (.gz)"
)


class Files(NamedTuple):
    """Hold the files to read, and those of other kinds beside them."""

    read: list[Path]
    others: list[Path]


def find_files(sources: str | Path | Sequence[str | Path], flag: str) -> Files:
    """List the files that are named, that lie below a folder, or that match a pattern such as "news/**/*.txt".

    Each is listed once; those of a folder or a pattern in sorted order, a folder's without hidden ones.

    Raises:
        ValueError: naming the flag: nothing there, or nothing of a supported kind.
    """
    files = Files([], [])
    for source in [sources] if isinstance(sources, (str, Path)) else sources:
        path = Path(source)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file, path))
            problem = "no supported file"
        elif path.exists():
            found, problem = [path], f"unsupported suffix {path.suffix!r}"
        else:
            found = sorted(filter(Path.is_file, map(Path, glob.glob(str(source), recursive=True))))
            problem = "no supported file matches"
            if not found:
                raise ValueError(f"{flag}: {str(source)!r} does not exist")
        read = [file for file in found if kind_of(file) in KINDS]
        if not read:
            kinds = f"{', '.join(KINDS)}, all but {', '.join(BINARY)} gzipped (.gz) too"
            raise ValueError(f"{flag}: {source}: {problem}; supported: {kinds}, or a folder of these")
        files.read.extend(read)
        files.others.extend(file for file in found if kind_of(file) not in KINDS)
    return Files(*(list(dict.fromkeys(paths)) for paths in files))


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def kind_of(path: Path) -> str:
    """Return the suffix that says what a file holds: ".jsonl" for "news.jsonl.gz"."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return ".gz" if name.endswith(".gz") and suffix in BINARY else suffix


def decode(path: Path) -> str:
    """Read a file of UTF-8, gzipped or not, with or without a byte order mark.

    Raises:
        ValueError: naming the file, and the byte, its offset and line.
    """
    raw = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a readable gzip file: {error}") from None
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start} (line {line})"
        ) from None
