"""Runs that go on from a checkpoint, or may not."""

import json
import shutil

import torch
from safetensors.torch import load_file

from disc_train.models.live_teacher import FollowStudent
from tests.train.files import write_jsonl
from tests.train.runs import weights


def test_interrupted_and_resumed_through_the_command_line(disc_train, tmp_path, capsys):
    assert disc_train("--output_dir", tmp_path / "whole", "--save_steps", 1) == 0
    (tmp_path / "out").mkdir()
    (tmp_path / "whole" / "checkpoint-1").rename(tmp_path / "out" / "checkpoint-1")
    assert disc_train("--save_steps", 1) == 1
    assert "already holds a run: continue it with --resume_from_checkpoint" in capsys.readouterr().err
    assert disc_train("--save_steps", 1, "--resume_from_checkpoint", "true") == 0
    assert torch.equal(weights(tmp_path / "out"), weights(tmp_path / "whole"))


def test_true_in_yaml_resumes_from_the_last_checkpoint_that_is_complete(disc_train, tmp_path, capsys):
    assert disc_train("--save_steps", 1) == 0
    (tmp_path / "out" / "checkpoint-99").mkdir()  # the machine went down while it was written
    # YAML's true is read as Python's True.
    flags = ("--resume_from_checkpoint", "True", "--num_train_epochs", 3, "--num_splits", 2, "--logging_steps", 1)
    assert disc_train("--save_steps", 1, *flags) == 0
    out = capsys.readouterr().out
    assert "steps         2 of 6, since the resume; 7 documents" in out
    logged = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    since = [entry["loss"] for entry in logged if "loss" in entry and entry["step"] > 4]
    assert len(since) == 1 and f"loss          {since[0]:.4f}, " in out and "of the one logged step\n" in out
    changed = "changed       since then, from here on: --num_train_epochs 3.0 (was 2.0), --num_splits 2 (was 5)\n"
    assert changed in out


def test_checkpoints_hold_the_average(disc_train, fails, tmp_path, capsys):
    flags = ("--teacher", "ema", "--teacher_ema_decay", 0.5, "--save_steps", 1)
    assert disc_train(*flags, "--output_dir", tmp_path / "whole") == 0
    out = capsys.readouterr().out
    assert "becomes 0.5 of itself and 0.5 of the student after every step\n" in out
    assert "took up" not in out  # by what has moved meanwhile
    (tmp_path / "out").mkdir()
    (tmp_path / "whole" / "checkpoint-1").rename(tmp_path / "out" / "checkpoint-1")
    assert disc_train(*flags, "--resume_from_checkpoint", "true") == 0
    assert torch.equal(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    last, resumed = (load_file(tmp_path / name / "checkpoint-4" / FollowStudent.FILE) for name in ("whole", "out"))
    assert all(torch.equal(last[name], resumed[name]) for name in last)
    (tmp_path / "out" / "checkpoint-2" / FollowStudent.FILE).unlink()
    message = fails(*flags, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-2")
    assert "--teacher ema: expected teacher.safetensors in" in message


def test_settings_that_a_checkpoint_cannot_go_on_with(disc_train, fails, tmp_path, sentences):
    assert disc_train("--save_steps", 1, "--max_steps", 1) == 0
    texts = [" ".join(text) for text in sentences]
    shorter = write_jsonl(tmp_path / "shorter.jsonl", *({"text": text} for text in texts[1:]))
    changed = [{"text": text} for text in [texts[0].replace("e", "i"), *texts[1:]]]
    other = write_jsonl(tmp_path / "other.jsonl", *changed)
    checkpoint = tmp_path / "out" / "checkpoint-1"
    for flags, message in (
        (("--learning_rate", 2e-3), "--learning_rate: expected 0.001, with which {} was trained and which cannot"),
        (("--seed", 7), "--seed: expected 42, with which"),
        (("--per_device_train_batch_size", 2), "x processes: expected 4, with which"),
        (("--num_splits", 2, "--train_file", shorter), "--train_file: expected the data of {}, 7 documents (checksum "),
        (("--train_file", other), "--train_file: expected the data of {}, 7 documents (checksum "),
        (("--train_file", other, "--temperature", 1), "--train_file: expected the data of {}, 7 documents (checksum "),
        (("--train_file", other, "--num_splits", 2), "--train_file: expected the data of {}, 7 documents (checksum "),
    ):
        assert message.format(checkpoint) in fails("--resume_from_checkpoint", checkpoint, *flags)


def test_resuming_a_finished_run_trains_nothing(disc_train, tmp_path, capsys):
    assert disc_train("--save_steps", 1, "--max_steps", 1) == 0
    before = weights(tmp_path / "out").clone()
    capsys.readouterr()
    assert disc_train("--save_steps", 1, "--max_steps", 1, "--resume_from_checkpoint", "true") == 0
    assert capsys.readouterr().out.startswith("Nothing is left to train\n  saved         after all 1 steps, in ")
    assert torch.equal(weights(tmp_path / "out"), before)


def test_an_output_folder_that_cannot_be_one(fails, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder in (tmp_path / "file" / "out", tmp_path / "link"):
        assert "--output_dir: expected a folder that can be written to" in fails("--output_dir", folder)


def test_a_folder_with_a_model_is_not_written_over(fails, model_folder):
    before = weights(model_folder)
    assert "already holds a model" in fails("--output_dir", model_folder)
    assert torch.equal(weights(model_folder), before)


def test_nothing_to_resume_from(fails, tmp_path):
    assert f"({tmp_path / 'out'}), got nowhere, which has none" in fails("--resume_from_checkpoint", "nowhere")


def test_the_flag_to_resume_can_always_be_given(disc_train, fails, model_folder, tmp_path):
    """A scheduler that starts a run again does not know whether it had saved anything."""
    flags = ("--resume_from_checkpoint", "true", "--save_strategy", "no")
    assert disc_train(*flags) == 0
    assert not torch.equal(weights(tmp_path / "out"), weights(model_folder))
    assert "already holds a model" in fails(*flags)


def test_a_run_that_was_stopped_before_it_saved_its_model_saves_it(disc_train, tmp_path, capsys):
    flags = ("--save_steps", 1, "--max_steps", 1, "--resume_from_checkpoint", "true")
    assert disc_train(*flags) == 0
    saved = weights(tmp_path / "out").clone()
    for name in ("trainer_state.json", "model.safetensors"):
        (tmp_path / "out" / name).unlink()
    capsys.readouterr()
    assert disc_train(*flags) == 0
    assert "  steps         1\n" in capsys.readouterr().out
    assert torch.equal(weights(tmp_path / "out"), saved)
    assert disc_train(*flags) == 0
    assert "Nothing is left to train" in capsys.readouterr().out


def test_a_longer_run_that_was_stopped_before_it_saved_its_model_saves_it(disc_train, tmp_path):
    """The model that is there is of fewer steps."""
    flags = ("--save_steps", 1, "--lr_scheduler_type", "constant", "--resume_from_checkpoint", "true")
    assert disc_train(*flags, "--max_steps", 2) == 0
    longer = weights(tmp_path / "out").clone()
    shutil.rmtree(tmp_path / "out")
    assert disc_train(*flags, "--max_steps", 1) == 0
    state, model = (tmp_path / "out" / name for name in ("trainer_state.json", "model.safetensors"))
    of_one_step = {path: path.read_bytes() for path in (state, model)}
    assert disc_train(*flags, "--max_steps", 2) == 0
    for path, content in of_one_step.items():
        path.write_bytes(content)
    assert disc_train(*flags, "--max_steps", 2) == 0
    assert torch.equal(weights(tmp_path / "out"), longer)


def test_checkpoints_that_lack_files_or_are_damaged(disc_train, tmp_path, capsys):
    assert disc_train("--save_steps", 1, "--max_steps", 1) == 0
    flags = ("--save_steps", 1, "--max_steps", 2, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-1")
    for path in sorted((tmp_path / "out" / "checkpoint-1").iterdir()):
        content = path.read_bytes()
        if path.suffix in (".pt", ".pth"):
            path.unlink()
            assert disc_train(*flags) == 1
            assert f"expected {path.stem}" in capsys.readouterr().err
        if path.suffix in (".pt", ".pth", ".bin", ".safetensors") or path.name == "trainer_state.json":
            path.write_bytes(content[: len(content) // 2])
            assert disc_train(*flags) == 1
            error = capsys.readouterr().err
            assert f"disc-train: error: {path}: " in error and "damaged" in error
            path.write_bytes(content)
    assert disc_train(*flags) == 0
