"""Processes that were not given the same run: all end with the same error, and none waits for ever."""

import json
import os
import time


def _errors(run, world=2):
    """What each process ended with: one line, code 1."""
    assert run.wait(60) == [1] * world, run.logs
    lines = [[line for line in log.splitlines() if "disc-train: error" in line] for log in run.logs]
    assert all(len(found) == 1 for found in lines) and "Traceback" not in "".join(run.logs), run.logs
    return [found[0] for found in lines]


def test_other_flags(start):
    first, second = _errors(start(world=2, by_rank=[("--temperature", 1.5), ("--temperature", 3)]))
    assert first == second
    assert "--temperature: expected the same on all 2 processes, got 1.5 on process 0 and 3.0 on process 1" in first


def test_other_documents_under_one_name(start, tmp_path):
    """Machines with files of their own: the path, relative to each one's folder, is the same."""
    texts = ["A bridge. It is red. It opened.", "A tower. It is old. It fell.", "A quarry. It is deep. It closed."]
    for folder, used in (("one", texts), ("two", [texts[0], texts[1], texts[2].replace("deep", "dark")])):
        (tmp_path / folder).mkdir()
        lines = "".join(json.dumps({"text": text}) + "\n" for text in used)
        (tmp_path / folder / "d.jsonl").write_text(lines)
    run = start("--train_file", "d.jsonl", world=2, folders=(tmp_path / "one", tmp_path / "two"))
    first, second = _errors(run)
    assert first == second
    assert "training data: expected the same on all 2 processes, got 3 documents (checksum " in first


def test_what_one_process_lacks_ends_all(start, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{")
    first, second = _errors(start(world=2, by_rank=[(), ("--train_file", tmp_path / "bad.jsonl")]))
    assert first == second
    assert "process 1 of 2 cannot go on: " in first and "bad.jsonl:1" in first


def test_a_checkpoint_that_only_one_process_sees(start, tmp_path):
    flags = ("--save_steps", 1, "--output_dir", "out")
    folders = (tmp_path / "one", tmp_path / "two")
    for folder in folders:
        folder.mkdir()
    assert start(*flags, "--max_steps", 1, folders=folders[:1]).wait() == [0]
    wanted = ("--resume_from_checkpoint", "true", "--max_steps", 3)
    first, second = _errors(start(*flags, *wanted, world=2, folders=folders))
    assert first == second
    assert "step of the checkpoint: expected the same on all 2 processes, got 1 on process 0 and 0 on" in first


def test_a_process_that_does_not_come(start, tmp_path):
    """It waits for a file that nobody writes. The others wait as long as they were told to."""
    os.mkfifo(tmp_path / "never.jsonl")
    began = time.monotonic()
    run = start("--ddp_timeout", 3, world=2, by_rank=[(), ("--train_file", tmp_path / "never.jsonl")])
    run.processes[0].join(60)
    assert 3 <= time.monotonic() - began < 30
    assert run.processes[0].exitcode == 1
    assert "process 0 of 2 waited for the others, but one has ended or did not come within 3 s" in run.logs[0]
