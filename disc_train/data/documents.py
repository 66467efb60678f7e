"""Read records as documents."""

from dataclasses import dataclass

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
    train_file: str | None, dataset_name: str | None, text_column: str = "text", flag: str = "--train_file"
) -> list[Document]:
    """Read every document of a file, of a folder, or of the train split of a Hub dataset.

    Args:
        flag: the one that named the file, for messages.

    Raises as `disc_train.data.records.read_records` does, and ValueError for a record without a string under
    `text_column`, and for input without any text.
    """
    fields = Fields(required=(text_column,), records="documents", field="text_column", flag=flag)
    documents = [
        Document(name, check_text(name, text_column, record[text_column]))
        for name, record in read_records(train_file, dataset_name, fields)
    ]
    if not any(document.text.strip() for document in documents):
        raise ValueError(f"{train_file or dataset_name}: no text in any of its {len(documents)} documents")
    return documents
