"""FSDP2: a model divided over processes is trained, measured, saved and resumed as one in one piece."""

import json
import re

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file

CONFIG = {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}
SHARDED = ("--fsdp", "--fsdp_config", json.dumps(CONFIG))
STEPS = ("--optim", "sgd", "--learning_rate", "0.1", "--max_grad_norm", "0", "--max_steps", 3, "--logging_steps", 1)


def shard_on_the_cpu():
    """accelerate divides models over accelerators only; PyTorch over any devices. So accelerate is told otherwise."""
    real = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        real(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


@pytest.fixture
def train(start, tmp_path):
    """train(name, *flags, world=1): a run in a folder of that name, which is returned; of several processes, sharded.

    What the first process printed is in a file `log` there.
    """

    def run(name, *flags, world=1, saves="no", **options):
        if world > 1:
            flags = (*SHARDED, *flags)
            options.setdefault("prepare", shard_on_the_cpu)
        flags = (*STEPS, "--save_strategy", saves, *flags, "--output_dir", tmp_path / name)
        started = start(*flags, world=world, **options)
        assert set(started.wait()) == {0}, started.logs
        (tmp_path / name / "log").write_text(started.logs[0])
        return tmp_path / name

    return run


def _losses(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def _batch(documents, accumulated=1):
    return "--per_device_train_batch_size", documents, "--gradient_accumulation_steps", accumulated


@pytest.mark.parametrize("tied", [False, True])
def test_the_steps_of_one_process(tied, train, weights, make_model, model_folder):
    """Loss, weights, and the signal before and after."""
    make_model(tie_word_embeddings=tied).save_pretrained(model_folder)
    whole = train("whole", *_batch(4))
    parts = train("parts", *_batch(1, 2), "--gradient_checkpointing", "true", world=2)
    assert (weights(whole) - weights(model_folder)).abs().max() > 1e-3
    assert torch.allclose(weights(parts), weights(whole), rtol=0, atol=1e-6)
    assert _losses(parts) == pytest.approx(_losses(whole), rel=1e-5)
    signals = [
        re.findall(r"signal +([\d.]+) -> ([\d.]+) nats", (folder / "log").read_text()) for folder in (whole, parts)
    ]
    assert signals[0] == signals[1] and len(signals[0]) == 1


def test_sixteen_bits_over_float32_weights(train, weights, model_folder):
    """As far from one process's weights as rounding in other places takes it, and no step is lost to rounding."""
    small = ("--bf16", "true", "--learning_rate", "1e-3")
    whole = train("whole", *_batch(4), *small)
    parts = train("parts", *_batch(2), *small, world=2)
    moved = weights(whole) - weights(model_folder)
    assert (weights(parts) - weights(whole)).norm() < 0.1 * moved.norm()
    assert load_file(parts / "model.safetensors")["lm_head.weight"].dtype == torch.float32
    assert _losses(parts) == pytest.approx(_losses(whole), rel=0.02)


@pytest.mark.parametrize("kept", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_resumed_bit_for_bit(kept, train, weights, make_model, model_folder):
    make_model(attention_dropout=0.2).save_pretrained(model_folder)
    config = json.dumps({**CONFIG, "state_dict_type": kept})
    flags = (*_batch(2), "--fsdp_config", config, "--save_steps", 1, "--optim", "adamw_torch", "--num_train_epochs", 2)
    whole = train("whole", *flags, "--max_steps", -1, world=2, saves="steps")
    last = whole / "checkpoint-3"
    parts = train("parts", *flags, "--max_steps", -1, "--resume_from_checkpoint", last, world=2, saves="steps")
    assert torch.equal(weights(parts), weights(whole))
    assert not torch.equal(weights(parts), weights(model_folder))
