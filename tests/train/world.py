"""Make tiny models of several architectures, the same at every call."""

import copy

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainingArguments,
)

SENTENCES = [
    "The river Aral was named after the surveyor who first crossed it.",
    "Nobody in the valley had seen a bridge of that kind before.",
    "It opened in the spring.",
    "Its two towers are built of red stone from the quarry at Merin.",
    "The surveyor lived in Merin for the rest of her life!",
    "Was the quarry ever closed?",
    "A plaque on the northern tower tells her story.",
    "Trains cross the river twice a day.",
]

# Small weights would make all logits nearly equal and hide errors, so the initial spread is large.
COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
GEMMA2 = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 8,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
# With learned attention sinks, and with experts.
GPT_OSS = {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
ARCHITECTURES = {
    "llama": lambda options: LlamaForCausalLM(LlamaConfig(**COMMON | options)),
    "qwen2": lambda options: Qwen2ForCausalLM(Qwen2Config(**COMMON | {"tie_word_embeddings": True} | options)),
    "qwen3": lambda options: Qwen3ForCausalLM(Qwen3Config(**COMMON | {"head_dim": 8} | options)),
    "gpt_oss": lambda options: GptOssForCausalLM(GptOssConfig(**COMMON | GPT_OSS | options)),
    "gemma2": lambda options: Gemma2ForCausalLM(Gemma2Config(**COMMON | GEMMA2 | options)),
}


def make_model(architecture="llama", **options):
    """Make a tiny random model; `options` are of its config."""
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture](options)
    model.set_attn_implementation("eager")
    return model


def run_arguments(folder, **options):
    """Make the arguments of a run on the CPU that logs nowhere and saves nothing, unless the options say so."""
    options = {"save_strategy": "no"} | options
    return TrainingArguments(folder, use_cpu=True, report_to="none", disable_tqdm=True, **options)


def perturbed(model, scale=0.05):
    """Copy a model and move every weight, so that it is as different from the original as a trained student."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return other
