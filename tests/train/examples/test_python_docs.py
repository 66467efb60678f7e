"""The example on Python's documentation, very small: the same path, whatever the topics of this Python version."""

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "python_docs"


@pytest.fixture
def example(monkeypatch):
    """The names that run.py defines."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return runpy.run_path(str(EXAMPLE / "run.py"))


def test_the_base_shares_no_paragraph_with_what_is_held_out(example):
    prepare = example["prepare"].__globals__
    base, new, control = prepare["split_topics"](prepare["topics"], 16, seed=0).values()

    def paragraphs(texts):
        return {" ".join(paragraph.split()) for text in texts.values() for paragraph in text.split("\n\n")}

    assert (len(new), len(control)) == (16, 8)
    assert base and len(base.keys() | new.keys() | control.keys()) == len(base) + 24
    assert not paragraphs(base) & paragraphs(new | control)


@pytest.mark.slow
def test_the_student_moves_towards_the_teacher_that_reads_the_context(example, tmp_path):
    rows = example["run"](
        tmp_path / "run",
        ["--num_train_epochs=15", "--learning_rate=2e-3"],
        num_new=4,
        steps=120,
        vocab_size=1024,
        hidden_size=64,
    )

    (before, after, teacher), (divergence_before, divergence_after), *_ = rows.values()
    assert teacher < before - 0.03  # the context tells something
    assert after < before - 0.3 * (before - teacher)  # and the student, without it, comes to know it
    assert divergence_after < 0.5 * divergence_before
