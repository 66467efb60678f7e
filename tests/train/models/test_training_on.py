"""A trained adapter as what a run begins with: as student, trained on or merged, and as teacher."""

import json
import re

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from disc_kernels.hf import output_head
from disc_train.cli import main
from disc_train.models.adapters import add_lora, base_of_adapter
from disc_train.models.causal_lm import load_model, use_attention
from tests.train.commands import error_line
from tests.train.runs import losses
from tests.train.world import make_model

TOKENS = torch.arange(20)[None]


def logits(model):
    return model.eval()(TOKENS).logits.float().detach()


@pytest.fixture
def save_adapter(tmp_path):
    """save_adapter(name, architecture=, config=, **options): a folder of a model, and one of an adapter of it.

    The adapter is far from zero; it is `add_lora`'s with the options, or peft's with the config. Also returns what the
    adapted model says of TOKENS.
    """

    def save(name="adapter", architecture="llama", config=None, dtype=torch.float32, **options):
        base, folder = tmp_path / f"{name}-base", tmp_path / name
        make_model(architecture).save_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        if config is None:
            add_lora(model, 4, 8, 0.0, **options)
        else:
            model.add_adapter(config)
        generator = torch.Generator().manual_seed(3)
        for parameter in filter(lambda each: each.requires_grad, model.parameters()):
            parameter.data = parameter.data.float()
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder)
        return base, folder, logits(model)

    return save


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_goes_on_as_the_function_that_it_was(options, dtype, save_adapter):
    """DoRA's norms are left out by transformers, and in bfloat16 it rounds what was trained in float32."""
    _, folder, expected = save_adapter(dtype=dtype, **options)
    student = load_model(str(folder), dtype, "trained")
    assert torch.equal(logits(student), expected)
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}
    assert all((".lora_" in name) == p.requires_grad for name, p in student.named_parameters())
    # As teacher, and as what is evaluated: within a rounding of the adapters to the model's dtype.
    teacher = load_model(str(folder), dtype)
    assert torch.allclose(logits(teacher), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.3)
    merged = load_model(str(folder), torch.float32, "merged")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    if dtype == torch.float32:
        assert torch.allclose(logits(merged), expected, atol=1e-4)
        use_attention(teacher, "auto")


def test_a_merged_adapter_has_experts_too(save_adapter):
    _, folder, expected = save_adapter(architecture="gpt_oss")
    assert torch.allclose(logits(load_model(str(folder), torch.float32, "merged")), expected, atol=1e-4)


def test_an_adapter_on_an_adapter(save_adapter, tmp_path):
    _, first, expected = save_adapter()
    student = add_lora(load_model(str(first), torch.float32, "merged"), 2, 4, 0.0)
    assert torch.allclose(logits(student), expected, atol=1e-4)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    student.save_pretrained(tmp_path / "second")
    assert base_of_adapter(str(tmp_path / "second")) == str(first)
    for adapter in ("as_it_is", "trained", "merged"):
        again = load_model(str(tmp_path / "second"), torch.float32, adapter)
        assert torch.allclose(logits(again), logits(student), atol=1e-4)


def test_adapters_on_the_head(save_adapter):
    """The loss multiplies with the head's weight, so what stands beside it must be in it."""
    on_head = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"])
    _, folder, expected = save_adapter(config=on_head)
    for adapter in ("as_it_is", "merged"):
        model = load_model(str(folder), torch.float32, adapter)
        use_attention(model, "auto")
        assert torch.allclose(logits(model), expected, atol=1e-4)
        hidden = model.model(TOKENS).last_hidden_state
        assert torch.allclose(hidden @ output_head(model).weight.T, expected, atol=1e-4)
    with pytest.raises(ValueError, match=r"got adapters on the head; --lora_rank merges them"):
        load_model(str(folder), torch.float32, "trained")
    _, folder, expected = save_adapter("tied", architecture="qwen2", config=on_head)
    # Its file has the head's own weight, so that what is loaded is tied no more.
    assert torch.allclose(logits(load_model(str(folder), torch.float32)), expected, atol=1e-4)
    for adapter in ("trained", "merged"):
        with pytest.raises(ValueError, match=r"expected .*adapters beside .*layers"):
            load_model(str(folder), torch.float32, adapter)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="this transformers refuses such an adapter"
)
def test_what_an_adapter_trains_beside_its_matrices(save_adapter):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    _, folder, expected = save_adapter(config=config)
    model = load_model(str(folder), torch.float32)
    use_attention(model, "auto")
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match=r"got lm_head\.modules_to_save\.default\.weight; --lora_rank merges"):
        load_model(str(folder), torch.float32, "trained")


def test_adapters_that_cannot_be_loaded(save_adapter):
    base, folder, _ = save_adapter()
    make_model(num_hidden_layers=1).save_pretrained(base)
    for adapter in ("as_it_is", "trained"):
        with pytest.raises(ValueError, match=r"expected .*adapter.* got others: model\.layers\.1"):
            load_model(str(folder), torch.float32, adapter)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "PREFIX_TUNING", "base_model_name_or_path": str(base)})
    )
    with pytest.raises(ValueError, match="expected a LoRA adapter, got one of type"):
        load_model(str(folder), torch.float32)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="expected JSON with a base_model_name_or_path"):
        load_model(str(folder), torch.float32)


def test_dora_of_experts_is_refused():
    with pytest.raises(ValueError, match="--lora_use_dora: expected linear layers, got experts"):
        add_lora(make_model("gpt_oss"), 2, 4, 0.0, dora=True)


@pytest.fixture
def command(write_documents, sentences, tokenizer, tmp_path):
    """command(name, model, *flags): the exit code of two plain steps, of adapters without dropout."""

    def call(name, model, *flags):
        documents = write_documents(" ".join(text) for text in sentences[:4])
        return main(
            [
                *("--model_name_or_path", str(model), "--train_file", str(documents)),
                *("--output_dir", str(tmp_path / name), "--save_strategy", "no", "--logging_steps", "1"),
                *("--per_device_train_batch_size", "4", "--max_steps", "2", "--learning_rate", "1e-2"),
                *("--signal_examples", "2", "--use_cpu", "true", *map(str, flags)),
            ]
        )

    return call


def test_a_run_goes_on_with_an_adapter_and_its_teacher_is_what_it_began_with(
    command, save_adapter, tokenizer, tmp_path, capsys, recwarn
):
    base, folder, before = save_adapter()
    tokenizer.save_pretrained(base)
    assert command("on", folder) == 0
    out = capsys.readouterr().out
    assert re.search(r"student .* 34,720 parameters|student .* trained, in adapters, float32", out)
    assert re.search(r"teacher +LlamaForCausalLM, [\d,]+ parameters, 0 trained, float32", out)
    assert "head          frozen; the comparison takes 3 products" in out
    assert f"--reference_name_or_path {folder};" in out.replace(" --texts_file", ";")
    code = re.search(r"in Python +(.*)\n", out)[1]
    loaded = eval(code, {"PeftModel": PeftModel, "AutoModelForCausalLM": transformers.AutoModelForCausalLM})
    after = logits(load_model(str(tmp_path / "on"), torch.float32))
    assert torch.allclose(logits(loaded), after, atol=1e-5) and not torch.allclose(after, before, atol=1e-3)

    # Merged below new adapters, and as another model's teacher, it is the same function: the same first loss.
    assert command("merged", folder, "--lora_rank", 2, "--lora_dropout", 0, "--teacher", "adapter") == 0
    assert not [warning for warning in recwarn if "config file" in str(warning.message)]
    out = capsys.readouterr().out
    assert "the student without its adapters" in out
    code = re.search(r"in Python +(.*)\n", out)[1]
    loaded = eval(code, {"PeftModel": PeftModel, "AutoModelForCausalLM": transformers.AutoModelForCausalLM})
    assert torch.allclose(logits(loaded), logits(load_model(str(tmp_path / "merged"), torch.float32)), atol=1e-4)
    load_model(str(folder), torch.float32, "merged").save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    assert command("copy", tmp_path / "whole", "--teacher_name_or_path", folder) == 0
    firsts = [losses(tmp_path / name)[0] for name in ("on", "merged", "copy")]
    assert firsts == pytest.approx([firsts[0]] * 3, rel=1e-4)
    capsys.readouterr()
    assert command("none", base, "--lora_use_dora") == 2
    assert "--lora_use_dora needs --lora_rank" in error_line(capsys, 2)


def test_dora_is_trained_saved_and_its_checkpoint_goes_on(command, save_adapter, tokenizer, tmp_path):
    base, _, _ = save_adapter()
    tokenizer.save_pretrained(base)
    flags = ("--lora_rank", 2, "--lora_use_dora", "--lora_use_rslora", "--lora_dropout", 0)
    flags += ("--lr_scheduler_type", "constant")
    assert command("whole", base, *flags) == 0
    again = ("--save_strategy", "steps", "--save_steps", 1, *flags, "--resume_from_checkpoint", "true")
    for steps in (1, 2):
        assert command("parts", base, *again, "--max_steps", steps) == 0
    whole, parts = (load_model(str(tmp_path / name), torch.float32, "trained") for name in ("whole", "parts"))
    assert parts.peft_config["default"].use_dora and parts.peft_config["default"].use_rslora
    for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert not torch.allclose(logits(parts), logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-3)
