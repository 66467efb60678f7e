"""Processes that were not given the same run: all end with the same error, and none waits for ever."""

import json
import os
import time


def _error(run, world=2):
    """What all processes ended with: code 1, and one line that the first has printed."""
    assert run.wait(60) == [1] * world, run.logs
    lines = [[line for line in log.splitlines() if "disc-train: error" in line] for log in run.logs]
    assert [len(found) for found in lines] == [1] + [0] * (world - 1), run.logs
    assert "Traceback" not in "".join(run.logs), run.logs
    return lines[0][0]


def test_other_flags(start):
    error = _error(start(world=2, by_rank=[("--temperature", 1.5), ("--temperature", 3)]))
    assert "--temperature: expected the same on all 2 processes, got 1.5 on process 0 and 3.0 on process 1" in error


def test_other_documents_under_one_name(start, tmp_path):
    """Machines with files of their own: the path, relative to each one's folder, is the same."""
    texts = ["A bridge. It is red. It opened.", "A tower. It is old. It fell.", "A quarry. It is deep. It closed."]
    for folder, used in (("one", texts), ("two", [texts[0], texts[1], texts[2].replace("deep", "dark")])):
        (tmp_path / folder).mkdir()
        lines = "".join(json.dumps({"text": text}) + "\n" for text in used)
        (tmp_path / folder / "d.jsonl").write_text(lines)
    run = start("--train_file", "d.jsonl", world=2, folders=(tmp_path / "one", tmp_path / "two"))
    error = _error(run)
    assert "training data: expected the same on all 2 processes, got 3 documents (checksum " in error


def test_what_one_process_lacks_ends_all(start, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{")
    error = _error(start(world=2, by_rank=[(), ("--train_file", tmp_path / "bad.jsonl")]))
    assert "process 1 of 2 cannot go on: " in error and "bad.jsonl:1" in error


def test_a_checkpoint_that_only_one_process_sees(start, tmp_path):
    flags = ("--save_steps", 1, "--output_dir", "out")
    folders = (tmp_path / "one", tmp_path / "two")
    for folder in folders:
        folder.mkdir()
    assert start(*flags, "--max_steps", 1, folders=folders[:1]).wait() == [0]
    wanted = ("--resume_from_checkpoint", "true", "--max_steps", 3, "--per_device_train_batch_size", 4)
    error = _error(start(*flags, *wanted, world=2, folders=folders))
    assert "step of the checkpoint: expected the same on all 2 processes, got 1 on process 0 and 0 on" in error


def test_a_process_that_does_not_come(start, tmp_path):
    """It waits for a file that nobody writes. The others wait as long as they were told to."""
    os.mkfifo(tmp_path / "never.jsonl")
    began = time.monotonic()
    run = start("--ddp_timeout", 3, world=2, by_rank=[(), ("--train_file", tmp_path / "never.jsonl")])
    run.processes[0].join(60)
    assert 3 <= time.monotonic() - began < 30
    assert run.processes[0].exitcode == 1
    assert "process 0 of 2 waited for the others, but one has ended or did not come within 3 s" in run.logs[0]
