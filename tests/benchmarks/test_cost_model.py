"""The cost model's operations and bytes are those of real steps, exactly; its times follow by hand."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import scaling_run
from benchmarks.cost_model import (
    MODELS,
    Collective,
    Hardware,
    Plan,
    Prediction,
    Work,
    collectives,
    documents,
    held_bytes,
    operations,
    predict,
)
from benchmarks.scaling_run import SHAPE, World, examples, model_of, run_world
from benchmarks.scaling_steps import prepare_call
from benchmarks.step_cases import QWEN_7B
from disc_train.packing.collator import collator
from tests import forkserver

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 256}
SMALL = replace(SHAPE, **SIZES)
LLAMA_70B = replace(
    QWEN_7B,
    config=LlamaConfig,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
)


@pytest.mark.parametrize(("name", "shape"), [("7B", QWEN_7B), ("70B", LLAMA_70B)])
def test_parameters(name, shape):
    model = MODELS[name]
    assert replace(model_of(shape), name=model.name) == model
    with torch.device("meta"):
        sizes = {n: value for n, value in vars(shape).items() if isinstance(value, int)}
        real = AutoModelForCausalLM.from_config(shape.config(**sizes))
    assert model.parameters == real.num_parameters()
    assert model.layer == sum(p.numel() for p in real.get_decoder().layers[0].parameters())


def _step(count):
    """The small shape's step on documents that the model counts, with attention whose products can be counted."""
    teacher = SMALL.teacher("cpu")
    student = SMALL.student(teacher)
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    batch = collator(student, teacher)(examples(0, count, SMALL.vocab_size))
    prepare_call(student, teacher, batch)
    return batch, lambda: student().backward()


def test_documents_are_packed_as_counted():
    batch, _ = _step(3)
    work = documents(3)
    assert batch["packing"].tokens == batch["packing"].padded_tokens == work.teacher_tokens + work.student_tokens
    assert len(batch["targets"]) == work.rows == work.student_tokens
    for ids, pairs in ((batch["teacher_input_ids"], work.teacher_pairs), (batch["input_ids"], work.student_pairs)):
        assert len(ids) * ids.shape[1] ** 2 == pairs


def test_operations_are_those_of_a_step():
    _, step = _step(3)
    with FlopCounterMode(display=False) as counter:
        step()
    # Rotary embeddings' angles, a number a token, are a product in some versions of transformers.
    by_module = counter.get_flop_counts()
    angles = sum(sum(by_module[name].values()) for name in by_module if name.endswith("rotary_emb"))
    assert counter.get_total_flops() - angles == sum(operations(model_of(SMALL), documents(3)).values())


def test_operations_by_part():
    """With nothing but one kind of work."""
    model = model_of(SMALL)
    matrices = 2 * 32 * (32 + 16 + 16 + 32 + 3 * 64)
    assert operations(model, Work(10, 0, 0, 100, 0))["teacher, forward"] == 2 * matrices * 10 + 2 * 4 * 32 * 100
    student = operations(model, Work(0, 10, 0, 0, 100))["student, forward and backward"]
    assert student == 3 * (2 * matrices * 10 + 2 * 4 * 32 * 100)
    assert operations(model, Work(0, 0, 10, 0, 0))["loss"] == 8 * 10 * 256 * 32


PLANS = {
    2: [Plan(2, 1, 1, 4), Plan(2, 2, 1, 4), Plan(2, 2, 1, 2), Plan(2, 2, 2, 4), Plan(2, 2, 2, 2)],
    4: [Plan(4, 1, 1, 4), Plan(4, 4, 1, 2), Plan(4, 2, 1, 4), Plan(4, 4, 2, 4), Plan(4, 2, 2, 2), Plan(4, 4, 4, 4)],
}


def _payloads(model, work, plan):
    counted = Counter()
    for collective in collectives(model, work, plan):
        counted[collective.kind] += collective.payload
    return dict(counted)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", PLANS)
def test_bytes_are_those_of_real_steps(ranks):
    """Whose loss and gradients `scaling_run` compares with one process's."""
    forkserver.context()
    rows = run_world(World(ranks, PLANS[ranks], SIZES, documents=2, rounds=0))
    assert len(rows) == len(PLANS[ranks])
    for plan, row in zip(PLANS[ranks], rows, strict=True):
        assert row["payload"] == _payloads(model_of(SMALL), documents(2), plan), plan


def test_what_is_counted():
    """Numbers that collectives are given, not the objects with which ranks compare their calls."""
    x = torch.ones(6)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with scaling_run.CollectiveBytes() as counter:
            torch.distributed.all_reduce(x)
            torch.distributed.all_reduce(x.long())
            torch.distributed.all_gather([torch.empty(6)], x)
    finally:
        torch.distributed.destroy_process_group()
    assert counter.bytes == {"all_reduce": 24, "all_gather": 24}


def test_wrong_gradients_have_no_time():
    value = torch.ones(3)
    with pytest.raises(scaling_run.Wrong, match="relative error of loss"):
        scaling_run._errors({"loss": 1.01 * value}, {"loss": value}, torch.float32)


def test_time_of_a_collective():
    hardware = Hardware(nvlink=100.0, network=10.0, hop=0.5, node=8)

    def seconds(kind, ranks, stride, calls=1):
        return hardware.seconds(Collective(kind, "", 800, calls, ranks, stride))

    assert seconds("all_gather", 8, 1) == 7 / 8 * 800 / 100 + 7 * 0.5
    assert seconds("reduce_scatter", 4, 2, calls=3) == 3 / 4 * 800 / 100 + 3 * 3 * 0.5
    assert seconds("all_reduce", 8, 1) == 2 * (7 / 8 * 800 / 100 + 7 * 0.5)
    assert seconds("all_gather", 16, 1) == 15 / 16 * 800 / 80 + 15 * 0.5  # eight adapters share a ring through nodes
    assert seconds("all_gather", 2, 8) == 1 / 2 * 800 / 10 + 0.5


def test_time_of_a_step():
    assert Prediction(products=3, optimizer=1, communication=2).overlapped == 4
    assert Prediction(products=2, optimizer=1, communication=3).overlapped == 4
    assert Prediction(products=3, optimizer=1, communication=2).in_turn == 6
    model, work, plan = MODELS["7B"], documents(16), Plan(8, shard=8)
    of = predict(model, work, plan, Hardware(peak=1e15, efficiency=0.5, memory=28e9, hop=0, nvlink=1e9))
    assert of.products == sum(operations(model, work).values()) / 5e14
    assert of.optimizer == pytest.approx(model.parameters / 8e9)
    assert of.communication == pytest.approx(
        7
        / 8
        * (model.parameters * 4 + 6 * model.layers * model.layer + 4 * (model.parameters - model.layers * model.layer))
        / 1e9
    )


def test_bytes_held():
    model = MODELS["7B"]
    body, head = model.layers * model.layer, model.head
    assert held_bytes(model, Plan(8)) == 20 * model.parameters  # with autocast's copy and the teacher
    gathered = 2 * (model.parameters - body + 2 * model.layer)
    assert held_bytes(model, Plan(8, shard=8)) == 18 * model.parameters // 8 + gathered
    divided = held_bytes(model, Plan(64, shard=64, vocab=8))
    assert divided == 18 * (model.parameters - head) // 64 + 20 * head // 8 + gathered - 2 * head
