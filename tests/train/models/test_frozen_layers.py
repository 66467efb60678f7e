"""The lowest layers left as they are: what is trained, what it learns, and which models are refused."""

import copy
import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

from disc_kernels.hf.forward import decoder_of
from disc_train.cli import main
from disc_train.models.causal_lm import use_attention
from disc_train.models.frozen_head import head_is_frozen
from disc_train.models.frozen_layers import count_frozen, freeze_layers
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


@pytest.mark.parametrize("family", ["bloom", "opt", "llama"])
def test_nothing_is_trained_that_a_text_passes_before_the_layers_that_are(family):
    """BLOOM has a norm there, OPT a projection; the gradient at what the first trained layer reads ends there."""
    if family == "bloom":
        model = BloomForCausalLM(BloomConfig(vocab_size=20, hidden_size=8, n_layer=3, n_head=2))
    elif family == "opt":
        sizes = {"hidden_size": 8, "word_embed_proj_dim": 4, "ffn_dim": 8, "num_hidden_layers": 3}
        model = OPTForCausalLM(OPTConfig(vocab_size=20, num_attention_heads=2, max_position_embeddings=16, **sizes))
    else:
        model = make_model("llama", num_hidden_layers=3)
    assert count_frozen(model) == (0, 3)
    freeze_layers(model, 2)
    assert count_frozen(model) == (2, 3)
    layer = next(each for each in decoder_of(model).modules() if isinstance(each, torch.nn.ModuleList))[2]
    read = []
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: read.extend((*args, *kwargs.values())), with_kwargs=True
    )
    model(input_ids=torch.arange(6)[None], use_cache=False).logits.sum().backward()
    hidden = [each for each in read if isinstance(each, torch.Tensor) and each.is_floating_point()]
    assert hidden and not any(each.requires_grad for each in hidden)
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_models_without_a_layer_left_or_without_a_list_of_layers_are_refused():
    with pytest.raises(ValueError, match=r"--freeze_layers: expected fewer than the 2 layers of the model, got 2"):
        freeze_layers(make_model("llama"), 2)
    old = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match=r"expected a model with one list of layers .*, got 0 in OpenAIGPTModel"):
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
    said = capsys.readouterr().out
    assert f"{trained:,} trained" in said and "the embeddings and the lowest 1 of 2 layers stay as they are" in said


def test_adapters_and_numbers_that_are_none_are_refused(train, tmp_path, capsys):
    assert train("--freeze_layers", "-1") != 0
    assert "--freeze_layers: expected 0 (all layers are trained) or more, got -1" in capsys.readouterr().err
    assert train("--freeze_layers", "1", "--lora_rank", "2") != 0
    assert "--freeze_layers: with --lora_rank no layer is trained anyway, got both" in capsys.readouterr().err
    assert train("--lora_rank", "2") == 0
    adapter = (tmp_path / "out").rename(tmp_path / "adapter")
    assert train("--freeze_layers", "1", model=adapter) != 0
    expected = f"--freeze_layers: adapters leave all layers as they are, got some to train on: {adapter}"
    assert expected in capsys.readouterr().err


def test_a_run_does_not_go_on_with_other_layers_frozen(train, tmp_path, capsys):
    assert train("--freeze_layers", "1", "--save_strategy", "epoch") == 0
    assert train("--save_strategy", "epoch", "--num_train_epochs", "2", "--resume_from_checkpoint", "true") != 0
    assert "--freeze_layers: expected 1, with which " in capsys.readouterr().err
    (settings,) = (tmp_path / "out").glob("*/disc_train_settings.json")
    older = json.loads(settings.read_text())
    del older["freeze_layers"]  # of a version that did not have it
    settings.write_text(json.dumps(older))
    assert train("--freeze_layers", "1", "--num_train_epochs", "2", "--resume_from_checkpoint", "true") != 0
    assert "--freeze_layers: expected 0, with which " in capsys.readouterr().err
