"""How many tokens the models read, from their configs."""

import copy

import pytest
from transformers import (
    DogeConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    Phi3Config,
    TrainingArguments,
    XLNetConfig,
)

from disc_train.data.context_length import DOGE, LONGROPE, ContextLength, context_length
from disc_train.trainer import DiscTrainer
from tests.train.world import make_model

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
        (XLNetConfig(), None),  # -1 in its config
        (DogeConfig(keep_window_size=64), ContextLength(64, "model", DOGE)),
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


@pytest.mark.parametrize("rope", [LONG, {"rope_type": "dynamic", "factor": 4.0}], ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("reader", ["model", "teacher"])
def test_examples_beyond_the_context_are_refused_from_python_too(rope, reader, make_dataset, tmp_path):
    """Positions beyond it depend on the longest text of a batch: the gradient is off by 16 to 40 % without a word."""
    plain = make_model()
    config = copy.deepcopy(plain.config)
    config.rope_parameters = rope | {"rope_theta": 1e4}
    config.max_position_embeddings = 256 if rope is LONG else 64
    bent = type(plain)(config)
    student, teacher = (bent, plain) if reader == "model" else (plain, bent)
    args = TrainingArguments(tmp_path, use_cpu=True)
    with pytest.raises(ValueError, match=f"doc2: expected .* at most 64 tokens .* the {reader} can read.*, got 213"):
        DiscTrainer(student, teacher, args, make_dataset())
    DiscTrainer(student, teacher, args, make_dataset(1))
