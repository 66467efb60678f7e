"""The code of docs/trainer.md, on a tiny model."""

import re
from pathlib import Path

from safetensors.torch import load_file

from tests.train.files import write_jsonl

PAGE = Path(__file__).parents[3] / "docs" / "trainer.md"


def test_it_runs_as_written(model_folder, sentences, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "news.jsonl", *({"text": " ".join(text)} for text in sentences))
    write_jsonl(tmp_path / "facts.jsonl", {"question": "Where is it?", "choices": ["Merin.", "Here."], "answer": 0})
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert '"Qwen/Qwen2.5-0.5B-Instruct"' in code
    names = {}
    exec(code.replace('"Qwen/Qwen2.5-0.5B-Instruct"', repr(str(model_folder))), names)
    history = names["trainer"].state.log_history
    assert [each["step"] for each in history if "eval_probes_facts_accuracy" in each] == [0, 1, 2]
    assert all(".lora_" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))
