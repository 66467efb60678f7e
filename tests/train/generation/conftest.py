"""See what a model reads while it generates."""

import pytest

from disc_train.generation import decoding
from disc_train.generation.decoding import continue_batch


@pytest.fixture
def prompts(monkeypatch):
    """Return a list that takes in each prompt that is continued, as token ids, in order; a test may clear it."""
    read = []

    def seen(model, batch, *arguments):
        read.extend(batch)
        return continue_batch(model, batch, *arguments)

    monkeypatch.setattr(decoding, "continue_batch", seen)
    return read
