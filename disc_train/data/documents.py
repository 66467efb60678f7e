"""Read records as documents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from disc_train.data.records import Fields, check_text, read_records


@dataclass(frozen=True)
class Document:
    """Hold one text to learn.

    It may be empty or white space only: it is then too short to split, and counted as that. The name says where it
    came from, as `disc_train.data.records.read_records` gives it.
    """

    name: str
    text: str


def load_documents(
    train_file: str | Path | Sequence[str] | None,
    dataset_name: str | None,
    text_column: str = "text",
    flag: str = "--train_file",
    meant: Mapping[str, str] = MappingProxyType({}),
) -> list[Document]:
    """Read every document of files, folders and patterns, or of the train split of a Hub dataset.

    A text that is null is an empty one.

    Args:
        flag: the one that named the files, for messages.
        meant: what messages suggest for a record without `text_column`, as for `disc_train.data.records.Fields`.

    Raises as `disc_train.data.records.read_records` does, and ValueError for a text that is no string, and for input
    without any text.
    """
    fields = Fields((text_column,), records="documents", field="--text_column", flag=flag, meant=meant)
    flag = flag if train_file else "--dataset_name"
    documents = []
    for name, record in read_records(train_file, dataset_name, fields):
        text = record[text_column]
        documents.append(Document(name, "" if text is None else check_text(f"{flag}: {name}", text_column, text)))
    if not any(document.text.strip() for document in documents):
        sources = dataset_name or (", ".join(train_file) if isinstance(train_file, list) else train_file)
        raise ValueError(f"{flag}: {sources}: no text in any of its {len(documents)} documents")
    return documents
