"""What is saved at the end of a run: the dtype of the files it began with, tied weights once, the processor's files."""

import json

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from disc_train.config import DiscArguments
from disc_train.models.adapters import add_lora
from disc_train.models.saving import convert
from disc_train.run import find_save_dtype
from disc_train.trainer import DiscTrainer
from tests.shared_prefix.models import GROUPED
from tests.train.world import make_model, run_arguments


@pytest.fixture
def train(make_dataset, tmp_path):
    """train(student, save_dtype=, save_strategy=): a trainer after two steps, which has saved its model."""

    def run(student, save_dtype=None, save_strategy="no", dataset=None):
        args = run_arguments(tmp_path / "out", max_steps=2, save_strategy=save_strategy, save_steps=1)
        trainer = DiscTrainer(student, None, args, dataset or make_dataset(), method="ft")
        trainer.save_dtype = save_dtype
        trainer.train()
        trainer.save_model()
        return trainer

    return run


def saved(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # qwen2's head is tied to its embeddings
def test_the_model_is_saved_in_its_dtype_and_checkpoints_exactly(architecture, train, tmp_path):
    trainer = train(make_model(architecture), torch.bfloat16, save_strategy="steps")
    final, checkpoint = saved(tmp_path / "out"), saved(tmp_path / "out" / "checkpoint-2")
    weights = trainer.model.state_dict()
    assert final.keys() == checkpoint.keys()
    assert ("lm_head.weight" in final) == (architecture == "llama")
    for name, value in checkpoint.items():
        assert torch.equal(value, weights[name])
        assert torch.equal(final[name], value.bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "out" / "checkpoint-2" / "config.json").read_text())["dtype"] == "float32"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    assert trainer.model.dtype == torch.float32


def test_adapters_are_saved_alone_in_their_dtype(train, tmp_path):
    train(add_lora(make_model(), rank=2, alpha=4, dropout=0.0), torch.bfloat16)
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", framework="pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert dtypes == {torch.bfloat16}


def test_auto_is_what_the_files_were(tmp_path):
    def found(**flags):
        return find_save_dtype(DiscArguments(str(tmp_path), train_file="a.jsonl", **flags))

    for dtype in (torch.bfloat16, torch.float32):
        make_model().to(dtype).save_pretrained(tmp_path)
        assert found() == dtype
    assert found(save_dtype="float16") == torch.float16
    assert found(lora_rank=2) is None


def test_tied_weights_of_a_divided_model_are_saved_once():
    """Whole again, the two are tensors of their own."""
    model = make_model("qwen2")
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    weights = convert(model, whole, torch.bfloat16)
    assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]


def test_values_that_the_dtype_does_not_hold_are_named_and_saved_in_the_one_that_was_trained(train, tmp_path):
    trainer = train(make_model())
    with torch.no_grad():
        trainer.model.lm_head.weight[3, 3] = 1e6
    trainer.save_dtype = torch.float16
    with pytest.warns(UserWarning, match=r"--save_dtype: .* holds the values of lm_head.weight, got float16: saved in"):
        trainer.save_model()
    for name, value in saved(tmp_path / "out").items():
        assert torch.equal(value, trainer.model.state_dict()[name])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert trainer.save_dtype is None  # so the summary does not name another


def test_of_a_model_that_reads_images_only_what_text_reaches_is_trained(train, make_dataset, tmp_path):
    """With a vision tower that waits for a gradient, DDP ends in "Expected to have finished reduction"."""
    text = GROUPED | {"vocab_size": 300, "head_dim": 8, "sliding_window": 6, "max_position_embeddings": 256}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text | {"layer_types": ["sliding_attention", "full_attention"]},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text("{}")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    trainer = train(model, torch.bfloat16, dataset=make_dataset(1))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "language_model" in name or "lm_head" in name}
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == "{}"
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == written["text_config"]["dtype"] == written["vision_config"]["dtype"] == "bfloat16"
    model.zero_grad()
    batch = trainer.data_collator([make_dataset()[0]])
    trainer.training_step(model, batch, num_items_in_batch=batch["num_examples"])
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    adapted = add_lora(AutoModelForCausalLM.from_config(config), rank=2, alpha=4, dropout=0.0)
    assert not [name for name, _ in adapted.named_parameters() if ".lora_" in name and "vision" in name]
