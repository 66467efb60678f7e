"""The trainer: whose mean a step's loss is, what stays frozen, what it refuses, and how it stops."""

import copy
import math
import signal

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GraniteConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RecurrentGemmaConfig,
    TrainerCallback,
    xLSTMConfig,
)

from disc_kernels import LogitTransform
from disc_kernels.hf import output_head
from disc_train.data.dataset import DocumentDataset
from disc_train.data.splits import TokenizedDocument
from disc_train.models.causal_lm import hidden_states, use_attention
from disc_train.objectives import predictions
from disc_train.packing.collator import pack
from disc_train.trainer import DiscTrainer
from tests.train.world import make_model, run_arguments


@pytest.fixture
def make_trainer(make_dataset, tmp_path):
    """make_trainer(model=, teacher=, dataset=, callbacks=, **arguments): a copy and seven documents by default."""

    def make(model=None, teacher="a copy", dataset=None, callbacks=None, **arguments):
        steps = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "logging_steps": 1, "num_train_epochs": 1}
        return DiscTrainer(
            model or make_model(),
            make_model() if teacher == "a copy" else teacher,
            run_arguments(tmp_path / "out", **steps | arguments),
            dataset or make_dataset(),
            callbacks=callbacks,
        )

    return make


def _losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _distance(model, other):
    difference = [p - q for p, q in zip(model.parameters(), other.parameters(), strict=True)]
    return torch.stack([d.detach().abs().max() for d in difference]).max()


def test_accumulated_documents_make_the_step_of_one_batch(make_trainer):
    """Seven documents: a step of four, and a last one of three."""
    whole = make_trainer(per_device_train_batch_size=4)
    whole.train()
    parts = make_trainer(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    parts.train()
    uneven = make_trainer(per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=1)
    uneven.train()
    assert whole.state.global_step == parts.state.global_step == 2
    assert _losses(parts) == pytest.approx(_losses(whole), rel=1e-4)  # logged losses are rounded
    assert _distance(parts.model, whole.model) < 1e-6 < 1e-3 < _distance(whole.model, make_model())
    assert whole.examples_read == parts.examples_read == 7
    assert uneven.examples_read == 6


def test_the_loss_of_a_short_last_step_is_the_mean_over_its_documents(make_trainer, make_dataset):
    trainer = make_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=0.0)
    trainer.train()
    dataset = make_dataset(seed=0)
    batches = [pack([dataset[i]]) for i in range(7)]
    each = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=1).item() for batch in batches]
    first, last = _losses(trainer)
    assert 4 * first + 3 * last == pytest.approx(sum(each), rel=1e-3)


def test_only_the_student_is_trained_and_only_the_student_drops_out(make_trainer):
    teacher = make_model(attention_dropout=0.5).train()
    modes = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **_):
            modes.append((model.training, teacher.training, any(p.grad is not None for p in teacher.parameters())))

    trainer = make_trainer(make_model(attention_dropout=0.5), teacher, callbacks=[Watch()], max_steps=1)
    trainer.train()
    assert modes == [(True, False, False)]
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert _distance(teacher, make_model()) == 0
    assert _distance(trainer.model, make_model()) > 0


def test_a_teacher_with_its_adapters_off_has_its_own_head(make_trainer):
    """Where the head is trained whole beside adapters (modules_to_save), the teacher's is the one from before."""

    def adapted():
        model = make_model()
        saved = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
        torch.manual_seed(0)
        model.add_adapter(saved)
        model.lm_head.modules_to_save["default"].weight.data.mul_(1.5)
        return model

    losses = []
    for teacher in (None, make_model()):
        trainer = make_trainer(model=adapted(), teacher=teacher, max_steps=2)
        trainer.train()
        losses.append(_losses(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] > 0.01


def test_gradient_checkpointing_changes_nothing(make_trainer):
    plain, checkpointed = make_trainer(max_steps=1), make_trainer(max_steps=1, gradient_checkpointing=True)
    plain.train()
    checkpointed.train()
    assert _distance(plain.model, checkpointed.model) < 1e-7


def test_mixed_precision_is_the_students_alone(make_trainer, make_dataset, monkeypatch):
    """Under --bf16 a float32 teacher gives float32's hidden states, the student's products are rounded."""
    seen = []
    real = predictions.hidden_states

    def watch(model, *args):
        hidden = real(model, *args)
        seen.append((model, args, hidden))
        return hidden

    monkeypatch.setattr(predictions, "hidden_states", watch)
    trainer = make_trainer(bf16=True, max_steps=1)
    trainer.train()
    (teacher, teacher_args, teacher_hidden), (student, student_args, student_hidden) = seen
    assert (teacher, student) == (trainer.teacher, trainer.model)
    assert torch.equal(teacher_hidden, real(teacher, *teacher_args))
    untrained = make_model()
    use_attention(untrained, "auto")
    plain = real(untrained, *student_args)
    assert 1e-4 < (student_hidden - plain).norm() / plain.norm() < 0.1
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def test_heads_padded_to_different_sizes_are_compared_over_what_they_share(make_trainer, make_dataset):
    teacher = make_model()
    padded = copy.deepcopy(teacher)
    padded.resize_token_embeddings(320, mean_resizing=False)
    padded.lm_head.weight.data[300:] = 5.0
    batch = pack([make_dataset()[1]])
    trainers = [make_trainer(teacher=model) for model in (teacher, padded)]
    losses = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=1).item() for trainer in trainers]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 300}


@pytest.mark.parametrize(
    ("config", "transform"),
    [
        (CohereConfig(**TINY, logit_scale=0.25), LogitTransform(scale=0.25)),
        (GraniteConfig(**TINY, logits_scaling=8.0), LogitTransform(scale=1 / 8)),
        (RecurrentGemmaConfig(**TINY, w_init_variance_scale=1.0, logits_soft_cap=0.1), LogitTransform(softcap=0.1)),
        (
            xLSTMConfig(hidden_size=32, num_heads=2, num_blocks=1, vocab_size=300, output_logit_soft_cap=0.1),
            LogitTransform(softcap=0.1),
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_is_done_to_the_logits_is_known(config, transform):
    model = AutoModelForCausalLM.from_config(config)
    use_attention(model, "auto")
    assert output_head(model).transform == transform


class _ShiftedLogits(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 0.01 * torch.arange(output.logits.shape[-1])
        return output


class _DeafToLayouts(LlamaForCausalLM):
    def get_decoder(self):
        return lambda attention_mask, position_ids=None, **inputs: self.model(**inputs)


def _make(model_class):
    model = make_model()
    model.__class__ = model_class
    return model


@pytest.mark.parametrize(("model_class", "message"), [(_ShiftedLogits, "logits"), (_DeafToLayouts, "packed after")])
@pytest.mark.parametrize("role", ["model", "teacher"])
def test_a_model_that_does_something_unknown_is_refused(model_class, message, role, make_trainer):
    with pytest.raises(ValueError, match=f"{model_class.__name__}.*{message}"):
        make_trainer(**{role: _make(model_class)})


def test_the_check_of_a_model_does_not_depend_on_the_data(make_trainer):
    """Behind one token again and again, attention gives the same whatever it sees."""
    repeated = TokenizedDocument("d", np.full(30, 5, dtype=np.int32), (0, 10, 20))
    with pytest.raises(ValueError, match="packed after"):
        make_trainer(_make(_DeafToLayouts), dataset=DocumentDataset([repeated]))


def test_a_model_without_a_head_is_refused(make_trainer):
    classifier = LlamaForSequenceClassification(make_model().config)
    with pytest.raises(ValueError, match=r"LlamaForSequenceClassification.*get_output_embeddings"):
        make_trainer(classifier)


def test_flex_attention_is_refused_on_the_cpu():
    with pytest.raises(ValueError, match="attention: 'flex' cannot train on the CPU"):
        use_attention(make_model(), "flex")


def test_weight_decay_reaches_every_parameter(make_trainer):
    trainer = make_trainer(weight_decay=0.01)
    trainer.create_optimizer()
    decayed = [p for group in trainer.optimizer.param_groups if group["weight_decay"] == 0.01 for p in group["params"]]
    assert len(decayed) == len(list(trainer.model.parameters()))


def test_the_teacher_must_be_a_copy(make_trainer):
    model = make_model()
    with pytest.raises(ValueError, match="teacher"):
        make_trainer(model, model)


class _Break(TrainerCallback):
    """Puts a NaN into one weight once some steps are done."""

    def __init__(self, after):
        self.after = after

    def on_step_begin(self, args, state, control, model, **_):
        if state.global_step == self.after:
            with torch.no_grad():
                model.lm_head.weight[7, 3] = math.nan


def test_a_loss_that_is_not_finite_stops_before_the_step_and_leaves_checkpoints(make_trainer, tmp_path, make_dataset):
    trainer = make_trainer(
        per_device_train_batch_size=2, save_strategy="steps", save_steps=2, callbacks=[_Break(after=2)]
    )
    with pytest.raises(FloatingPointError, match=r"step 3: the loss is nan on the documents doc\d, doc\d;"):
        trainer.train()
    assert trainer.state.global_step == 2
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-2")
    assert all(parameter.isfinite().all() for parameter in saved.parameters())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]


def test_weights_that_are_not_finite_from_the_start_stop_the_first_step(make_trainer):
    """And SIGTERM does afterwards what it did before."""
    model = make_model()
    model.lm_head.weight.data[0] = math.inf
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(FloatingPointError, match="step 1: "):
        make_trainer(model).train()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("save_strategy", ["steps", "no"])
def test_weights_broken_by_the_last_step_are_not_saved(save_strategy, make_trainer, tmp_path):
    """The loss was finite, so nothing before the step told."""
    trainer = make_trainer(
        max_steps=1, learning_rate=1e39, optim="adamw_torch_fused", save_strategy=save_strategy, save_steps=1
    )
    with pytest.raises(FloatingPointError, match=r"step 1: .*\.weight is not finite"):
        trainer.train()
        trainer.save_model()
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


class _OfAnotherInterface(LlamaForCausalLM):
    def get_decoder(self):
        return lambda input_ids, attention_mask, use_cache: None


def test_a_model_that_cannot_run_packed_sequences_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"_OfAnotherInterface: expected a model that runs a packed.*AttributeError"):
        make_trainer(_make(_OfAnotherInterface))


def test_hidden_states_of_a_packed_sequence_are_those_of_each_text(make_dataset):
    """Through the whole model, for a batch with trunk and branches."""
    model = make_model("gemma2")
    dataset = make_dataset()
    use_attention(model, "auto")
    batch = pack([dataset[2], dataset[4]])
    hidden = hidden_states(model, batch["teacher_input_ids"], batch["teacher_layout"])[0]
    second = batch["teacher_layout"].tree_id == 1
    alone = model.model(batch["teacher_input_ids"][:, second]).last_hidden_state[0]
    assert torch.allclose(hidden[second], alone, atol=1e-5)
