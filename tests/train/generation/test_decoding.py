"""Continuations do not depend on the batch, also for models that do not follow the mask of padding."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from disc_train.generation.decoding import continue_prompts, find_batching

COMMON = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 4, "initializer_range": 0.2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
DISTURBED = {
    "rwkv": ("alone", {"attention_hidden_size": 32, "intermediate_size": 48, "context_length": 256}),
    "recurrent_gemma": ("equal lengths", HEADS | {"lru_width": 32, "attention_window_size": 16, "pad_token_id": None}),
    "deepseek_v4": ("equal lengths", HEADS),
}


@pytest.mark.parametrize("model_type", DISTURBED)
def test_models_that_other_texts_of_a_batch_disturb(model_type, tokenizer):
    batching, options = DISTURBED[model_type]
    config = AutoConfig.for_model(model_type, **COMMON | options)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert find_batching(model) == batching
    prompts = [torch.randint(1, 300, (length,)).tolist() for length in (3, 40, 17, 8, 8, 30)]
    alone = [next(continue_prompts(model, tokenizer, [prompt], 8))[1:] for prompt in prompts]
    assert sorted(continue_prompts(model, tokenizer, prompts, 8)) == [
        (index, *continuation) for index, continuation in enumerate(alone)
    ]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_follow_the_mask(architecture, dtype, make_model):
    assert find_batching(make_model(architecture).eval().to(dtype)) == "padded"
