"""FSDP2: a model divided over processes is trained, measured, saved and resumed as one in one piece."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

SHARDED = ("--fsdp", "--fsdp_config", '{"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}')
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
    """train(name, *flags, world=1): a run in a folder of that name, which is returned; in parts if of several."""

    def run(name, *flags, world=1):
        sharded = {"prepare": shard_on_the_cpu} if world > 1 else {}
        flags = (*STEPS, "--save_strategy", "no", *(SHARDED if world > 1 else ()), *flags)
        started = start(*flags, "--output_dir", tmp_path / name, world=world, **sharded)
        assert set(started.wait()) == {0}, started.logs
        return tmp_path / name, started.logs[0]

    return run


def test_it(train, weights):
    whole, log = train("whole", "--per_device_train_batch_size", 4)
    print(log)
    parts, log = train("parts", "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2, world=2)
    print(log)
    print((weights(whole)-weights(parts)).abs().max())
    print(log)
    assert torch.allclose(weights(parts), weights(whole), rtol=0, atol=1e-6)
