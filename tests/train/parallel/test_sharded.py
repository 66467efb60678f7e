"""FSDP2: a model divided over processes is trained, measured, saved and resumed as one in one piece."""

import json
import math
import re

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.profiler import profile

from disc_train.parallel.sharding import local_part
from disc_train.trainer import DiscTrainer
from tests.train.files import write_jsonl
from tests.train.runs import losses, skip_unless_resumable, weights
from tests.train.world import SENTENCES, make_model

SHARDED = ("--fsdp",)
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


def count_what_is_sent():
    """Prints, for every step, the collectives, and the share of both models that a process holds after it."""
    shard_on_the_cpu()
    real = DiscTrainer.training_step

    def step(self, *args, **kwargs):
        with profile() as profiled:
            loss = real(self, *args, **kwargs)
        names = [event.name for event in profiled.events()]
        counts = [names.count(f"c10d::{name}") for name in ("_allgather_base_", "_reduce_scatter_base_")]
        held = [sum(local_part(part).numel() for part in model.parameters()) for model in (self.model, self.teacher)]
        print("step:", *counts, *held)
        return loss

    DiscTrainer.training_step = step


def name_what_is_reduced():
    """Prints the dtype that gradients are summed in."""
    shard_on_the_cpu()
    newer, older = "reduce_scatter_single", "reduce_scatter_tensor"
    name = newer if hasattr(dist, newer) else older
    real = getattr(dist, name)

    def reduce_scatter(*args, **kwargs):
        print("summed:", (kwargs["input"] if "input" in kwargs else args[1]).dtype)
        return real(*args, **kwargs)

    setattr(dist, name, reduce_scatter)


@pytest.fixture
def train(start, tmp_path):
    """train(name, *flags, world=1): a run in a folder of that name, which is returned; of several processes, sharded.

    What the first process printed is in a file `log` there.
    """

    def run(name, *flags, world=1, by_config=True, saves="no", **options):
        if world > 1:
            flags = (*(SHARDED if by_config else ()), *flags)
            options.setdefault("prepare", shard_on_the_cpu)
        flags = (*STEPS, "--save_strategy", saves, *flags, "--output_dir", tmp_path / name)
        started = start(*flags, world=world, **options)
        assert set(started.wait()) == {0}, started.logs
        (tmp_path / name / "log").write_text(started.logs[0])
        return tmp_path / name

    return run


def _batch(documents, accumulated=1):
    return "--per_device_train_batch_size", documents, "--gradient_accumulation_steps", accumulated


@pytest.mark.parametrize("tied", [False, True])
def test_the_steps_of_one_process(tied, train, model_folder, tmp_path):
    """Loss, weights, and before and after, the signal and the probes."""
    facts = write_jsonl(tmp_path / "facts.jsonl", *({"prompt": each, "answer": "Merin."} for each in SENTENCES[:3]))
    probes = ("--probes_file", facts, "--probe_steps", 2)
    make_model(tie_word_embeddings=tied).save_pretrained(model_folder)
    whole = train("whole", *_batch(4), *probes)
    parts = train("parts", *_batch(1, 2), *probes, "--gradient_checkpointing", "true", world=2)
    assert (weights(whole) - weights(model_folder)).abs().max() > 1e-3
    assert torch.allclose(weights(parts), weights(whole), rtol=0, atol=1e-6)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    signals = [
        re.findall(r"signal +([\d.]+) -> ([\d.]+) nats", (folder / "log").read_text()) for folder in (whole, parts)
    ]
    assert signals[0] == signals[1] and len(signals[0]) == 1
    asked = [re.findall(r"facts_logprob (.*)", (folder / "log").read_text()) for folder in (whole, parts)]
    assert asked[0] == asked[1] and len(asked[0]) == 1


def test_sixteen_bits_over_float32_weights(train, model_folder):
    """As far from one process's weights as rounding in other places takes it, and no step is lost to rounding."""
    small = ("--bf16", "true", "--learning_rate", "1e-3")
    whole = train("whole", *_batch(4), *small)
    parts = train("parts", *_batch(2), *small, world=2, prepare=name_what_is_reduced)
    assert set(re.findall("summed: (.*)", (parts / "log").read_text())) == {"torch.float32"}
    moved = weights(whole) - weights(model_folder)
    assert (weights(parts) - weights(whole)).norm() < 0.05 * moved.norm()
    assert load_file(parts / "model.safetensors")["lm_head.weight"].dtype == torch.float32
    assert losses(parts) == pytest.approx(losses(whole), rel=0.02)


@pytest.mark.parametrize("kept", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_resumed_bit_for_bit(kept, train, model_folder):
    make_model(attention_dropout=0.2).save_pretrained(model_folder)
    config = json.dumps({"state_dict_type": kept})
    flags = (*_batch(2), "--fsdp_config", config, "--save_steps", 1, "--optim", "adamw_torch", "--num_train_epochs", 2)
    whole = train("whole", *flags, "--max_steps", -1, world=2, saves="steps")
    last = whole / "checkpoint-3"
    parts = train("parts", *flags, "--max_steps", -1, "--resume_from_checkpoint", last, world=2, saves="steps")
    assert torch.equal(weights(parts), weights(whole))
    assert not torch.equal(weights(parts), weights(model_folder))


def test_what_is_gathered_and_held(train):
    """Of embeddings, two layers, and norm with head: each once forward, all but the last again for the backward pass.

    The teacher's head stays whole, once it is. Gradients are reduced once each. Saved is what was asked for.
    """
    flags = (*_batch(4), "--save_dtype", "bfloat16")
    folder = train("parts", *flags, world=2, prepare=count_what_is_sent)
    assert load_file(folder / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    steps = [list(map(int, line.split()[1:])) for line in (folder / "log").read_text().splitlines() if "step:" in line]
    total = make_model().num_parameters()
    head = sum(parameter.numel() for parameter in (make_model().lm_head.weight, make_model().model.norm.weight))
    assert len(steps) == 3
    for all_gathers, reduce_scatters, of_student, of_teacher in steps[1:]:
        assert (all_gathers, reduce_scatters) == (4 + 3 + 3, 4)
        assert of_student == total / 2
        assert of_teacher == (total - head) / 2 + head


def test_replayed_examples_in_one_process_alone(train, tmp_path):
    """The teacher, which is read for them, is put together by all."""
    (tmp_path / "old.jsonl").write_text('{"text": "Nobody had seen a bridge of that kind."}\n')
    flags = ("--method", "ft", "--replay_file", tmp_path / "old.jsonl", "--replay_objective", "kl", "--ddp_timeout", 20)
    whole = train("whole", *_batch(4), *flags)
    parts = train("parts", *_batch(2), *flags, world=2)
    assert torch.allclose(weights(parts), weights(whole), rtol=0, atol=1e-6)


def test_set_up_by_accelerate(train):
    """By what `accelerate launch` makes of its configuration file."""
    whole = train("whole", *_batch(4))
    environment = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    }
    parts = train("parts", *_batch(2), world=2, by_config=False, environment=environment)
    assert torch.allclose(weights(parts), weights(whole), rtol=0, atol=1e-6)


def break_a_part():
    """Puts a NaN into the second process's part, after the last step."""
    shard_on_the_cpu()
    real = DiscTrainer.save_model

    def save(self, *args, **kwargs):
        if self.args.process_index == 1:
            local_part(self.model.lm_head.weight).data[3] = math.nan
        real(self, *args, **kwargs)

    DiscTrainer.save_model = save


def test_weights_broken_in_one_part_are_not_saved(start, tmp_path):
    flags = (*STEPS, *SHARDED, "--max_steps", 1, "--save_steps", 1, "--output_dir", tmp_path / "out")
    run = start(*flags, world=2, prepare=break_a_part)
    assert run.wait() == [1, 1]
    assert all("step 1: lm_head.weight is not finite after it" in log for log in run.logs)
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


@pytest.mark.parametrize("sharded", [False, True])
def test_adapters(sharded, start, tmp_path):
    """Trained as in one process, saved alone, and resumed."""
    skip_unless_resumable(1 if sharded else 2)
    # With an epsilon this large Adam's steps follow the gradients, not their rounding.
    flags = (*STEPS, "--optim", "adamw_torch", "--adam_epsilon", "1e-2", "--lora_rank", 4, "--lora_dropout", 0)
    assert start(*flags, *_batch(4), "--output_dir", tmp_path / "whole").wait() == [0]
    flags = (*flags, *_batch(2), *(SHARDED if sharded else ()), "--save_steps", 1)
    several = {"world": 2, "prepare": shard_on_the_cpu if sharded else None}
    for name, more in (("parts", ()), ("again", ("--resume_from_checkpoint", tmp_path / "parts" / "checkpoint-2"))):
        run = start(*flags, *more, "--output_dir", tmp_path / name, **several)
        assert run.wait() == [0, 0], run.logs
    whole, parts, again = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts", "again")
    )
    assert whole.keys() == parts.keys() == again.keys()
    for name, value in whole.items():
        assert torch.allclose(parts[name], value, rtol=0, atol=1e-6), name
        assert torch.equal(parts[name], again[name]), name
    assert all(value.abs().max() > 1e-4 for name, value in whole.items() if "lora_B" in name)
    assert not [path for path in (tmp_path / "parts").rglob("*model*") if not path.name.startswith("adapter_model")]


def test_without_accelerators_nothing_could_be_sharded(start):
    run = start(*SHARDED, world=2)
    assert run.wait() == [1, 1]
    assert "--fsdp: expected an accelerator in every process" in run.logs[0]
    assert "got 2 on cpu: leave it out" in run.logs[0]


def test_a_cached_teacher(train, tmp_path):
    """Its head is whole on every process, while the student's is divided; one process fills the cache."""
    cached = ("--teacher", "cache", "--teacher_cache", tmp_path / "cache", "--teacher_cache_dtype", "float32")
    whole, parts = train("whole", *_batch(4)), train("parts", *_batch(2), *cached, world=2)
    assert "teacher       not in memory, but for its head" in (parts / "log").read_text()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    assert torch.allclose(weights(parts), weights(whole), rtol=0, atol=1e-6)
