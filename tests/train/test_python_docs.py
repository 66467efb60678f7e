"""The example on Python's documentation, very small: the same path, whatever the topics of this Python version."""

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "python_docs"


@pytest.fixture
def example(monkeypatch):
    """The names that run.py defines."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return runpy.run_path(str(EXAMPLE / "run.py"))


def test_new_and_base_topics_share_no_paragraph(example):
    prepare = example["prepare"].__globals__
    base, new = prepare["split_topics"](prepare["topics"], 16, seed=0)

    def paragraphs(texts):
        return {" ".join(paragraph.split()) for text in texts.values() for paragraph in text.split("\n\n")}

    assert len(new) == 16 and base and not base.keys() & new.keys()
    assert not paragraphs(base) & paragraphs(new)
    assert all(new[name] == prepare["topics"][name] for name in new)


@pytest.mark.slow
def test_the_student_moves_towards_the_teacher_that_reads_the_context(example, tmp_path):
    rows = example["run"](
        tmp_path / "run",
        ["--num_train_epochs=30", "--learning_rate=2e-3"],
        num_new=4,
        steps=250,
        vocab_size=1024,
        hidden_size=64,
    )

    (before, after, teacher), (divergence_before, divergence_after), *_ = rows.values()
    assert teacher < before - 0.05  # the context tells something
    assert after < before - 0.3 * (before - teacher)  # and the student, without it, comes to know it
    assert divergence_after < 0.5 * divergence_before
