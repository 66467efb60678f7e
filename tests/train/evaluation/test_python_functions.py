"""Choices are scored as a forward over each alone would; the KL is the full-logit one."""

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from disc_train.evaluation import Probe, choice_accuracy, kl_to_reference

CHOICES = [" Merin.", " the northern tower of red stone.", " spring.", " her life!"]
PROMPTS = [
    "The quarry is at",
    "It opened in the",
    "It opened in the spring. The surveyor lived in",
    "Was",
]


@torch.no_grad()
def _likeliest(model, tokenizer, prompt, choices):
    scores = []
    for choice in choices:
        before, ids = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, choice))
        log_probabilities = log_softmax(model(torch.tensor([before + ids])).logits[0], dim=-1)
        scores.append(sum(log_probabilities[len(before) + i - 1, token] for i, token in enumerate(ids)) / len(ids))
    return int(torch.stack(scores).argmax())


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


@torch.no_grad()
def test_kl_to_a_reference(make_model, perturbed, tokenizer):
    reference = make_model("gemma2").eval()
    model = perturbed(reference)
    texts = [*PROMPTS, ""]
    rows = []
    for text in PROMPTS:
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        q, p = (log_softmax(m(ids).logits[0], dim=-1) for m in (model, reference))
        rows.append(kl_div(q, p, log_target=True, reduction="none").sum(-1))
    assert kl_to_reference(model, reference, tokenizer, texts) == pytest.approx(float(torch.cat(rows).mean()), rel=1e-5)
    assert kl_to_reference(reference, reference, tokenizer, texts) == pytest.approx(0.0, abs=1e-7)
    with pytest.raises(ValueError, match="texts"):
        kl_to_reference(model, reference, tokenizer, [""])
