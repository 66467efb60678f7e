"""The code of README and quick starts runs as it is written, but for fewer documents and steps."""

import http.server
import json
import re
import shlex
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from disc_train import cli

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "quickstarts.md"
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.S | re.M))
COMMANDS = {"disc-train": cli.main, "disc-eval": cli.evaluate, "disc-cache": cli.cache}


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with the model, and fewer documents than there are."""
    tiny = tmp_path / "examples" / "tiny"
    tiny.mkdir(parents=True)
    (tiny / "model").symlink_to(ROOT / "examples" / "tiny" / "model")
    documents = (ROOT / "examples" / "tiny" / "documents.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tiny / "documents.jsonl").write_text("".join(documents[:3]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(title, language):
    """Run a section's blocks of a language, one after another."""
    names = {}
    for block in re.findall(rf"```{language}\n(.*?)```", SECTIONS[title], re.S):
        if language == "python":
            exec(block, names)
            continue
        for line in block.replace("\\\n", "").replace("--max_steps 20", "--max_steps 2").splitlines():
            command, *arguments = shlex.split(line)
            assert COMMANDS[command](arguments) == 0
    return names


def losses(capsys):
    return [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]


def test_a_trainer(clone, capsys):
    run("I have a trainer", "python")
    found = losses(capsys)
    assert len(found) == 10 and found[-1] < 0.7 * found[0]


def test_the_loss_in_the_readme(clone):
    models = [AutoModelForCausalLM.from_pretrained("examples/tiny/model") for _ in range(2)]
    names = {"teacher": models[0], "student": models[1], "T": 2.0}
    names |= {"prefix_ids": torch.tensor([[5, 6, 7, 8]]), "suffix_ids": torch.tensor([[9, 10, 11]])}
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    exec(block, names)
    with torch.no_grad():
        teacher = models[0](torch.tensor([[5, 6, 7, 8, 9, 10, 11]])).logits[0, 4:6]
        student = models[1](torch.tensor([[9, 10, 11]])).logits[0, :2]
    teacher, student = ((logits / 2).log_softmax(-1) for logits in (teacher, student))
    expected = 4 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    torch.testing.assert_close(names["loss"].detach(), expected)
    assert models[1].lm_head.weight.grad.abs().sum() > 0


def test_documents(clone):
    run("I have documents", "bash")
    assert (clone / "runs/documents/model.safetensors").is_file()
    assert "examples/tiny/model" in (clone / "runs/documents-eval/evaluation.md").read_text()


def test_a_cache(clone):
    run("I want to cache a teacher", "bash")
    assert (clone / "cache/documents/cache.json").is_file() and (clone / "runs/cached/model.safetensors").is_file()
    names = run("I want to cache a teacher", "python")
    assert names["loss"] > 0.01
    assert names["model"].model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


class Server(http.server.BaseHTTPRequestHandler):
    """Answer as vLLM does: log-probabilities of the prompt's tokens, the likeliest and the one that was there."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["max_tokens"] == 1
        tokens = asked["prompt"]
        with torch.no_grad():
            logprobs = AutoModelForCausalLM.from_pretrained(asked["model"])(torch.tensor([tokens])).logits[0]
        said = [None]
        for row, token in zip(logprobs.log_softmax(-1)[:-1], tokens[1:], strict=True):
            named = dict.fromkeys([token, *row.topk(asked["prompt_logprobs"]).indices.tolist()])
            said.append({str(each): {"logprob": float(row[each]), "decoded_token": "?"} for each in named})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"text": "?", "prompt_logprobs": said}]}).encode())

    def log_message(self, *_):
        pass


def test_a_vllm_teacher(clone, capsys, monkeypatch):
    with http.server.HTTPServer(("localhost", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        title = "I have a vLLM teacher"
        monkeypatch.setitem(SECTIONS, title, SECTIONS[title].replace(":8000", f":{server.server_port}"))
        run(title, "python")
        server.shutdown()
    found = losses(capsys)
    assert len(found) == 10 and found[-1] < 0.7 * found[0]


def test_half_of_an_update(clone):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), re.S)
    before = AutoModelForCausalLM.from_pretrained("examples/tiny/model", dtype=torch.float32)
    trained = AutoModelForCausalLM.from_pretrained("examples/tiny/model", dtype=torch.float32)
    with torch.no_grad():
        trained.lm_head.weight.add_(1.0)
    trained.save_pretrained("runs/trained")
    AutoTokenizer.from_pretrained("examples/tiny/model").save_pretrained("runs/trained")
    exec(block, {})
    after = AutoModelForCausalLM.from_pretrained("runs/half").lm_head.weight
    torch.testing.assert_close(after, before.lm_head.weight + 0.5)
    assert AutoTokenizer.from_pretrained("runs/half").vocab_size > 0
