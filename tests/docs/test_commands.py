"""Check the commands and flags that the pages name, without running them: each flag is there, and they go together."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from disc_train.config import DiscArguments, parse_arguments
from disc_train.evaluation import config as evaluation
from disc_train.generation import config as generation
from disc_train.loop_config import LoopArguments

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
READ = {
    "disc-train": parse_arguments,
    "disc-cache": lambda argv: parse_arguments(argv, "disc-cache"),
    "disc-eval": evaluation.parse_arguments,
    "disc-generate": generation.parse_arguments,
}
SETTINGS = (DiscArguments, LoopArguments, evaluation.EvalArguments, generation.GenerateArguments)
FLAGS = {item.name for arguments in SETTINGS for item in fields(arguments)} | {"help"}
# Of accelerate, torchrun, vLLM and the benchmarks.
OTHERS = {"cpu", "multi_gpu", "nproc_per_node", "shutdown-timeout", "max-logprobs", "opening"}
COMMANDS = [
    re.sub(r"^.*-m disc_train\.cli", "disc-train", line).removeprefix(".venv/bin/")
    for text in TEXTS.values()
    for block in re.findall(r"```bash\n(.*?)```", text, re.S)
    for line in block.replace("\\\n", "").splitlines()
    if re.match(r"(\.venv/bin/)?disc-|.*-m disc_train\.cli", line)
]


@pytest.mark.parametrize("page", TEXTS)
def test_every_flag_is_there(page):
    assert set(re.findall(r"`--([a-z0-9_-]+)", TEXTS[page])) - FLAGS <= OTHERS


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_can_be_given(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "check_installed", lambda *_, **__: None)
    Path("examples").symlink_to(ROOT / "examples")
    Path("config.yaml").write_text("{model_name_or_path: model, train_file: documents.jsonl, output_dir: runs/it}")
    command, *given = shlex.split(line, comments=True)
    if "..." in given:  # what the reader has to fill in
        given = ["config.yaml", *(each for each in given if each != "...")]
    READ[command]([*given, *(["--use_cpu"] if "--bf16" in given else [])])
