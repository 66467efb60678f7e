"""What a run prints and saves."""

import json
import logging
import re
import shlex
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Lfm2Config, Lfm2ForCausalLM

from disc_train import progress
from disc_train.cli import evaluate, main
from disc_train.models import attention
from tests.train.runs import weights
from tests.train.world import make_model


def test_a_run_says_what_it_will_do_and_what_came_of_it(disc_train, capsys, tmp_path, model_folder, sentences):
    texts = [" ".join(text) for text in sentences]
    limit = ("--max_document_tokens", 80, "--long_documents", "cut")
    assert disc_train(*limit, documents=[*texts, "", "One sentence."]) == 0
    out = capsys.readouterr().out
    before, after = out.split("What came of it")
    for expected in (
        "9 read, 7 used; 1 empty (the first: ",
        "documents.jsonl:8), 1 too short to split into a prefix and a suffix",
        "; 6 cut to 80 tokens (",
        "a pass, by sentence_boundary",
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
        f"next          disc-eval --model_name_or_path {tmp_path}/out --reference_name_or_path {model_folder}",
    ):
        assert expected in after
    command = re.search(r"next +disc-eval (.*)\n", after)[1]
    assert evaluate([*shlex.split(command), "--add_bos", "false"]) == 0
    assert not torch.equal(weights(tmp_path / "out"), weights(model_folder))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("river") == AutoTokenizer.from_pretrained(
        model_folder
    ).encode("river")
    assert (tmp_path / "out" / "trainer_state.json").exists()


def test_a_run_with_templates(disc_train, capsys):
    templates = ("--teacher_template", "News: {{ prefix }} Go on:", "--student_template", "News: ")
    assert disc_train(*templates, "--max_steps", 1) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"templates +teacher: \d+ tokens before a document and \d+ after a prefix; student: \d+ tokens before", out
    )
    assert " 0 that begin a suffix" in out


def test_templates_that_are_wrong(fails, disc_train, capsys):
    assert "--teacher_template: expected a template that writes" in fails("--teacher_template", "Read this.")
    assert "--student_template: cannot render" in fails("--student_template", "{{ prefix }}")
    assert "of 256 tokens, less 300 of the templates, got -44" in fails("--student_template", "~" * 300)
    flags = ("--max_document_tokens", 256, "--student_template", "~~")
    assert "of 256 tokens, less 2 of the templates, got 256" in fails(*flags)


def test_records_with_contexts(disc_train, records, capsys, model_folder, tmp_path):
    path = records(9, teacher_context="Another context of the teacher: ")
    assert disc_train("--method", "cd", "--train_file", path, "--per_device_train_batch_size", 9) == 0
    out = capsys.readouterr().out
    for expected in (
        "records       9 read, all used",
        "(2 different)",
        "(1 different)",
        "of up to 9 records; 1 an epoch",
        "(9 measured)",
        "18 records in",
        "nats a token on the same records",
        f"disc-eval --model_name_or_path {tmp_path}/out --output_dir {tmp_path}/out/evaluation --use_cpu\n",
        "--texts_file (what it is to read) or --probes_file",
    ):
        assert expected in out
    assert float(re.search(r"([\d.]+)x fewer than in a pass for every target", out)[1]) > 1.5
    assert not torch.equal(weights(tmp_path / "out"), weights(model_folder))


def test_bad_records_are_named(fails, records):
    def message(**last):
        return fails("--method", "cd", "--train_file", records(3, **last))

    assert "records.jsonl:3: expected a target that is not empty" in message(target="")
    assert "records.jsonl:3: expected a context and a target of at most 256 tokens together" in message(
        target="~" * 300
    )
    assert "records.jsonl:3: 'target' must be a string or a list of messages, got int" in message(target=3)


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


def test_piped_output_is_plain_lines(disc_train, capsys, caplog, monkeypatch, model_folder):
    """Also of a run that goes on with a model whose head is its embeddings, and so not saved."""
    monkeypatch.setattr(progress, "DELAY", 0.0)
    logger = logging.getLogger("transformers")  # its own handler has kept the stream that was there at import
    logger.addHandler(caplog.handler)
    make_model("qwen2").save_pretrained(model_folder)
    capsys.readouterr()
    try:
        for steps in (1, 2):
            flags = ("--save_steps", 1, "--max_steps", steps, "--resume_from_checkpoint", "true")
            assert disc_train(*flags, "--signal_examples", 3) == 0
    finally:
        logger.removeHandler(caplog.handler)
    out, err = capsys.readouterr()
    assert "examples whose signal is measured: 3 of 3 in " in err
    assert "(3 measured)" in out
    assert "'loss': " in out
    assert not re.search(r"\r|Loading weights", out + err)
    assert "lm_head" not in caplog.text


def test_the_signal_is_skipped_on_request(disc_train, capsys, monkeypatch):
    monkeypatch.setattr("disc_train.run.measure_signal", None)
    assert disc_train("--dry_run", "--signal_examples", 0) == 0
    assert "signal" not in capsys.readouterr().out


def test_a_dry_run_stops_after_the_summary(disc_train, capsys, tmp_path):
    assert disc_train("--dry_run") == 0
    out = capsys.readouterr().out
    assert "signal" in out
    assert "What came of it" not in out
    assert not (tmp_path / "out").exists()


def test_interrupted_from_the_keyboard(disc_train, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("disc_train.trainer.DiscTrainer.training_step", interrupt)
    assert disc_train() == 130
    assert "disc-train: error: interrupted\n" in capsys.readouterr().err
    monkeypatch.setattr("disc_train.config.parse_arguments", interrupt)  # while it imports, or reads its flags
    assert disc_train() == 130
    assert capsys.readouterr().err == "disc-train: error: interrupted\n"


def test_nothing_at_all_to_learn(disc_train, model_folder, capsys):
    """The same prediction whatever the model reads: no signal, so no share of it."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.lm_head.weight.data.zero_()
    model.save_pretrained(model_folder)
    assert disc_train() == 0
    assert "signal        0.0000 -> 0.0000 nats a token on the same documents\n" in capsys.readouterr().out


def test_longrope_ends_at_the_original_context(disc_train, model_folder, capsys):
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64} | factors
    make_model(rope_parameters=rope).save_pretrained(model_folder)
    assert disc_train("--dry_run", "--long_documents", "cut") == 0
    out = capsys.readouterr().out
    assert " cut to 64 tokens" in out
    assert "context       64 tokens (its original context: beyond it, longrope positions depend" in out
    assert disc_train("--max_document_tokens", 65) == 1
    assert "context of 64 tokens (its original context: beyond it, longrope" in capsys.readouterr().err


def test_a_long_document_is_cut_and_counted(disc_train, capsys, sentences):
    long = " ".join(" ".join(text) for text in sentences)
    assert disc_train("--dry_run", "--long_documents", "cut", documents=[long]) == 0
    assert "1 cut to 256 tokens" in capsys.readouterr().out


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


def test_help_and_a_light_import(capsys):
    code = "import sys, disc_train.cli; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False"] * 2
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "usage: disc-train [CONFIG.yaml] [--flag value ...]" in shown
    assert "--sentence_tokenization" in shown
