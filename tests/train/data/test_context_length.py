"""How many tokens the models read, from their configs."""

import pytest
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, MambaConfig, Phi3Config

from disc_train.data.context_length import LONGROPE, ContextLength, context_length

LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 64,
}
GEMMA_ROPES = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": LONG}


@pytest.fixture
def save(tmp_path):
    """save(config, name): the path of a folder with that config alone."""

    def write(config, name="model"):
        config.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=256), ContextLength(256, "model")),
        (GPT2Config(n_positions=128), ContextLength(128, "model")),
        (MambaConfig(), None),
        (
            Phi3Config(
                hidden_size=32,
                num_attention_heads=4,
                max_position_embeddings=512,
                original_max_position_embeddings=64,
                rope_parameters=LONG | {"rope_theta": 1e4},
            ),
            ContextLength(64, "model", LONGROPE),
        ),
        (
            Gemma3TextConfig(max_position_embeddings=512, head_dim=8, rope_parameters=GEMMA_ROPES),
            ContextLength(64, "model", LONGROPE),
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_of_one_model(config, expected, save):
    assert context_length(save(config), None) == expected


@pytest.mark.parametrize(("tokens", "expected"), [(100, (100, "teacher")), (300, (256, "model"))])
def test_the_smaller_of_two(tokens, expected, save):
    model, teacher = (save(LlamaConfig(max_position_embeddings=n), str(n)) for n in (256, tokens))
    assert context_length(model, teacher) == ContextLength(*expected)
