"""Read what a command says when it fails."""

import pytest


def error_line(capsys: pytest.CaptureFixture, code: int) -> str:
    """Return the one line that a command which ended with this code, not 0, has printed as its error."""
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if ": error: " in line]
    assert code != 0
    assert len(errors) == 1
    assert "Traceback" not in captured.err
    return errors[0]
