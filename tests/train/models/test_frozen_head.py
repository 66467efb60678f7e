"""A head that is left as it is: what moves, what does not, and what the summary says."""

import copy

import pytest
import torch

from disc_train.models.adapters import add_lora
from disc_train.models.causal_lm import use_attention
from disc_train.models.frozen_head import freeze_head, head_is_frozen
from disc_train.objectives.methods import Settings, batch_loss
from disc_train.packing.collator import collator
from disc_train.summary import describe_head
from tests.train.runs import weights
from tests.train.world import make_model, perturbed


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("method", ["disc", "ft", "split_ft"])
def test_the_loss_and_all_other_gradients_are_those_of_a_trained_head(method, architecture, make_dataset):
    """llama's head is its own, qwen2's tied, gemma2's tied and soft-capped."""
    dataset, teacher = make_dataset(3, num_splits=2), make_model(architecture).double().eval()
    trained = perturbed(teacher)
    frozen = freeze_head(copy.deepcopy(trained))
    losses = []
    for student in (trained, frozen):
        for model in (student, teacher):
            use_attention(model, "auto")
        batch = collator(student, teacher, compare_all=method == "disc")([dataset[i] for i in range(3)])
        losses.append(batch_loss(method, student, teacher, batch, Settings()))
        losses[-1].backward()
    assert torch.allclose(losses[0], losses[1], rtol=1e-12, atol=0)
    head = frozen.get_output_embeddings().weight
    for (name, want), got in zip(trained.named_parameters(), frozen.parameters(), strict=True):
        if got is head:
            assert got.grad is None and want.grad is not None, name
        else:
            assert torch.allclose(got.grad, want.grad, rtol=1e-9, atol=1e-12), name


def test_what_is_frozen():
    model = make_model("llama")
    assert not head_is_frozen(model)
    assert describe_head(model, None, compared=True).startswith("trained; the comparison takes 4 products")
    assert describe_head(model, None, compared=False) == "trained"
    assert "6 products" in describe_head(model, None, compared=True, kl_clip=1.0)
    assert head_is_frozen(add_lora(make_model("llama"), rank=2, alpha=4, dropout=0.0))
    tied = freeze_head(make_model("qwen2"))
    assert head_is_frozen(tied) and not tied.get_input_embeddings().weight.requires_grad
    text = describe_head(tied, None, compared=True)
    assert "tied" in text and "3 products" in text


def test_an_adapter_on_the_head_trains_it():
    from peft import LoraConfig

    model = make_model("llama")
    model.add_adapter(LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head", "q_proj"]))
    assert not head_is_frozen(model)


def test_the_command_leaves_the_head_alone(disc_train_once, model_folder, tmp_path, capsys):
    assert disc_train_once("--freeze_head") == 0
    assert "head          frozen; the comparison takes 3 products" in capsys.readouterr().out
    from transformers import AutoModelForCausalLM

    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (model_folder, tmp_path / "out"))
    assert torch.equal(before.lm_head.weight, after.lm_head.weight)
    assert not torch.equal(weights(model_folder), weights(tmp_path / "out"))


@pytest.fixture
def disc_train_once(model_folder, write_documents, sentences, tmp_path):
    """disc_train_once(*flags): the exit code of a run of one epoch on three documents."""
    from disc_train.cli import main

    def run(*flags):
        return main(
            [
                *("--model_name_or_path", str(model_folder), "--output_dir", str(tmp_path / "out")),
                *("--train_file", str(write_documents(" ".join(text) for text in sentences[:3]))),
                *("--num_train_epochs", "1", "--learning_rate", "1e-3", "--use_cpu", "true", *flags),
            ]
        )

    return run
