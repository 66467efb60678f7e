"""Progress is shown of what takes longer than two seconds: by a bar on a terminal, by plain lines elsewhere."""

import sys
from time import sleep

import pytest

from disc_train import progress
from disc_train.cli import main
from disc_train.progress import say_if_slow, show_progress

BATCHES = [[1, 2, 3], [4, 5], [6]]


@pytest.fixture
def clock(monkeypatch):
    """A list of the seconds that pass between the calls of the clock."""
    passing, now = [], [0.0]

    def monotonic():
        now[0] += passing.pop(0) if passing else 0.0
        return now[0]

    monkeypatch.setattr(progress.time, "monotonic", monotonic)
    return passing


def test_what_is_done_at_once_is_not_mentioned(capsys):
    assert list(show_progress(BATCHES, 6, "texts read")) == BATCHES
    assert capsys.readouterr() == ("", "")


def test_plain_lines_come_at_doubling_times(clock, capsys):
    clock += [0.0, 1.0, 2.0, 1.0, 3.0, 60.0, 60.0, 59.0]  # 1, 3, 4, 7, 67, 127, 186 s
    assert list(show_progress([[n] for n in range(7)], 7, "texts read")) == [[n] for n in range(7)]
    lines = ["2 of 7 in 3 s", "4 of 7 in 7 s", "5 of 7 in 67 s", "6 of 7 in 127 s", "7 of 7 in 186 s"]
    assert capsys.readouterr().err.splitlines() == [f"texts read: {line}" for line in lines]


def test_one_of_several_processes_shows_it(clock, monkeypatch, capsys):
    clock += [0.0, 3.0, 3.0, 3.0]
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    for rank, lines in ((1, 0), (0, 1)):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        assert list(show_progress(BATCHES, 6, "texts read")) == BATCHES
        assert ("texts read" in capsys.readouterr().err) == bool(lines)


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert list(show_progress(BATCHES, 6, "texts read")) == BATCHES
    assert "texts read" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "seconds", "said"), [(0, 0.2, True), (0, 0.0, False), (1, 0.2, False)])
def test_a_slow_block_is_named(rank, seconds, said, monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY", 0.05)
    monkeypatch.setenv("RANK", str(rank))
    with say_if_slow("looking for it ..."):
        sleep(seconds)
    assert capsys.readouterr().err == "looking for it ...\n" * said


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_hears_that_imports_are_slow(terminal, monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    assert main(["--zzzzzz"]) == 2
    assert ("disc-train: importing PyTorch and transformers ..." in capsys.readouterr().err) == terminal


def test_a_log_file_has_each_line_when_it_is_printed(tmp_path, monkeypatch):
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stdout", log)
        assert main(["--version"]) == 0
        assert "disc-train " in (tmp_path / "log").read_text()
