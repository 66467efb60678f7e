"""Run the command in this process on a few documents or records."""

import pytest

from disc_train.cli import main
from tests.train.commands import error_line
from tests.train.files import write_jsonl


@pytest.fixture
def disc_train(model_folder, write_documents, sentences, tmp_path):
    """Return disc_train(*flags, documents=texts): it gives a quick run's exit code, by default on seven documents."""

    def run(*flags, documents=None):
        texts = [" ".join(text) for text in sentences] if documents is None else documents
        data = () if "--train_file" in flags else ("--train_file", str(write_documents(texts)))
        return main(
            [
                *("--model_name_or_path", str(model_folder), *data),
                *("--output_dir", str(tmp_path / "out")),
                *("--per_device_train_batch_size", "4"),
                *("--num_train_epochs", "2"),
                *("--learning_rate", "1e-3"),
                *("--use_cpu", "true"),
                *map(str, flags),
            ]
        )

    return run


@pytest.fixture
def fails(disc_train, capsys):
    """Return fails(*flags, documents=texts): it gives the one line on stderr of a run that must end with code 1."""

    def run(*flags, documents=None):
        status = disc_train(*flags, documents=documents)
        line = error_line(capsys, status)
        assert status == 1
        return line

    return run


@pytest.fixture
def records(tmp_path):
    """Return records(number, **last): it writes records that share an instruction; `last` changes the last one."""

    def write(number, **last):
        answers = [f"The bridge number {i} opened in the spring." for i in range(number)]
        lines = [
            {"teacher_context": "Say when. " * 20, "student_context": "Well: ", "target": text} for text in answers
        ]
        lines[-1] |= last
        return write_jsonl(tmp_path / "records.jsonl", *lines)

    return write
