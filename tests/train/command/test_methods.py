"""Every method, adapters and replay."""

import json
import re

import pytest
import torch

from tests.train.runs import weights


@pytest.mark.parametrize(
    ("flags", "formula"),
    [
        (("--method", "ft"), "ft: cross-entropy\n"),
        (("--method", "ft_kl", "--kl_weight", 0.5), "ft_kl: cross-entropy + 0.5 KL(initial model || student)\n"),
        (("--method", "talr"), "talr: cross-entropy with weights max(q^(1/tau), 0.01)\n"),
        (("--divergence", "jsd", "--beta", 0.3), "disc: T^2 JSD(teacher, student; beta = 0.3) at T = 2\n"),
        (("--kl_clip", 0.5), "disc: T^2 min(KL(teacher || student), 0.5) at T = 2\n"),
        (("--ce_weight", 0.1), "disc: T^2 KL(teacher || student) at T = 2 + 0.1 cross-entropy\n"),
    ],
)
def test_every_method(flags, formula, disc_train, capsys, tmp_path, model_folder, sentences):
    texts = [" ".join(text) for text in sentences]
    assert disc_train(*flags, documents=[*texts, "", "x"]) == 0
    out = capsys.readouterr().out
    assert f"method        {formula}" in out
    if flags[0] == "--method":
        assert re.search(r"9 read, 7 used; 2 of fewer than 2 tokens \(\S+\.jsonl:8, \S+\.jsonl:9\); 0 cut\n", out)
        assert "signal" not in out
        assert ("teacher       none: nothing is compared" in out) == ("ft_kl" not in flags)
        assert "fewer than in a pass" not in out  # a document is one pass
        assert ("the student reads" in out) == ("ft_kl" not in flags)
    first, last = map(float, re.search(r"loss +([\d.]+) -> ([\d.]+), ", out).groups())
    assert last < first
    assert not torch.equal(weights(tmp_path / "out"), weights(model_folder))


def test_a_clip_is_compared_with_the_signal(disc_train, capsys):
    """The signal is the forward KL, which says nothing about a bound on another divergence."""
    assert disc_train("--kl_clip", 1e-9, "--max_steps", 1) == 0
    out = capsys.readouterr().out
    assert "--kl_clip 1e-09 is less than the " in out
    assert "took up hardly anything: raise --kl_clip, or leave it out" in out
    assert disc_train("--divergence", "reverse_kl", "--kl_clip", 1e-9, "--dry_run") == 0
    assert "is less than" not in capsys.readouterr().out


def test_nothing_long_enough_to_finetune_on(fails):
    message = fails("--method", "ft", documents=["x", ""])
    assert "expected a document of at least 2 tokens, got 2 shorter ones" in message


def test_suffixes_without_a_teacher(disc_train, capsys):
    """What is printed of the teacher, and what a step costs, know of none."""
    flags = ("--method", "split_ft", "--num_splits", 2, "--student_template", "Say: ", "--freeze_head", "true")
    assert disc_train(*flags, "--dry_run", "true") == 0
    out = capsys.readouterr().out
    assert "method        split_ft: cross-entropy of suffixes, each read without its prefix\n" in out
    assert re.search(r"templates +student: \d+ tokens before a suffix\n", out)
    assert "teacher       none: nothing is compared" in out
    assert "head          frozen\n" in out
    assert "teacher 0 bytes, " in out
    assert re.search(r"a process reads [\d,]+ of the student tokens at most", out)
    assert "signal" not in out


@pytest.mark.parametrize("method", ["disc", "ft", "split_ft", "cd"])
def test_adapters(method, disc_train, records, capsys, tmp_path, model_folder):
    data = ("--train_file", records(9)) if method == "cd" else ()
    flags = ("--method", method, *data, "--lora_rank", 2, "--learning_rate", 1e-2)
    assert disc_train(*flags, "--save_steps", 1) == 0
    out = capsys.readouterr().out
    # Of two layers' four attention and three other matrices: what each reads and writes, twice the rank.
    trained = 2 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert f"{trained:,} trained, in adapters, float32" in out
    assert ("teacher       the student without its adapters" in out) == (method not in ("ft", "split_ft"))
    assert "saved         adapters and tokenizer in" in out
    assert f"in Python     PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('{model_folder}'), '" in out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 4, 0.1)
    assert not list((tmp_path / "out").glob("**/model.safetensors"))
    saved = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    resume = ("--resume_from_checkpoint", tmp_path / "out" / "checkpoint-1")
    assert disc_train(*flags, "--save_steps", 1, *resume) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == saved


def test_adapters_begin_as_the_seed_says(disc_train, tmp_path):
    def saved(folder, *flags):
        assert (
            disc_train("--method", "ft", "--lora_rank", 2, "--max_steps", 1, "--output_dir", tmp_path / folder, *flags)
            == 0
        )
        return (tmp_path / folder / "adapter_model.safetensors").read_bytes()

    assert saved("one") == saved("two") != saved("three", "--seed", 7)


def test_adapters_and_a_teacher_of_its_own(disc_train, capsys):
    assert disc_train("--lora_rank", 2, "--teacher", "copy", "--dry_run") == 0
    assert "teacher       LlamaForCausalLM, 34,720 parameters, 0 trained, float32" in capsys.readouterr().out


@pytest.fixture
def old_documents(tmp_path):
    path = tmp_path / "old.txt"
    path.write_text("An old story that nobody should forget. It is told every winter, by the fire.")
    return path


@pytest.mark.parametrize("flags", [("--method", "ft"), ("--method", "disc"), ("--method", "ft", "--lora_rank", 2)])
@pytest.mark.parametrize("objective", ["method", "kl"])
def test_replay(objective, flags, disc_train, old_documents, capsys):
    replay = ("--replay_file", old_documents, "--replay_share", 0.3, "--replay_objective", objective)
    assert disc_train(*flags, *replay) == 0
    out = capsys.readouterr().out
    how = "by KL to the initial model" if objective == "kl" else "by the method"
    assert (
        f"replay        3 more documents an epoch, 30% of all, drawn anew each time from 1 in {old_documents};" in out
    )
    assert f"trained on {how}" in out
    assert "documents     7 read" in out
    assert "documents     replayed: 1 read" in out
    assert "20 documents in" in out
    assert ("none: nothing is compared" in out) == (objective == "method" and "ft" in flags)


def test_replay_beside_records(disc_train, records, old_documents):
    flags = ("--method", "cd", "--train_file", records(9), "--max_steps", 1)
    assert disc_train(*flags, "--replay_file", old_documents, "--replay_objective", "kl", "--dry_run") == 0
    assert disc_train(*flags, "--replay_file", records(9)) == 0


def test_a_replay_file_that_is_not_there(fails, tmp_path):
    message = fails("--method", "ft", "--replay_file", tmp_path / "none.jsonl")
    assert "--replay_file" in message
    assert "none.jsonl" in message
    assert "train_file" not in message
