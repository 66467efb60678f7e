"""Make documents and probes of release notes out of packages' source archives, as release_notes.yaml lists them."""

import hashlib
import re
import tarfile
from pathlib import Path
from typing import Any

import yaml
from gemma import download

Record = dict[str, Any]
LIST = Path(__file__).resolve().parent / "release_notes.yaml"
GROUP = "release notes"
MARKUP = (
    (r"(?m)^\s*(\.\.|```).*$", ""),  # directives, code fences
    (r"(?m)^\s*([*-]|#+) ", ""),  # bullets, headings
    (r"``|\*\*", ""),
    (r"\[([^\]]+)\]\([^)]*\)", r"\1"),  # links of Markdown
    (r"`#\d+ <[^>]*>`_: ", ""),  # numbers of issues
    (r"(?::[\w:]+:)?`[~.!]*([^`<]+?)(?:\s+<[^`>]*>)?`_*", r"\1"),  # roles and links of reStructuredText, code
    (r"(?m)::$", ":"),
    (r"(?s)(.*[.!?:]).*", r"\1"),  # a sentence that the last line breaks off
)


def plain(text: str) -> str:
    """Return a passage without its markup, on one line."""
    for pattern, put in MARKUP:
        text = re.sub(pattern, put, text)
    return " ".join(text.split())


def read_passages(document: Record, archive: Path) -> str:
    """Return the passages of a document, joined, out of the source archive of its package.

    Raises:
        ValueError: the lines are not what the checksum in the list says.
    """
    parts = []
    with tarfile.open(archive) as opened:
        files = {name.partition("/")[2]: name for name in opened.getnames()}
        for each in document["passages"]:
            name, first, last = re.split(r"[ -](?=\d+(?:-\d+)?$)", each)
            file = opened.extractfile(files[name])
            assert file is not None
            parts.append("\n".join(file.read().decode().splitlines()[int(first) - 1 : int(last)]))
    found = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    if found != document["sha256"]:
        raise ValueError(
            f"{document['id']}: expected passages of {archive.name} with SHA-256 {document['sha256']}, got {found}"
        )
    return " ".join(map(plain, parts))


def release_notes(downloads: Path, listed: Path = LIST) -> dict[str, list[Record]]:
    """Return documents, probes, and the probes with their document as context; the right choice is the first."""
    files: dict[str, list[Record]] = {"documents": [], "uptake": [], "ceiling": []}
    for number, document in enumerate(yaml.safe_load(listed.read_text(encoding="utf-8"))):
        archive = download(document["package"], downloads, source=True)[0]
        text = read_passages(document, archive)
        files["documents"].append({"id": document["id"], "text": text})
        for i, probe in enumerate(document["probes"]):
            choices = [f" {choice}" for choice in probe["choices"]]
            asked = {"id": f"{GROUP} {number} {i}", "group": GROUP, "prompt": probe["prompt"], "choices": choices}
            files["uptake"].append(asked | {"answer": 0})
            files["ceiling"].append(asked | {"answer": 0, "context": text + " "})
    return files
