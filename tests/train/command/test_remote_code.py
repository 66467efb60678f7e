"""Models that bring code of their own."""

import json
import re

import pytest

from disc_train.cli import evaluate, generate
from tests.train.commands import error_line
from tests.train.files import write_jsonl

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_model(model_folder):
    """The tiny Llama, as a model that transformers does not know."""
    (model_folder / "own.py").write_text(CODE)
    config = json.loads((model_folder / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (model_folder / "config.json").write_text(json.dumps(config))
    return model_folder


REFUSED = "it brings code of its own, which only --trust_remote_code true runs: read it first"


def test_their_code_runs_if_it_is_trusted(own_model, disc_train, fails, tmp_path, capsys):
    assert REFUSED in fails("--max_steps", 1)
    trusted = ("--trust_remote_code", "true")
    assert disc_train("--max_steps", 1, *trusted) == 0
    out = capsys.readouterr().out
    assert "student       OwnForCausalLM" in out
    assert re.search("disc-eval .* --trust_remote_code ", out)
    text = write_jsonl(tmp_path / "texts.jsonl", {"text": "It opened in the spring."})
    of_model = ("--model_name_or_path", own_model, "--use_cpu")
    measured = [*map(str, (*of_model, "--texts_file", text, "--output_dir", tmp_path / "measured"))]
    assert REFUSED in error_line(capsys, evaluate(measured))
    generated = (*of_model, "--train_file", text, "--output_file", tmp_path / "generated.jsonl", "--max_new_tokens", 2)
    assert REFUSED in error_line(capsys, generate([*map(str, generated)]))
    assert generate([*map(str, generated), *trusted]) == 0
