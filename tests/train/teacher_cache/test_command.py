"""`disc-cache`, and `disc-train --teacher cache`."""

import json
import re
import weakref

import pytest
import torch
from transformers import AutoTokenizer

from disc_train import teacher_from_flags
from disc_train.cli import cache, main
from disc_train.config import parse_arguments
from disc_train.data.training_data import load_training_data
from disc_train.trainer import DiscTrainer
from tests.train.commands import error_line
from tests.train.runs import losses, weights
from tests.train.world import make_model


@pytest.fixture
def command(model_folder, write_documents, sentences, tmp_path):
    """command(name, *flags, run=main): the exit code of two epochs of plain steps on four documents."""

    def call(name, *flags, run=main):
        documents = write_documents(" ".join(text) for text in sentences[:4])
        return run(
            [
                *("--model_name_or_path", str(model_folder), "--train_file", str(documents)),
                *("--output_dir", str(tmp_path / name), "--save_strategy", "no"),
                *("--per_device_train_batch_size", "4", "--num_train_epochs", "2", "--logging_steps", "1"),
                *("--optim", "sgd", "--learning_rate", "1e-2", "--max_grad_norm", "0", "--use_cpu", "true"),
                *map(str, flags),
            ]
        )

    return call


def evaluated(folder):
    """Read what a run measured on the documents that it was not trained on."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["eval_kl"] for entry in state["log_history"] if "eval_kl" in entry]


def test_a_run_from_a_cache_is_that_of_a_live_teacher(command, tmp_path, capsys, monkeypatch):
    cached = ("--freeze_head", "--teacher", "cache", "--teacher_cache", tmp_path / "cache")
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"text": "Nobody is there. It is the end. They read it again."}\n')
    cached += ("--teacher_cache_dtype", "float32", "--eval_file", held_out, "--eval_strategy", "epoch")
    assert command("live", "--freeze_head", *cached[-4:]) == 0
    assert command("dry", *cached, "--dry_run") == 0
    out = capsys.readouterr().out
    assert re.search(
        r"cache +summaries of \d+ tokens in float32, in \S+; 5 of 5 sequences are missing; [\d.]+ KiB on disk\n", out
    )
    assert re.search(r"memory +about [\d.]+ MiB a process: .* teacher 0 bytes,", out)
    assert re.search(r"a step +a process reads \d+ of the student tokens at most", out)
    assert "signal        0." in out and not (tmp_path / "cache").exists()
    assert command("nowhere", *cached, run=cache) == 0
    assert re.search(
        r"The teacher's cache is complete\n  cache +summaries of \d+ tokens in float32, in \S+cache\n",
        capsys.readouterr().out,
    )
    assert not (tmp_path / "nowhere").exists()
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.*")}

    monkeypatch.setattr("disc_train.teacher_from_flags.load_teacher", None)  # no teacher is loaded
    assert command("cached", *cached) == 0
    out = capsys.readouterr().out
    assert "frozen; the KL takes 2 products with it a step, from cached summaries of the teacher" in out
    assert "teacher       not in memory; summaries of " in out
    assert "signal        not measured" in out
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "live"), rel=1e-6)
    assert (weights(tmp_path / "cached") - weights(tmp_path / "live")).abs().max() < 1e-7
    assert evaluated(tmp_path / "cached") == pytest.approx(evaluated(tmp_path / "live"), rel=1e-6)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.*")} == files

    assert command("warmer", *cached, "--temperature", 1) == 1
    assert "--temperature, which summaries are made at: expected 1.0, got 2.0" in error_line(capsys, 1)


@pytest.mark.parametrize("method", ["ft_kl", "disc"])
def test_adapters_fill_a_cache_without_a_second_model(method, command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("disc_train.teacher_from_flags.load_teacher", None)
    flags = ("--method", method, "--lora_rank", 2, "--lora_dropout", 0)
    assert command("live", *flags) == 0
    cached = ("--teacher", "cache", "--teacher_cache", tmp_path / "cache", "--teacher_cache_dtype", "float32")
    assert command("cached", *flags, *cached) == 0
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "live"), rel=1e-5)
    assert "from cached summaries" in capsys.readouterr().out


def test_hidden_states_keep_the_head_and_say_so(command, tmp_path, capsys, monkeypatch):
    loaded, load, step = [], teacher_from_flags.load_teacher, DiscTrainer.training_step

    def keep_track(*args):
        teacher = load(*args)
        loaded.append(weakref.ref(teacher))
        return teacher

    def check(self, *args, **kwargs):
        assert [reference() for reference in loaded] == [None]
        return step(self, *args, **kwargs)

    assert command("live") == 0
    monkeypatch.setattr(teacher_from_flags, "load_teacher", keep_track)
    monkeypatch.setattr(DiscTrainer, "training_step", check)
    assert command("cached", "--teacher", "cache", "--teacher_cache", tmp_path / "cache") == 0
    assert "teacher       not in memory, but for its head; hidden states of" in capsys.readouterr().out
    # bfloat16 hidden states of a float32 teacher.
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "live"), rel=5e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--teacher", "cache"), "--teacher cache needs --teacher_cache DIR, got it without"),
        (("--teacher_cache", "x"), "--teacher_cache DIR needs --teacher cache, got it with --teacher auto"),
        (("--teacher_cache_dtype", "float32"), "--teacher_cache_dtype needs --teacher_cache"),
        (("--method", "ft", "--teacher_cache", "x"), "--teacher_cache is for --method"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, command, capsys):
    assert command("out", *flags) == 2
    assert message in error_line(capsys, 2)


def test_disc_cache_wants_a_folder_and_no_more(command, model_folder, write_documents, sentences, tmp_path, capsys):
    assert command("out", run=cache) == 2
    assert "disc-cache: error: --teacher_cache: expected the folder to fill, got none" in error_line(capsys, 2)
    documents = write_documents(" ".join(text) for text in sentences[:2])
    flags = ("--model_name_or_path", model_folder, "--train_file", documents, "--teacher_cache", tmp_path / "cache")
    assert cache([*map(str, flags), "--use_cpu", "true"]) == 0
    assert (tmp_path / "cache" / "cache.json").is_file()


def test_evaluated_documents_are_read_as_they_are_split_once(model_folder, write_documents, sentences, tmp_path):
    """Behind a footer every split is a sequence of its own; those of an evaluation are the same in every epoch."""
    texts = [" ".join(text) for text in sentences]
    documents, held_out = write_documents(texts), tmp_path / "held_out.txt"
    held_out.write_text(texts[2])
    flags = ["--model_name_or_path", model_folder, "--train_file", documents, "--teacher_cache", tmp_path / "cache"]
    flags += ["--eval_file", held_out, "--eval_strategy", "epoch", "--split_strategy", "random_token"]
    flags += ["--num_splits", "1", "--teacher_template", "{{ prefix }} Go on:", "--use_cpu", "true"]
    disc, loop = parse_arguments([*map(str, flags)], "disc-cache")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    data = load_training_data(disc, loop, tokenizer)
    made = teacher_from_flags.teacher_cache(disc, loop, tokenizer, data, make_model())
    names = [sequence.name for sequence in made.sequences]
    assert names.count(str(held_out)) == 1
    assert names.count(f"{documents}:3") > 1


def test_two_processes_read_what_one_fills(start, tmp_path):
    common = ("--optim", "sgd", "--max_grad_norm", "0", "--save_strategy", "no", "--logging_steps", "1")
    common += ("--freeze_head", "--max_steps", "2", "--teacher", "cache", "--teacher_cache_dtype", "float32")
    folders = [tmp_path / name for name in ("one", "two")]
    batches = [
        ("--per_device_train_batch_size", size, "--output_dir", folder, "--teacher_cache", folder / "cache")
        for size, folder in zip((8, 4), folders, strict=True)
    ]
    runs = [start(*common, *flags, world=world) for world, flags in zip((1, 2), batches, strict=True)]
    assert {code for run in runs for code in run.wait()} == {0}, runs[1].logs
    assert losses(folders[1]) == pytest.approx(losses(folders[0]), rel=1e-5)
    assert torch.allclose(weights(folders[1]), weights(folders[0]), rtol=0, atol=1e-6)
