"""The lowest layers left as they are: what is trained, what it learns, and which models are refused."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, OpenAIGPTConfig, OpenAIGPTLMHeadModel

from disc_train.cli import main
from disc_train.models.causal_lm import use_attention
from disc_train.models.frozen_head import head_is_frozen
from disc_train.models.frozen_layers import freeze_layers
from disc_train.objectives.methods import Settings, batch_loss
from disc_train.packing.collator import collator
from tests.train.world import make_model, perturbed


@pytest.mark.parametrize(("architecture", "tied"), [("llama", False), ("qwen2", True)])
def test_what_is_trained_gets_the_gradient_that_it_gets_in_the_whole_model(architecture, tied, make_dataset):
    dataset, teacher = make_dataset(3, num_splits=2), make_model(architecture).double().eval()
    trained = perturbed(teacher)
    frozen = freeze_layers(copy.deepcopy(trained), 1)
    assert head_is_frozen(frozen) is tied
    losses = []
    for student in (trained, frozen):
        for model in (student, teacher):
            use_attention(model, "auto")
        batch = collator(student, teacher, compare_all=True)([dataset[i] for i in range(3)])
        losses.append(batch_loss("disc", student, teacher, batch, Settings()))
        losses[-1].backward()
    assert torch.allclose(losses[0], losses[1], rtol=1e-12, atol=0)
    for (name, want), got in zip(trained.named_parameters(), frozen.parameters(), strict=True):
        if name.startswith(("model.embed_tokens.", "model.layers.0.")):
            assert got.grad is None and want.grad.abs().max() > 0, name
        else:
            assert torch.allclose(got.grad, want.grad, rtol=1e-9, atol=1e-12), name


def test_models_without_a_layer_left_or_without_a_list_of_layers_are_refused():
    with pytest.raises(ValueError, match=r"--freeze_layers: expected fewer than the 2 layers of the model, got 2"):
        freeze_layers(make_model("llama"), 2)
    old = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match=r"--freeze_layers: expected a model with one list of layers, got 0 in OpenAI"):
        freeze_layers(old, 1)


@pytest.fixture
def train(model_folder, write_documents, sentences, tmp_path):
    """train(*flags): the exit code of a run of one epoch on three documents, saved in tmp_path / "out"."""
    documents = write_documents(" ".join(text) for text in sentences[:3])

    def run(*flags, model=model_folder):
        common = ("--model_name_or_path", str(model), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true")
        common += ("--train_file", str(documents), "--num_train_epochs", "1", "--learning_rate", "1e-3")
        return main([*common, *flags])

    return run


def test_the_command_leaves_the_lowest_layers_alone(train, model_folder, tmp_path, capsys):
    assert train("--freeze_layers", "1") == 0
    before, after = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (model_folder, tmp_path / "out"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    below = {name for name in before if name.startswith(("model.embed_tokens.", "model.layers.0."))}
    assert below == same and len(below) < len(before)
    trained = sum(before[name].numel() for name in before.keys() - below)
    assert f"{trained:,} trained" in capsys.readouterr().out


def test_adapters_and_numbers_that_are_none_are_refused(train, tmp_path, capsys):
    assert train("--freeze_layers", "-1") != 0
    assert "--freeze_layers: expected 0 (all layers are trained) or more, got -1" in capsys.readouterr().err
    assert train("--freeze_layers", "1", "--lora_rank", "2") != 0
    assert "--freeze_layers: expected weights that are trained, got --lora_rank" in capsys.readouterr().err
    assert train("--lora_rank", "2") == 0
    adapter = (tmp_path / "out").rename(tmp_path / "adapter")
    assert train("--freeze_layers", "1", model=adapter) != 0
    expected = f"--freeze_layers: expected a model whose weights are trained, got adapters: {adapter}"
    assert expected in capsys.readouterr().err


def test_a_run_does_not_go_on_with_other_layers_frozen(train, capsys):
    assert train("--freeze_layers", "1", "--save_strategy", "epoch") == 0
    assert train("--save_strategy", "epoch", "--num_train_epochs", "2", "--resume_from_checkpoint", "true") != 0
    assert "--freeze_layers: expected 1, with which " in capsys.readouterr().err
