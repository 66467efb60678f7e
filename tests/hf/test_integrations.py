"""The examples of docs/integrations.md run as they are written."""

import re
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.distributed.device_mesh import init_device_mesh
from transformers import Trainer, TrainingArguments

from tests.hf.models import IDS, make, perturbed

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
SECTION = re.compile(r"^## (.*?)\n(?:(?!^## ).)*?```python\n(.*?)```", re.S | re.M)
EXAMPLES = dict(SECTION.findall(PAGE.read_text(encoding="utf-8")))
LIBRARIES = {"DeepSpeed ZeRO-3": "deepspeed", "Lightning": "lightning", "TRL": "trl"}


@pytest.fixture
def names(tmp_path):
    """Hold what the examples are given; some of them need a process group, of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    teacher = make().float()
    labels = IDS.masked_fill(IDS < 6, -100)
    yield {
        "teacher": teacher,
        "student": perturbed(teacher).train(),
        "batches": [{"input_ids": IDS, "labels": labels}] * 2,
        "mesh": init_device_mesh("cpu", (1,)),
        "zero_3": {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 1e-2}},
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_trains(title, names, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    if title in ("DeepSpeed ZeRO-3", "transformers.Trainer"):  # the one needs it, the other uses DDP where it is set
        monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.chdir(tmp_path)  # Lightning writes there
    if title in LIBRARIES:
        pytest.importorskip(LIBRARIES[title])
    student = names["student"]
    before = {name: x.detach().clone() for name, x in student.named_parameters()}
    code = EXAMPLES[title].replace("torch.compile(loss_of, fullgraph=True)", "loss_of")  # test_wrappers.py compiles it
    exec(code.replace('mixed_precision="bf16"', 'mixed_precision="bf16", cpu=True'), names)
    if title == "TRL":  # tests/integrations/test_trl.py trains with them
        assert all(issubclass(names[f"Fused{kind}Trainer"], Trainer) for kind in ("Distillation", "GKD", "SDFT"))
        return
    if title == "transformers.Trainer":
        args = TrainingArguments(tmp_path, max_steps=1, use_cpu=True, report_to="none", bf16=True)
        batch = {name: value[0] for name, value in names["batches"][0].items()}
        names["DistillationTrainer"](student, args, train_dataset=[batch] * 8).train()
    if title in ("peft", "FSDP2", "Liger"):  # no optimizer step
        assert any(x.grad is not None and x.grad.abs().sum() > 0 for x in student.parameters())
    elif title == "DeepSpeed ZeRO-3":  # parameters are in parts
        assert names["loss"].isfinite() and names["engine"].global_steps == 2
    else:
        after = dict(student.named_parameters())
        assert all(not torch.equal(after[name], x) for name, x in before.items() if "norm" not in name)


def test_every_example_is_run():
    assert PAGE.read_text(encoding="utf-8").count("```python") == len(EXAMPLES) == 9
