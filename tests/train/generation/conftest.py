"""See what a model reads while it generates."""

import pytest

from disc_train.generation import decoding
from disc_train.generation.decoding import continue_batch


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that are continued, as token ids, in order; a test may clear them."""
    read = []

    def seen(model, batch, *arguments):
        read.extend(batch)
        return continue_batch(model, batch, *arguments)

    monkeypatch.setattr(decoding, "continue_batch", seen)
    return read
