"""TRL's distillation trainers with their own losses and with ours: the same values, gradients and metrics."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerFast

from disc_kernels.integrations.trl import FusedDistillation, FusedGKD, FusedSDFT
from tests.hf.models import gradients, make, perturbed

trl = pytest.importorskip("trl")
Dataset = pytest.importorskip("datasets").Dataset

from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: E402
from trl.experimental.sdft import SDFTConfig, SDFTTrainer  # noqa: E402

PROMPTS = ["a b", "c d e f", "g", "b a c"]
ENTRIES = 96
# Families of a plain head, one with a scale and one with a softcap; beta or alpha; temperature.
CASES = [("llama", 0.0, 1.0), ("cohere", 0.3, 2.0), ("gemma2", 1.0, 0.7)]


@pytest.fixture(scope="module")
def tokenizer():
    """Words that are letters, and a chat template of one tag a turn."""
    words = ["<pad>", "<eos>", "<user>", "<assistant>", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="z"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% if m.role == 'assistant' %}<eos> {% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    return tokenizer


def two_models(family, dtype=torch.float32):
    """Make a teacher, and a student that differs from it."""
    teacher = make(family).to(dtype)
    return perturbed(teacher), teacher


def with_ours(ours, theirs):
    """Put one of our classes before a trainer of TRL, as its docstring says."""
    return type(f"Fused{theirs.__name__}", (ours, theirs), {})


def options(tmp_path, **others):
    return {
        **{"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True},
        **{"per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-2},
        **{"save_strategy": "no", **others},
    }


def completions(dtype=torch.int64):
    """Make a batch of prompts, padded on the left, and completions, padded on the right."""
    return {
        "prompt_ids": torch.tensor([[0, 4, 5], [6, 7, 8]]),
        "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=dtype),
        "completion_ids": torch.tensor([[9, 10, 11, 1], [12, 1, 0, 0]]),
        "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=dtype),
    }


def assert_same(losses, model):
    """Compare two losses and all their gradients."""
    bounds = {"rtol": 1e-8, "atol": 1e-10} if losses[0].dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-6}
    torch.testing.assert_close(*(x.detach() for x in losses), **bounds)
    got, expected = (gradients(model, loss) for loss in losses)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, **bounds, msg=lambda m, name=name: f"{name}: {m}")


def assert_same_logs(logs, *names):
    """Compare what two runs logged: the same entries, and these numbers where they are among them."""
    numbers = [[(name, log[name]) for log in run for name in names if name in log] for run in logs]
    assert [sorted(log) for log in logs[0]] == [sorted(log) for log in logs[1]]
    assert [name for name, _ in numbers[0]] == [name for name, _ in numbers[1]] != []
    assert [x for _, x in numbers[0]] == pytest.approx([x for _, x in numbers[1]], rel=1e-3)


@pytest.fixture
def distillation(tokenizer, tmp_path):
    def build(kind, student, teacher, **others):
        args = trl.DistillationConfig(**options(tmp_path, max_completion_length=4, **others))
        data = Dataset.from_dict({"prompt": PROMPTS})
        return kind(student, args=args, teacher_model=teacher, train_dataset=data, processing_class=tokenizer)

    return build


@pytest.mark.parametrize(("family", "beta", "temperature"), CASES)
def test_distillation(distillation, family, beta, temperature):
    student, teacher = two_models(family)
    trainer = distillation(trl.DistillationTrainer, student, teacher, beta=beta, temperature=temperature)
    batch = completions() | {"tool_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])}
    for items in (None, torch.tensor(11)):
        computed = [
            kind._compute_loss(trainer, student, batch, items) for kind in (FusedDistillation, trl.DistillationTrainer)
        ]
        for got, expected in zip(*computed, strict=True):
            torch.testing.assert_close(got.detach(), expected.detach(), rtol=2e-5, atol=1e-6)
    assert computed[0][2] == 5
    assert_same([loss for loss, *_ in computed], student)


def test_distillation_of_nothing_is_zero(distillation):
    student, teacher = two_models("llama")
    trainer = distillation(trl.DistillationTrainer, student, teacher)
    batch = completions()
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    loss, entropy, compared = FusedDistillation._compute_loss(trainer, student, batch, None)
    assert loss == entropy == compared == 0
    assert all(not x.any() for x in gradients(student, loss).values())


def test_distillation_trains_as_before(distillation):
    """Two steps on what the student generates; the same metrics are logged."""
    logs = []
    for kind in (with_ours(FusedDistillation, trl.DistillationTrainer), trl.DistillationTrainer):
        torch.manual_seed(0)
        student, teacher = two_models("llama")
        trainer = distillation(kind, student, teacher, beta=0.5, seed=3)
        trainer.train()
        logs.append(trainer.state.log_history)
    assert_same_logs(logs, "loss", "entropy", "grad_norm")


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_distillation_inside_what_wraps_the_student(distillation, lonely_group, kind):
    """TRL runs the loss as the forward of the wrapper; gradients are those of the student alone."""
    student, teacher = two_models("llama")
    trainer = distillation(with_ours(FusedDistillation, trl.DistillationTrainer), student, teacher)
    expected = gradients(student, trainer.compute_loss(student, completions()))
    if kind == "DDP":
        wrapped = DistributedDataParallel(student, find_unused_parameters=True)
    else:
        wrapped = student
        for module in (*student.model.layers, student):
            fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    got = gradients(student, trainer.compute_loss(wrapped, completions()))
    for name, gradient in got.items():
        whole = gradient.full_tensor() if kind == "FSDP2" else gradient
        torch.testing.assert_close(whole, expected[name], rtol=1e-4, atol=1e-6)


def test_no_head_is_run(distillation, gkd, sdft, monkeypatch):
    """Training makes no logits of all tokens."""

    def fail(*_):
        raise AssertionError("the head was run")

    student, teacher = two_models("llama")
    for model in (student, teacher):
        monkeypatch.setattr(model.get_output_embeddings(), "forward", fail)
    batch = completions()
    batch |= {"teacher_input_ids": batch["completion_ids"].repeat(1, 2), "teacher_attention_mask": torch.ones(2, 8)}
    labelled = {"input_ids": batch["teacher_input_ids"], "labels": batch["teacher_input_ids"]}
    distillation(with_ours(FusedDistillation, trl.DistillationTrainer), student, teacher).compute_loss(student, batch)
    trainer = gkd(with_ours(FusedGKD, GKDTrainer), student, teacher)
    trainer.compute_loss(student, labelled | {"attention_mask": torch.ones(2, 8)})
    for mode in MODES:
        sdft(with_ours(FusedSDFT, SDFTTrainer), student, **mode).compute_loss(student, batch)


def test_distillation_in_16_bits(distillation):
    """Decoder and heads run inside accelerate's autocast."""
    student, teacher = two_models("llama")
    trainer = distillation(with_ours(FusedDistillation, trl.DistillationTrainer), student, teacher, bf16=True)
    loss = trainer.compute_loss(trainer.model_wrapped, completions())
    exact, *_ = trl.DistillationTrainer._compute_loss(
        distillation(trl.DistillationTrainer, copy.deepcopy(student), teacher), student, completions(), None
    )
    assert 1e-6 < abs(loss - exact) < 0.05 * exact


@pytest.fixture
def gkd(tokenizer, tmp_path):
    def build(kind, student, teacher, **others):
        args = GKDConfig(**options(tmp_path, max_new_tokens=4, max_length=16, **others))
        turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": p[::-1]}] for p in PROMPTS]
        data = Dataset.from_dict({"messages": turns})
        common = {"train_dataset": data, "eval_dataset": data, "processing_class": tokenizer}
        return kind(student, teacher, args, **common)

    return build


@pytest.mark.parametrize(("family", "beta"), [(family, beta) for family, beta, _ in CASES])
def test_gkd(gkd, family, beta):
    student, teacher = two_models(family, torch.float64)
    trainer = gkd(GKDTrainer, student, teacher, beta=beta)
    ids = torch.arange(3, 19).view(2, 8)
    labels = ids.masked_fill(ids < 6, -100).index_fill(1, torch.tensor([7]), -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    for items in (None, torch.tensor(11)):
        losses = [
            kind.compute_loss(trainer, student, batch, num_items_in_batch=items) for kind in (FusedGKD, GKDTrainer)
        ]
        assert_same(losses, student)
    everything_masked = batch | {"labels": torch.full_like(labels, -100)}
    loss = FusedGKD.compute_loss(trainer, student, everything_masked)
    assert loss == 0 and all(not x.any() for x in gradients(student, loss).values())


def test_gkd_trains_and_evaluates_as_before(gkd):
    """Steps on data and on what the student generates; in evaluation `compute_metrics` still gets logits."""
    logs = []
    for kind in (with_ours(FusedGKD, GKDTrainer), GKDTrainer):
        torch.manual_seed(0)
        student, teacher = two_models("llama")
        seen = []
        trainer = gkd(kind, student, teacher, seed=3, lmbda=0.5)
        trainer.train()
        logs.append([*trainer.state.log_history, trainer.evaluate()])
        trainer.compute_metrics = lambda p: seen.append(p.predictions.shape[-1]) or {}  # noqa: B023
        trainer.evaluate()
        assert seen == [ENTRIES]
    assert_same_logs(logs, "loss", "grad_norm", "eval_loss")


@pytest.fixture
def sdft(tokenizer, tmp_path):
    def build(kind, student, **others):
        common = {
            "max_completion_length": 4,
            "max_prompt_length": 16,
            "num_loss_tokens_to_skip": 1,
            "num_generations": 1,
        }
        args = SDFTConfig(**options(tmp_path, **{**common, "teacher_model_kind": "live", **others}))
        data = Dataset.from_dict({"prompt": PROMPTS, "privileged_context": [p[::-1] for p in PROMPTS]})
        return kind(student, args, train_dataset=data, processing_class=tokenizer)

    return build


MODES = [
    *({"distillation_mode": "topk_logits", "distillation_topk": 5, "distillation_add_tail": x} for x in (True, False)),
    {"distillation_mode": "full_logits"},
]


@pytest.mark.parametrize("mode", [*MODES, {"distillation_mode": "sampled_token", "distillation_alpha": 1.0}])
@pytest.mark.parametrize(("family", "alpha", "temperature"), CASES)
def test_sdft(sdft, family, mode, alpha, temperature):
    """The student is also the teacher, which reads another prompt; it had sampled with other log-probabilities."""
    # Gemma 2 gives NaN in float64 where there is padding.
    student = perturbed(make(family).to(torch.float32 if family == "gemma2" else torch.float64)).train()
    mode = {"distillation_alpha": alpha, "temperature": temperature, **mode}
    kinds = with_ours(FusedSDFT, SDFTTrainer), SDFTTrainer
    trainers = [sdft(kind, student, **mode) for kind in kinds]
    for trainer in trainers:
        trainer.current_gradient_accumulation_steps = 1
    batch = completions()
    batch |= {
        "teacher_input_ids": torch.cat(
            [batch["prompt_ids"][:, [1, 2]], batch["prompt_ids"], batch["completion_ids"]], 1
        ),
        "old_per_token_logps": -torch.rand(2, 4) * 6,
    }
    batch["teacher_attention_mask"] = (batch["teacher_input_ids"] != 0).long()
    assert_same([trainer.compute_loss(student, batch) for trainer in trainers], student)
    mine, theirs = (trainer._metrics["train"]["self_distillation/distillation_loss"][-1] for trainer in trainers)
    assert mine == pytest.approx(theirs, rel=1e-3)


def test_sdft_of_nothing_is_zero(sdft):
    student = perturbed(make().float())
    batch = completions() | {"teacher_input_ids": torch.ones(2, 7, dtype=torch.int64)}
    batch |= {"teacher_attention_mask": torch.ones(2, 7), "completion_mask": torch.tensor([[1, 0, 0, 0]] * 2)}
    for mode in (*MODES, {"distillation_mode": "sampled_token", "distillation_alpha": 1.0}):
        loss = sdft(with_ours(FusedSDFT, SDFTTrainer), student, **mode).compute_loss(student, batch)
        assert loss == 0 and all(not x.any() for x in gradients(student, loss).values())


@pytest.mark.parametrize("mode", [{"distillation_topk": None}, {"distillation_mode": "top_logits"}])
def test_sdft_refuses_the_settings_that_trl_refuses(sdft, mode):
    student = perturbed(make().float())
    batch = completions() | {"teacher_input_ids": torch.ones(2, 7, dtype=torch.int64)}
    batch["teacher_attention_mask"] = torch.ones(2, 7)
    for kind in (with_ours(FusedSDFT, SDFTTrainer), SDFTTrainer):
        with pytest.raises(ValueError, match=next(iter(mode))):
            sdft(kind, student, **mode).compute_loss(student, batch)


@pytest.mark.parametrize("mode", MODES)
def test_sdft_trains_as_before(sdft, mode):
    """Every sample is trained on twice, so that the second time the student is another than the one that sampled."""
    logs = []
    for kind in (with_ours(FusedSDFT, SDFTTrainer), SDFTTrainer):
        torch.manual_seed(0)
        trainer = sdft(kind, perturbed(make().float()), seed=3, num_iterations=2, **mode)
        trainer.train()
        logs.append(trainer.state.log_history)
    assert_same_logs(logs, "loss", "grad_norm", "self_distillation/distillation_loss")
