"""Which parameters of a model text reaches."""

import torch
from torch import nn

from disc_train.models.adapters import add_lora
from disc_train.models.parts import uses_all_parameters
from tests.train.world import make_model


def test_whether_every_trained_parameter_is_used():
    for model in (make_model().train(), make_model("qwen2"), add_lora(make_model(), rank=2, alpha=4, dropout=0.1)):
        state, training = torch.get_rng_state(), model.training
        assert uses_all_parameters(model)
        assert torch.equal(torch.get_rng_state(), state)
        assert model.training == training
        decoder = model.model
        decoder.unused = nn.Linear(2, 2)
        assert not uses_all_parameters(model)
        decoder.unused.requires_grad_(False)
        assert uses_all_parameters(model)
        model.config.layerdrop = 0.1
        assert not uses_all_parameters(model)
