"""Adapters: what is trained, what is saved, how it resumes, and the model without them as its own teacher."""

import copy
import json
import sys

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, TrainingArguments

from disc_train.models import adapters
from disc_train.models.adapters import add_lora, load_adapters
from disc_train.models.live_teacher import teacher_or_base_model
from disc_train.objectives.predictions import divergence, predict, predict_as_teacher
from disc_train.packing.collator import pack
from disc_train.summary import describe_model
from disc_train.trainer import DiscTrainer
from tests.shared_prefix.models import GROUPED
from tests.train.world import make_model, run_arguments

TOKENS = torch.arange(20)[None]


@pytest.fixture
def make_student():
    """make_student(dtype=, **config): a tiny model with adapters of rank 4 and dropout."""

    def make(architecture="llama", dtype=torch.float32, **config):
        model = make_model(architecture, **config).to(dtype)
        torch.manual_seed(1)
        return add_lora(model, rank=4, alpha=8, dropout=0.3)

    return make


@pytest.fixture
def make_trainer(make_student, make_dataset, tmp_path):
    """make_trainer(student=, teacher=, **arguments): disc on seven documents, four steps an epoch."""

    def make(student=None, teacher=None, **arguments):
        defaults = {"per_device_train_batch_size": 2, "num_train_epochs": 2, "learning_rate": 1e-2, "logging_steps": 1}
        args = run_arguments(tmp_path / "out", **defaults | arguments)
        return DiscTrainer(student or make_student(), teacher, args, make_dataset(num_splits=3))

    return make


def _adapters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}


def _equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _move(model):
    """As training would: at first adapters change nothing."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_adapters_alone_are_trained_beside_every_layer_but_the_head(architecture, make_student):
    model = make_student(architecture, torch.bfloat16)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(_adapters(model))
    layers = {name.split(".")[-4] for name in trained}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {parameter.dtype for parameter in _adapters(model).values()} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if name not in trained} == {torch.bfloat16}


COUNTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
# Each with layers that "all linear layers" left out: what is adapted beside q_proj and its like, and what is not.
LEFT_OUT = {
    "gpt_oss": (
        lambda: transformers.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
        {"experts.gate_up_proj", "experts.down_proj"},
        "; not adapted: mlp.router; no dropout: peft has none beside experts",
    ),
    "deepseek_v3": (  # by default peft takes its shared experts and its dense layer for routed ones
        lambda: transformers.DeepseekV3Config(
            **GROUPED | LATENT | COUNTS | {"num_key_value_heads": 4},
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
        ),
        {"experts.gate_up_proj", "experts.down_proj"}
        | {f"{where}.{name}_proj" for where in ("shared_experts", "mlp") for name in ("gate", "up", "down")},
        "; not adapted: mlp.gate; no dropout: peft has none beside experts",
    ),
    "mamba": (  # it takes the weights of dt_proj and out_proj without calling them
        lambda: transformers.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4),
        {"mixer.in_proj", "mixer.x_proj"},
        "; not adapted: mixer.A_log, mixer.conv1d, mixer.dt_proj, mixer.out_proj",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_experts_are_adapted_and_what_is_not_is_said(name, tmp_path):
    make_config, adapted, left_out = LEFT_OUT[name]
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(make_config())
    model = add_lora(copy.deepcopy(plain), rank=2, alpha=4, dropout=0.1)
    assert describe_model(model).endswith(f"in adapters, float32{left_out}")
    config = model.peft_config["default"]
    names = {name.removesuffix(".weight") for name in (*config.target_modules, *config.target_parameters)}
    assert {".".join(name.split(".")[-2:]) for name in names if "self_attn" not in name} == adapted
    _move(model)
    (model(TOKENS).logits ** 2).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    expected = model.eval()(TOKENS).logits
    with teacher_or_base_model(None, model) as teacher:
        assert torch.equal(teacher(TOKENS).logits, plain.eval()(TOKENS).logits)
    model.save_pretrained(tmp_path)
    loaded = copy.deepcopy(plain)
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(loaded.eval()(TOKENS).logits, expected)
    resumed = add_lora(plain, rank=2, alpha=4, dropout=0.1)
    load_adapters(resumed, str(tmp_path))
    assert torch.equal(resumed.eval()(TOKENS).logits, expected)


def test_targets_are_chosen_by_their_names():
    model = add_lora(make_model(), 2, 4, 0.1, ["q_proj", "model.layers.1.mlp.up_proj"])
    assert {name.split(".")[-4] for name in _adapters(model)} == {"q_proj", "up_proj"}
    assert not any("layers.0.mlp" in name for name in _adapters(model))
    with pytest.raises(ValueError, match=r"--lora_target_modules: expected names of linear layers .* got lm_head"):
        add_lora(make_model(), 2, 4, 0.1, ["q_proj", "lm_head"])


def test_training_moves_the_adapters_and_nothing_else(make_trainer):
    trainer = make_trainer()
    before = _adapters(trainer.model)
    trainer.train()
    after = _adapters(trainer.model)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    base = dict(make_model().named_parameters())
    for name, parameter in trainer.model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, base[name.replace(".base_layer", "")])


def test_the_student_without_adapters_is_the_teacher_that_a_copy_is(make_student, make_trainer, make_dataset):
    """Bit for bit in float32, with the student's dropout on."""
    student, plain = make_student(attention_dropout=0.5), make_model(attention_dropout=0.5)
    _move(student)
    sides, losses = [], []
    for teacher in (None, plain):
        trainer = make_trainer(copy.deepcopy(student), teacher, max_steps=3)
        sides.append(predict_as_teacher(trainer.model.train(), trainer.teacher, pack([make_dataset()[2]])))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert torch.equal(sides[0].hidden, sides[1].hidden)
    assert torch.equal(sides[0].head.weight, sides[1].head.weight)
    # Not to the bit: with one head in memory, logits are not subtracted but hidden states are.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_teacher_that_drops_out_would_show(make_student, make_trainer, make_dataset, monkeypatch):
    student = make_student(attention_dropout=0.5)
    trainer = make_trainer(student)
    batch = pack([make_dataset()[2]])

    def loss():
        torch.manual_seed(0)
        return float(divergence(predict(student.train(), None, batch), 1.0).detach())

    expected = loss()
    assert student.training
    monkeypatch.setattr(type(student), "eval", lambda self: self)
    assert abs(loss() / expected - 1) > 1e-3
    assert trainer.teacher is None


def test_adapters_are_on_again_whatever_happens(make_student):
    student = make_student().train()
    _move(student)
    ids = torch.arange(9)[None]
    with pytest.raises(KeyError), teacher_or_base_model(None, student) as teacher:
        plain = teacher(ids).logits
        raise KeyError
    assert student.training
    assert not torch.equal(student.eval()(ids).logits, plain)
    assert all(parameter.requires_grad for name, parameter in student.named_parameters() if "lora_" in name)


def test_a_run_that_is_resumed_ends_as_one_that_is_not(make_trainer, tmp_path):
    whole = make_trainer(save_strategy="steps", save_steps=3)
    whole.train()
    resumed = make_trainer(save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert resumed.state.global_step == whole.state.global_step == 8
    assert _equal(_adapters(resumed.model), _adapters(whole.model))


def test_what_is_saved_is_the_adapter_alone_and_loads_as_one(make_student, make_trainer, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    trainer = make_trainer(make_student(), max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        assert (folder / "adapter_config.json").exists()
        assert not (folder / "model.safetensors").exists()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.3)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    loaded.load_adapter(str(tmp_path / "out"))
    ids = torch.arange(9)[None]
    assert torch.allclose(loaded.eval()(ids).logits, trainer.model.eval()(ids).logits, atol=1e-5)
    assert not torch.allclose(make_model().eval()(ids).logits, trainer.model(ids).logits, atol=1e-3)


def test_adapters_of_another_kind_are_refused(make_student, tmp_path):
    make_student().save_pretrained(tmp_path / "four")
    with pytest.raises(ValueError, match="four: expected the adapters of this model, got others"):
        load_adapters(add_lora(make_model(), rank=2, alpha=4, dropout=0.0), str(tmp_path / "four"))
    with pytest.raises(ValueError, match=r"expected the adapters of this model in adapter_model\.safetensors, got no"):
        load_adapters(make_student(), str(tmp_path))


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"--lora_rank needs peft: pip install 'disc-kernels\[train\]'"):
        add_lora(make_model(), rank=2, alpha=4, dropout=0.0)


def test_a_peft_that_transformers_refuses(monkeypatch):
    monkeypatch.setattr(adapters, "MIN_PEFT_VERSION", "999")
    with pytest.raises(ValueError, match=r"--lora_rank: expected peft 999 or newer, which .* needs, got \d"):
        add_lora(make_model(), rank=2, alpha=4, dropout=0.0)


def test_gradient_checkpointing_changes_nothing(make_trainer):
    """What it runs again in the backward pass must be the student with its adapters, not the teacher."""
    results = []
    for gradient_checkpointing in (False, True):
        trainer = make_trainer(max_steps=2, gradient_checkpointing=gradient_checkpointing)
        trainer.train()
        results.append(_adapters(trainer.model))
    assert all(torch.allclose(results[0][name], results[1][name], atol=1e-6) for name in results[0])


def test_a_bfloat16_model_under_float32_adapters(make_student, make_trainer):
    trainer = make_trainer(make_student(dtype=torch.bfloat16), bf16=True, max_steps=2)
    before = _adapters(trainer.model)
    trainer.train()
    assert not _equal(before, _adapters(trainer.model))


def test_a_teacher_is_missing_or_too_many(make_trainer, make_dataset, tmp_path):
    args = TrainingArguments(tmp_path, use_cpu=True)
    with pytest.raises(ValueError, match="teacher: expected a model, which this method compares the student with"):
        DiscTrainer(make_model(), None, args, make_dataset())
    with pytest.raises(ValueError, match="teacher: expected None, this method compares with no teacher, got Llama"):
        DiscTrainer(make_model(), make_model(), args, make_dataset(), method="ft")
