"""Choices are scored as a forward over each alone would score them, with full logits."""

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import Lfm2Config, Lfm2ForCausalLM

from disc_train.evaluation import Probe, choice_accuracy, choice_scores

CHOICES = [" Merin.", " the northern tower of red stone.", " spring.", " her life!"]
PROMPTS = [
    "The quarry is at",
    "It opened in the",
    "It opened in the spring. The surveyor lived in",
    "Was",
]


@torch.no_grad()
def _scores(model, tokenizer, prompt, choices):
    scores = []
    for choice in choices:
        before, ids = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, choice))
        log_probabilities = log_softmax(model(torch.tensor([before + ids])).logits[0], dim=-1)
        scores.append(sum(log_probabilities[len(before) + i - 1, token] for i, token in enumerate(ids)) / len(ids))
    return torch.stack(scores)


def _likeliest(model, tokenizer, prompt, choices):
    return int(_scores(model, tokenizer, prompt, choices).argmax())


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_the_likeliest_choice_is_found(architecture, batch_size, make_model, tokenizer):
    model = make_model(architecture).eval()
    likeliest = [_likeliest(model, tokenizer, prompt, CHOICES) for prompt in PROMPTS]
    right = [Probe(prompt, CHOICES, answer) for prompt, answer in zip(PROMPTS, likeliest, strict=True)]
    assert choice_accuracy(model, tokenizer, right, batch_size) == 1.0
    wrong = [Probe(probe.prompt, CHOICES, (probe.answer + 1) % 4) for probe in right]
    assert choice_accuracy(model, tokenizer, wrong, batch_size) == 0.0
    assert choice_accuracy(model, tokenizer, [right[0], *wrong[1:]], batch_size) == 0.25


def test_the_context_comes_before_the_prompt(make_model, tokenizer):
    model = make_model().eval()
    context = "Trains cross the river twice a day. "
    for prompt in PROMPTS:
        answer = _likeliest(model, tokenizer, context + prompt, CHOICES)
        assert choice_accuracy(model, tokenizer, [Probe(prompt, CHOICES, answer, context)]) == 1.0


def test_bad_probes_are_named(make_model, tokenizer):
    with pytest.raises(ValueError, match="answer: expected an index of the 2 choices, got 2"):
        Probe("a", ["b", "c"], 2)
    with pytest.raises(ValueError, match="probes: expected at least one"):
        choice_accuracy(make_model(), tokenizer, [])
    with pytest.raises(ValueError, match=r"probes\[1\]"):
        choice_accuracy(make_model(), tokenizer, [Probe("a", ["b"], 0), Probe("a", [""], 0)])


def test_scores_are_means_of_log_probabilities(make_model, tokenizer):
    model = make_model("gemma2").eval()
    contexts = ["", "Trains cross the river twice a day. ", "", "A plaque tells her story. "]
    probes = [Probe(prompt, CHOICES, 0, context) for prompt, context in zip(PROMPTS, contexts, strict=True)]
    expected = [_scores(model, tokenizer, probe.context + probe.prompt, CHOICES).tolist() for probe in probes]
    for limits in ((1,), (64,), (64, 100)):
        assert choice_scores(model, tokenizer, probes, *limits) == [pytest.approx(each, rel=1e-4) for each in expected]


def test_a_model_that_cannot_share_a_prompt(tokenizer):
    torch.manual_seed(0)
    config = Lfm2Config(
        **{"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4},
        **{"num_hidden_layers": 2, "num_key_value_heads": 2, "full_attn_idxs": [1], "initializer_range": 0.2},
    )
    model = Lfm2ForCausalLM(config).eval()
    expected = [_scores(model, tokenizer, prompt, CHOICES).tolist() for prompt in PROMPTS]
    found = choice_scores(model, tokenizer, [Probe(prompt, CHOICES, 0) for prompt in PROMPTS])
    assert found == [pytest.approx(each, rel=1e-4) for each in expected]
