"""Run disc-eval on a tiny model."""

import pytest

from disc_train.cli import evaluate
from tests.train.commands import error_line
from tests.train.evaluation.runs import CHOICES, QUESTIONS
from tests.train.files import write_jsonl


@pytest.fixture
def facts(tmp_path):
    """Write four probes, one of them in a group of its own and with a context."""
    records = [{"question": question, "choices": CHOICES, "answer": CHOICES[0]} for question in QUESTIONS]
    records[1] |= {"context": "It opened in the spring.", "group": "read"}
    return write_jsonl(tmp_path / "facts.jsonl", *records)


@pytest.fixture
def disc_eval(tmp_path, model_folder):
    """Return disc_eval(*flags, output="out", model=folder): it runs the command and gives its exit code."""

    def run(*flags, output="out", model=model_folder):
        named = () if model is None else ("--model_name_or_path", model)
        settings = ("--max_new_tokens", 4, "--use_cpu", "true", "--output_dir", tmp_path / output)
        return evaluate([str(flag) for flag in (*named, *settings, *flags)])

    return run


@pytest.fixture
def fails(disc_eval, capsys):
    """Return fails(*flags): it gives the exit code, not 0, and the one line on stderr."""

    def run(*flags, **options):
        code = disc_eval(*flags, **options)
        return code, error_line(capsys, code)

    return run
