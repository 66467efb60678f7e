"""Bad input is one clear line, and an exit code."""

import json
import re

import pytest
from transformers import AutoModelForCausalLM

from tests.train.commands import error_line
from tests.train.world import make_model


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
    assert "no --text_column 'body'" in fails("--text_column", "body")
    records = tmp_path / "records.jsonl"
    records.write_text('{"teacher_context": "x", "target": "y"}')
    assert "did you mean --method cd?" in fails("--train_file", records)
    records.write_text('{"text": "x"}')
    assert "did you mean --method disc?" in fails("--train_file", records, "--method", "cd")
    (tmp_path / "bad.txt").write_bytes(b"ok \xff")
    assert "bad.txt: not UTF-8" in fails("--train_file", tmp_path / "bad.txt")


def test_a_model_that_is_not_there(fails, tmp_path):
    missing = tmp_path / "none"
    for flag in ("--model_name_or_path", "--teacher_name_or_path"):
        message = f"{flag}: expected a model's folder, or its name on the Hub, got {missing}: there is no such folder"
        assert message in fails(flag, missing)


def test_a_model_that_the_hub_cannot_be_asked_for(fails, monkeypatch):
    """It is asked once, and not for one file after another; a name that the Hub knows is left to transformers."""
    asked = []

    def model_info(self, name, timeout):
        asked.append(name)
        raise ConnectionError("no such host")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    for flag in ("--model_name_or_path", "--teacher_name_or_path"):
        message = f"{flag}: expected .* got nobody/nothing: there is no such folder, and .* out of reach: no such host"
        assert re.search(message, fails(flag, "nobody/nothing"))
    assert asked == ["nobody/nothing"] * 2


def test_a_model_with_damagedweights(fails, model_folder):
    (model_folder / "model.safetensors").write_bytes(b"not this")
    assert f"{model_folder}: the weights cannot be read" in fails()


@pytest.mark.parametrize("role", ["model", "teacher"])
def test_a_model_without_all_of_the_tokenizers_entries(role, fails, tokenizer, tmp_path):
    make_model(vocab_size=200).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    message = fails(f"--{role}_name_or_path", tmp_path / "small")
    assert "small: expected an entry for every token of the documents" in message
    assert "got a vocabulary of 200" in message


def test_a_teacher_with_another_tokenizer(fails, disc_train, tokenizer, tmp_path):
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


def test_more_than_the_models_context(fails):
    assert "--max_document_tokens: expected at most the model's context of 256 tokens, got 257" in fails(
        "--max_document_tokens", 257
    )


def test_more_than_the_teachers_context(fails, tmp_path):
    make_model(max_position_embeddings=100).save_pretrained(tmp_path / "teacher")
    assert "expected at most the teacher's context of 100 tokens, got 101" in fails(
        "--teacher_name_or_path", tmp_path / "teacher", "--max_document_tokens", 101
    )


def test_fewer_documents_than_a_batch_that_may_not_be_smaller(fails, tmp_path):
    flags = ("--dataloader_drop_last", "true", "--per_device_train_batch_size", 8)
    for more in ((), ("--dry_run",)):
        assert "--dataloader_drop_last: expected at least 8 examples" in fails(*flags, *more)
    assert not (tmp_path / "out").exists()


def test_training_that_breaks_down_is_one_line(fails, model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.lm_head.weight.data[0] = float("nan")
    model.save_pretrained(model_folder)
    assert "step 1: the loss is nan on the documents" in fails()


def test_a_hub_that_is_out_of_reach(fails, monkeypatch):
    def whoami(token):
        raise ConnectionError("no such host")

    monkeypatch.setattr("disc_train.run.whoami", whoami)
    assert "--push_to_hub: expected a login to the Hub (hf auth login), got: no such host" in fails("--push_to_hub")


def test_wrong_usage_is_code_2(disc_train, capsys):
    assert disc_train("--tempature", 1) == 2
    assert (
        capsys.readouterr().err.strip()
        == "disc-train: error: unknown argument --tempature; did you mean --temperature?"
    )
    assert disc_train("--method", "sft") == 2


def test_a_file_that_cannot_be_read_while_flags_are_is_code_2(disc_train, capsys, monkeypatch):
    def parse(argv):
        raise PermissionError("no access")

    monkeypatch.setattr("disc_train.sweep.parse_sweep", parse)
    assert disc_train() == 2
    assert error_line(capsys, 2) == "disc-train: error: no access"
