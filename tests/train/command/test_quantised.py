"""Adapters beside quantised weights."""

import json
from importlib.util import find_spec

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from disc_train.models.causal_lm import load_model
from disc_train.parallel.sharding import shard
from tests.train.world import make_model

BITSANDBYTES = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs bitsandbytes")
TORCHAO = pytest.mark.skipif(not find_spec("torchao"), reason="needs torchao")


class RoundedLinear(nn.Linear):
    """A linear layer whose weight is 8-bit integers, in 32nds, which can take no gradient."""

    def forward(self, hidden):
        return nn.functional.linear(hidden, self.weight.to(hidden.dtype) / 32, self.bias)


@register_quantization_config("rounded")
class RoundedConfig(QuantizationConfigMixin):
    def __init__(self, **_):
        self.quant_method = "rounded"


@register_quantizer("rounded")
class RoundedQuantizer(HfQuantizer):
    """Rounds what was loaded; the head stays, as in all quantisers of transformers."""

    requires_calibration = False
    is_trainable = True

    def is_serializable(self, **_):
        return True

    def _process_model_before_weight_loading(self, model, **_):
        pass

    def _process_model_after_weight_loading(self, model, **_):
        for module in model.model.modules():
            if isinstance(module, nn.Linear):
                module.__class__ = RoundedLinear
                module.weight = nn.Parameter((module.weight * 32).round().to(torch.int8), requires_grad=False)


def _name_the_quantiser(folder):
    """Makes a saved model one that is quantised."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "rounded"}
    (folder / "config.json").write_text(json.dumps(config))


def _trained(folder):
    saved = load_file(folder / "adapter_model.safetensors")
    assert all(".lora_" in name for name in saved)
    return any(value.abs().max() > 0 for name, value in saved.items() if "lora_B" in name)


def test_a_quantised_model_is_its_adapters_teacher(disc_train, model_folder, tmp_path, capsys):
    _name_the_quantiser(model_folder)
    assert disc_train("--lora_rank", 2, "--save_steps", 1, "--max_steps", 2, "--gradient_checkpointing", "true") == 0
    out = capsys.readouterr().out
    assert "trained, in adapters, float32, the rest quantised (rounded)" in out
    assert "teacher       the student without its adapters" in out
    assert _trained(tmp_path / "out") and _trained(tmp_path / "out" / "checkpoint-1")


def test_quantised_weights_themselves_cannot_be_trained(fails, model_folder):
    _name_the_quantiser(model_folder)
    message = "--model_name_or_path: expected weights that can be trained, got some that are quantised (rounded)"
    assert message in fails()


def test_quantised_weights_are_not_divided(model_folder):
    _name_the_quantiser(model_folder)
    model = load_model(model_folder, torch.float32)
    with pytest.raises(ValueError, match=r"--fsdp: expected weights that can be divided .* quantised \(rounded\)"):
        shard(model, Accelerator(cpu=True), trained=True)


@pytest.mark.parametrize(
    ("bits", "by"),
    [
        *(pytest.param(bits, "bitsandbytes", marks=BITSANDBYTES) for bits in (4, 8)),
        pytest.param(8, "torchao", marks=TORCHAO),
    ],
)
def test_weights_that_are_quantised_when_they_are_loaded(
    bits, by, disc_train, model_folder, tmp_path, capsys, monkeypatch
):
    if by == "torchao":
        monkeypatch.setattr("disc_train.models.pretrained.find_spec", lambda name: name == "torchao")
    model = make_model(hidden_size=64)
    model.save_pretrained(model_folder)
    flags = ("--lora_rank", 2, f"--load_in_{bits}bit", "--save_steps", 1, "--max_steps", 2)
    assert disc_train(*flags) == 0
    out = capsys.readouterr().out
    assert f"float32, the rest quantised ({by})" in out
    assert _trained(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "whole")
    assert disc_train(*flags, "--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-1") == 0
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--load_in_4bit",), "--load_in_4bit needs --lora_rank, got it without"),
        (("--lora_rank", 2, "--load_in_4bit", "--load_in_8bit"), "expected one of --load_in_4bit and --load_in_8bit"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, disc_train, capsys):
    assert disc_train(*flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "needed"),
    [
        (("--lora_rank", 2), "--lora_rank needs peft: pip install 'disc-kernels[train]'"),
        (
            ("--lora_rank", 2, "--load_in_8bit"),
            "--load_in_8bit needs bitsandbytes or torchao: pip install",
        ),
        (("--lora_rank", 2, "--load_in_4bit"), "--load_in_4bit needs bitsandbytes: pip install bitsandbytes"),
        (("--use_liger_kernel",), "--use_liger_kernel needs liger_kernel: pip install liger-kernel"),
        (("--optim", "lomo"), "--optim lomo: You need to install `lomo_optim`"),
        (
            ("--optim", "adamw_anyprecision"),
            "--optim adamw_anyprecision: Please install https://github.com/pytorch/tor",
        ),
    ],
)
def test_packages_are_missed_before_anything_is_read(flags, needed, disc_train, monkeypatch, capsys):
    """With code 2, which the commands end with before they read a file."""
    installed = {"peft"} if len(flags) == 3 else set()
    monkeypatch.setattr("disc_train.flags.find_spec", lambda name: name in installed)
    assert disc_train(*flags) == 2
    assert needed in capsys.readouterr().err
