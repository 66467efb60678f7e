"""The command: what it prints and saves, its exit codes, and bad input in one clear line."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Lfm2Config, Lfm2ForCausalLM

from disc_train import attention
from disc_train.cli import main


@pytest.fixture
def disc_train(model_folder, write_documents, sentences, tmp_path):
    """disc_train(*flags, documents=texts): the exit code of a quick run on seven documents by default."""

    def run(*flags, documents=None):
        texts = [" ".join(text) for text in sentences] if documents is None else documents
        return main(
            [
                *("--model_name_or_path", str(model_folder)),
                *("--train_file", str(write_documents(texts))),
                *("--output_dir", str(tmp_path / "out")),
                *("--per_device_train_batch_size", "4"),
                *("--num_train_epochs", "2"),
                *("--learning_rate", "1e-3"),
                *("--use_cpu", "true"),
                *map(str, flags),
            ]
        )

    return run


@pytest.fixture
def fails(disc_train, capsys):
    """fails(*flags, documents=texts): the one line on stderr of a run that must end with code 1."""

    def run(*flags, documents=None):
        status = disc_train(*flags, documents=documents)
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if "disc-train: error" in line]
        assert status == 1
        assert len(errors) == 1
        assert "Traceback" not in captured.err
        return errors[0]

    return run


def _weights(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_run_says_what_it_will_do_and_what_came_of_it(disc_train, capsys, tmp_path, model_folder, sentences):
    texts = [" ".join(text) for text in sentences]
    assert disc_train("--max_document_tokens", 80, documents=[*texts, "", "One sentence."]) == 0
    out = capsys.readouterr().out
    before, after = out.split("What came of it")
    for expected in (
        "9 read, 7 to train on; 1 empty, 1 too short to split into a prefix and a suffix",
        "; 6 cut to 80 tokens (",
        "an epoch, by sentence_boundary",
        "LlamaForCausalLM, 34,720 parameters, 34,720 trained, float32",
        "LlamaForCausalLM, 34,720 parameters, 0 trained, float32",
        "attention     sdpa",
        "4 of up to 4 documents; 2 an epoch",
        "(7 measured)",
    ):
        assert expected in before
    for expected in (
        "4; 14 documents in",
        "loss          0.",
        "nats a token on the same documents",
        str(tmp_path / "out"),
    ):
        assert expected in after
    assert not torch.equal(_weights(tmp_path / "out"), _weights(model_folder))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("river") == AutoTokenizer.from_pretrained(
        model_folder
    ).encode("river")
    assert (tmp_path / "out" / "trainer_state.json").exists()


def test_a_run_with_templates(disc_train, capsys):
    templates = ("--teacher_template", "News: {{ prefix }} Go on:", "--student_template", "News: ")
    assert disc_train(*templates, "--max_steps", 1) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"templates +teacher: \d+ tokens before a document and \d+ after a prefix; student: \d+ before", out
    )
    assert " 0 that begin a suffix" in out


def test_templates_that_are_wrong(fails, disc_train, capsys):
    assert "--teacher_template: expected a template that writes" in fails("--teacher_template", "Read this.")
    assert "--student_template: cannot render" in fails("--student_template", "{{ prefix }}")
    assert "of 256 tokens, less 300 of the templates, got -44" in fails("--student_template", "~" * 300)
    flags = ("--max_document_tokens", 256, "--student_template", "~~")
    assert "of 256 tokens, less 2 of the templates, got 256" in fails(*flags)


@pytest.fixture
def records(tmp_path):
    """records(number, **last): a file of records with one instruction for the teacher; `last` changes the last one."""

    def write(number, **last):
        answers = [f"The bridge number {i} opened in the spring." for i in range(number)]
        lines = [
            {"teacher_context": "Say when. " * 20, "student_context": "Well: ", "target": text} for text in answers
        ]
        lines[-1] |= last
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return path

    return write


def test_records_with_contexts(disc_train, records, capsys, model_folder, tmp_path):
    path = records(9, teacher_context="Another context of the teacher: ")
    assert disc_train("--method", "cd", "--train_file", path, "--per_device_train_batch_size", 9) == 0
    out = capsys.readouterr().out
    for expected in (
        "records       9 read, all to train on",
        "(2 different)",
        "(1 different)",
        "of up to 9 records; 1 an epoch",
        "(9 measured)",
        "18 records in",
        "nats a token on the same records",
    ):
        assert expected in out
    assert float(re.search(r"([\d.]+)x fewer than in a pass for every target", out)[1]) > 1.5
    assert not torch.equal(_weights(tmp_path / "out"), _weights(model_folder))


def test_bad_records_are_named(fails, records):
    def message(**last):
        return fails("--method", "cd", "--train_file", records(3, **last))

    assert "records.jsonl:3: expected a target that is not empty" in message(target="")
    assert "records.jsonl:3: expected a context and a target of at most 256 tokens together" in message(
        target="~" * 300
    )
    assert "records.jsonl:3: 'target' must be a string or a list of messages, got int" in message(target=3)


@pytest.mark.parametrize(
    ("flags", "formula"),
    [
        (("--method", "ft"), "ft: cross-entropy\n"),
        (("--method", "ft_kl", "--kl_weight", 0.5), "ft_kl: cross-entropy + 0.5 KL(initial model || student)\n"),
        (("--method", "talr"), "talr: cross-entropy with weights max(p^(1/tau), 0.01)\n"),
        (("--ce_weight", 0.1), "disc: T^2 KL(teacher || student) at T = 2 + 0.1 cross-entropy\n"),
    ],
)
def test_every_method(flags, formula, disc_train, capsys, tmp_path, model_folder, sentences):
    texts = [" ".join(text) for text in sentences]
    assert disc_train(*flags, documents=[*texts, "", "x"]) == 0
    out = capsys.readouterr().out
    assert f"method        {formula}" in out
    if flags[0] == "--method":
        assert re.search(
            r"9 read, 7 to train on; 2 of fewer than 2 tokens \(\S+\.jsonl:8, \S+\.jsonl:9\); 0 cut\n", out
        )
        assert "signal" not in out
        assert ("teacher       none: nothing is compared" in out) == ("ft_kl" not in flags)
        assert "fewer than in a pass" not in out  # a document is one pass
        assert ("the student reads" in out) == ("ft_kl" not in flags)
    first, last = map(float, re.search(r"loss +([\d.]+) -> ([\d.]+), ", out).groups())
    assert last < first
    assert not torch.equal(_weights(tmp_path / "out"), _weights(model_folder))


def test_nothing_long_enough_to_finetune_on(fails):
    message = fails("--method", "ft", documents=["x", ""])
    assert "expected a document of at least 2 tokens, got 2 shorter ones" in message


@pytest.mark.parametrize("method", ["disc", "ft", "cd"])
def test_adapters(method, disc_train, records, capsys, tmp_path, model_folder):
    data = ("--train_file", records(9)) if method == "cd" else ()
    flags = ("--method", method, *data, "--lora_rank", 2, "--learning_rate", 1e-2)
    assert disc_train(*flags, "--save_steps", 1) == 0
    out = capsys.readouterr().out
    # Of two layers' four attention and three other matrices: what each reads and writes, twice the rank.
    trained = 2 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert f"{trained:,} trained, in adapters, float32" in out
    assert ("teacher       the student without its adapters" in out) == (method != "ft")
    assert "saved         adapters and tokenizer in" in out
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
    assert "none.jsonl" in fails("--method", "ft", "--replay_file", tmp_path / "none.jsonl")


def test_a_model_that_cannot_share_a_trunk(disc_train, model_folder, capsys):
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        layer_types=["conv", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    Lfm2ForCausalLM(config).save_pretrained(model_folder)
    assert disc_train("--max_steps", 1, "--teacher_template", "{{ prefix }} Go on:") == 0
    out = capsys.readouterr().out
    assert "its layers do not let branches share a trunk, so every sequence has a padded row" in out
    rows = re.search(r"in (\S+) rows of the teacher and (\S+) of the student", out)
    assert min(map(float, rows.groups())) > 8


def test_the_logs_say_how_well_batches_are_packed(disc_train, tmp_path):
    assert disc_train("--logging_steps", 1) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    logs = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(logs) == 4
    for entry in logs:
        assert 0.5 < entry["packing_efficiency"] <= 1
        assert entry["packing_saving"] > 1.2


def test_models_are_prepared_once(disc_train, capsys, monkeypatch):
    """Which runs each of them several times."""
    prepared, use_attention = [], attention.use_attention

    def counted(model, *rest):
        prepared.append(model)
        return use_attention(model, *rest)

    monkeypatch.setattr(attention, "use_attention", counted)
    assert disc_train("--max_steps", 1) == 0
    assert len(prepared) == len({id(model) for model in prepared}) == 2
    assert "attention     sdpa (flex trains on CUDA only)\n" in capsys.readouterr().out


def test_a_dry_run_stops_after_the_summary(disc_train, capsys, tmp_path):
    assert disc_train("--dry_run") == 0
    out = capsys.readouterr().out
    assert "signal" in out
    assert "What came of it" not in out
    assert not (tmp_path / "out").exists()


def test_interrupted_and_resumed_through_the_command_line(disc_train, tmp_path, capsys):
    assert disc_train("--output_dir", tmp_path / "whole", "--save_steps", 1) == 0
    (tmp_path / "out").mkdir()
    (tmp_path / "whole" / "checkpoint-1").rename(tmp_path / "out" / "checkpoint-1")
    assert disc_train("--save_steps", 1) == 1
    assert "already holds a run: continue it with --resume_from_checkpoint" in capsys.readouterr().err
    assert disc_train("--save_steps", 1, "--resume_from_checkpoint", "true") == 0
    assert torch.equal(_weights(tmp_path / "out"), _weights(tmp_path / "whole"))


def test_true_in_yaml_resumes_from_the_last_checkpoint_that_is_complete(disc_train, tmp_path, capsys):
    assert disc_train("--save_steps", 1) == 0
    (tmp_path / "out" / "checkpoint-99").mkdir()  # the machine went down while it was written
    # YAML's true is read as Python's True.
    assert disc_train("--save_steps", 1, "--resume_from_checkpoint", "True", "--num_train_epochs", 3) == 0
    assert "steps         6; 7 documents" in capsys.readouterr().out


def test_resuming_a_finished_run_trains_nothing(disc_train, tmp_path, capsys):
    assert disc_train("--save_steps", 1, "--max_steps", 1) == 0
    before = _weights(tmp_path / "out").clone()
    capsys.readouterr()
    assert disc_train("--save_steps", 1, "--max_steps", 1, "--resume_from_checkpoint", "true") == 0
    assert capsys.readouterr().out.startswith("Nothing is left to train\n  saved         behind all 1 steps, in ")
    assert torch.equal(_weights(tmp_path / "out"), before)


def test_interrupted_from_the_keyboard(disc_train, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("disc_train.trainer.DiscTrainer.training_step", interrupt)
    assert disc_train() == 130
    assert "disc-train: error: interrupted\n" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_one(fails, tmp_path):
    (tmp_path / "file").touch()
    assert "--output_dir: expected a folder that can be written to" in fails("--output_dir", tmp_path / "file" / "out")


def test_a_folder_with_a_model_is_not_written_over(fails, model_folder):
    before = _weights(model_folder)
    assert "already holds a model" in fails("--output_dir", model_folder)
    assert torch.equal(_weights(model_folder), before)


def test_nothing_to_resume_from(fails, tmp_path):
    assert f"({tmp_path / 'out'}), got nowhere, which has none" in fails("--resume_from_checkpoint", "nowhere")


def test_the_flag_to_resume_can_always_be_given(disc_train, fails, model_folder, tmp_path):
    """A scheduler that starts a run again does not know whether it had saved anything."""
    flags = ("--resume_from_checkpoint", "true", "--save_strategy", "no")
    assert disc_train(*flags) == 0
    assert not torch.equal(_weights(tmp_path / "out"), _weights(model_folder))
    assert "already holds a model" in fails(*flags)


def test_a_run_that_was_stopped_before_it_saved_its_model_saves_it(disc_train, tmp_path, capsys):
    flags = ("--save_steps", 1, "--max_steps", 1, "--resume_from_checkpoint", "true")
    assert disc_train(*flags) == 0
    weights = _weights(tmp_path / "out").clone()
    for name in ("trainer_state.json", "model.safetensors"):
        (tmp_path / "out" / name).unlink()
    capsys.readouterr()
    assert disc_train(*flags) == 0
    assert "  steps         1\n" in capsys.readouterr().out
    assert torch.equal(_weights(tmp_path / "out"), weights)
    assert disc_train(*flags) == 0
    assert "Nothing is left to train" in capsys.readouterr().out


def test_a_longer_run_that_was_stopped_before_it_saved_its_model_saves_it(disc_train, tmp_path):
    """The model that is there is of fewer steps."""
    flags = ("--save_steps", 1, "--lr_scheduler_type", "constant", "--resume_from_checkpoint", "true")
    assert disc_train(*flags, "--max_steps", 2) == 0
    longer = _weights(tmp_path / "out").clone()
    shutil.rmtree(tmp_path / "out")
    assert disc_train(*flags, "--max_steps", 1) == 0
    state, model = (tmp_path / "out" / name for name in ("trainer_state.json", "model.safetensors"))
    of_one_step = {path: path.read_bytes() for path in (state, model)}
    assert disc_train(*flags, "--max_steps", 2) == 0
    for path, content in of_one_step.items():
        path.write_bytes(content)
    assert disc_train(*flags, "--max_steps", 2) == 0
    assert torch.equal(_weights(tmp_path / "out"), longer)


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


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "documents.jsonl: no documents in this file"),
        (["One sentence.", "Another sentence."], "2 documents that are all too short"),
        (["", " "], "no text in any of its 2 documents"),
    ],
)
def test_data_without_anything_to_train_on(documents, message, fails):
    assert message in fails(documents=documents)


def test_files_that_cannot_be_read(fails, tmp_path):
    assert "does not exist" in fails("--train_file", tmp_path / "none.jsonl")
    assert "no text_column 'body'" in fails("--text_column", "body")
    (tmp_path / "bad.txt").write_bytes(b"ok \xff")
    assert "bad.txt: not UTF-8" in fails("--train_file", tmp_path / "bad.txt")


def test_a_model_that_is_not_there(fails, tmp_path):
    missing = tmp_path / "none"
    for flag in ("--model_name_or_path", "--teacher_name_or_path"):
        assert f"expected a model's folder, or its name on the Hub, got {missing}: " in fails(flag, missing)


def test_a_model_with_damaged_weights(fails, model_folder):
    (model_folder / "model.safetensors").write_bytes(b"not this")
    assert f"{model_folder}: the weights cannot be read" in fails()


@pytest.mark.parametrize("role", ["model", "teacher"])
def test_a_model_without_all_of_the_tokenizers_entries(role, fails, make_model, tokenizer, tmp_path):
    make_model(vocab_size=200).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    message = fails(f"--{role}_name_or_path", tmp_path / "small")
    assert "small: expected an entry for every token of the documents" in message
    assert "got a vocabulary of 200" in message


def test_a_teacher_with_another_tokenizer(fails, disc_train, make_model, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path / "teacher")
    assert disc_train("--teacher_name_or_path", tmp_path / "teacher", "--dry_run") == 0  # weights alone
    tokenizer.save_pretrained(tmp_path / "teacher")
    path = tmp_path / "teacher" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    path.write_text(json.dumps(content))
    assert "--teacher_name_or_path: expected a teacher with the student's tokenizer" in fails(
        "--teacher_name_or_path", tmp_path / "teacher"
    )


def test_nothing_at_all_to_learn(disc_train, model_folder, capsys):
    """The same prediction whatever the model reads: no signal, so no share of it."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.lm_head.weight.data.zero_()
    model.save_pretrained(model_folder)
    assert disc_train() == 0
    assert "signal        0.0000 -> 0.0000 nats a token on the same documents\n" in capsys.readouterr().out


def test_more_than_the_models_context(fails):
    assert "--max_document_tokens: expected at most the model's context of 256 tokens, got 257" in fails(
        "--max_document_tokens", 257
    )


def test_more_than_the_teachers_context(fails, make_model, tmp_path):
    make_model(max_position_embeddings=100).save_pretrained(tmp_path / "teacher")
    assert "expected at most the teacher's context of 100 tokens, got 101" in fails(
        "--teacher_name_or_path", tmp_path / "teacher", "--max_document_tokens", 101
    )


def test_longrope_ends_at_the_original_context(disc_train, make_model, model_folder, capsys):
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64} | factors
    make_model(rope_parameters=rope).save_pretrained(model_folder)
    assert disc_train("--dry_run") == 0
    out = capsys.readouterr().out
    assert " cut to 64 tokens" in out
    assert "context       64 tokens (its original context: beyond it, longrope positions depend" in out
    assert disc_train("--max_document_tokens", 65) == 1
    assert "context of 64 tokens (its original context: beyond it, longrope" in capsys.readouterr().err


def test_fewer_documents_than_a_batch_that_may_not_be_smaller(fails, tmp_path):
    flags = ("--dataloader_drop_last", "true", "--per_device_train_batch_size", 8)
    for more in ((), ("--dry_run",)):
        assert "--dataloader_drop_last: expected at least 8 examples" in fails(*flags, *more)
    assert not (tmp_path / "out").exists()


def test_a_long_document_is_cut_and_counted(disc_train, capsys, sentences):
    long = " ".join(" ".join(text) for text in sentences)
    assert disc_train("--dry_run", documents=[long]) == 0
    assert "1 cut to 256 tokens" in capsys.readouterr().out


def test_training_that_breaks_down_is_one_line(fails, model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.lm_head.weight.data[0] = float("nan")
    model.save_pretrained(model_folder)
    assert "step 1: the loss is nan on the documents" in fails()


def test_wrong_usage_is_code_2(disc_train, capsys):
    assert disc_train("--tempature", 1) == 2
    assert (
        capsys.readouterr().err.strip() == "disc-train: error: unknown argument --tempature; did you mean temperature?"
    )
    assert disc_train("--method", "sft") == 2


def test_a_yaml_file_alone(model_folder, write_documents, sentences, tmp_path, capsys):
    config = {
        "model_name_or_path": str(model_folder),
        "train_file": str(write_documents(" ".join(text) for text in sentences)),
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "dry_run": True,
        "learning_rate": "3e-4",
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))  # JSON is YAML
    assert main([str(tmp_path / "run.yaml")]) == 0
    assert "What will run" in capsys.readouterr().out


def test_help_and_a_light_import():
    code = "import sys, disc_train.cli; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False"] * 2
    shown = subprocess.run([sys.executable, "-m", "disc_train.cli", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "usage: disc-train [CONFIG.yaml] [--flag value ...]" in shown.stdout
    assert "--sentence_tokenization" in shown.stdout
