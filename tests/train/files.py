"""Write and read files of records."""

import json
from pathlib import Path


def write_jsonl(path: Path, *records: dict) -> Path:
    """Write records to a file, one a line, and return its path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict]:
    """Read the records of a file that has one a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
