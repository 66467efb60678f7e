"""Heads of models that do random things to their logits: the loss is that of the logits, or the head is refused."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from disc_kernels import fused_suffix_kl
from disc_kernels.hf import check_output_head, last_hidden_states, output_head
from disc_kernels.hf.head import DIVISORS, FACTORS, SOFTCAPS

IDS = torch.arange(10).view(2, 5)


class Model(nn.Module):
    """Embeddings and a head, whose logits are changed as `does` says; `config` is what others read."""

    def __init__(self, vocab, width, bias, does, entries):
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, width), nn.Linear(width, vocab, bias=bias)
        self.config = SimpleNamespace(model_type="random", **does, unpadded_vocab_size=entries)
        self.config.get_text_config = lambda: self.config
        self.does, self.entries = does, entries

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids):
        z = self.head(self.embedding(input_ids))
        for name, value in self.does.items():
            z = z * value if name in FACTORS else z / value if name in DIVISORS else z
        for name in SOFTCAPS:
            z = self.does[name] * torch.tanh(z / self.does[name]) if name in self.does else z
        return SimpleNamespace(logits=z[..., : self.entries])


@st.composite
def models(draw):
    does = draw(st.dictionaries(st.sampled_from([*FACTORS, *DIVISORS]), st.floats(0.3, 3.0), max_size=2))
    if draw(st.booleans()):
        does[draw(st.sampled_from(SOFTCAPS))] = draw(st.floats(1.0, 20.0))
    vocab = draw(st.integers(2, 40))
    arguments = vocab, draw(st.integers(1, 12)), draw(st.booleans()), does, draw(st.none() | st.integers(2, vocab))
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 1000)))
        return Model(*arguments).double(), Model(*arguments).double()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(pair=models(), divergence=st.sampled_from(["forward_kl", "reverse_kl"]))
def test_the_loss_is_that_of_the_models_logits(pair, divergence):
    student, teacher = pair
    for model in pair:
        check_output_head(model, IDS)
    with torch.no_grad():
        other = last_hidden_states(teacher, input_ids=IDS), output_head(teacher)
    hidden = last_hidden_states(student, input_ids=IDS)
    loss = fused_suffix_kl(hidden, output_head(student), *other, divergence=divergence)
    log_q, log_p = student(IDS).logits.log_softmax(-1), teacher(IDS).logits.detach().log_softmax(-1)
    a, b = (log_p, log_q) if divergence == "forward_kl" else (log_q, log_p)
    expected = (a.exp() * (a - b)).sum(-1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-13)
    parameters = list(student.parameters())
    for mine, right in zip(*(torch.autograd.grad(x, parameters) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-8, atol=1e-12)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(pair=models(), name=st.sampled_from([*FACTORS, *DIVISORS]), factor=st.sampled_from([0.5, 0.99, 1.01, 2.0]))
def test_a_config_that_says_something_else_is_refused(pair, name, factor):
    model = pair[0]
    setattr(model.config, name, factor * model.does.get(name, 1.0))
    with pytest.raises(ValueError, match="differ by up to"):
        check_output_head(model, IDS)
