"""Greedy answers are those of `generate` on one prompt at a time; answers are compared by their words."""

import pytest
import torch

from disc_train.evaluation import Probe, greedy_answers
from disc_train.evaluation.answers import contains_answer, is_answer

PROMPTS = ["The quarry is at", "It opened in the", "Was", "A plaque on the northern tower tells her story. Nobody"]


@torch.no_grad()
def _alone(model, tokenizer, prompt, max_new_tokens):
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    return new[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_answers_in_batches(architecture, batch_size, make_model, tokenizer):
    model = make_model(architecture).eval()
    probes = [Probe(prompt, ["x"], 0) for prompt in PROMPTS] + [Probe(PROMPTS[0], ["x"], 0, PROMPTS[1])]
    expected = [tokenizer.decode(_alone(model, tokenizer, p.context + p.prompt, 12)) for p in probes]
    assert greedy_answers(model, tokenizer, probes, 12, batch_size) == expected


def test_an_answer_stops_at_the_end_token(make_model, tokenizer):
    model = make_model().eval()
    full = [_alone(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    model.generation_config.eos_token_id = [full[0][3], 299]
    stops = [ids.index(full[0][3]) if full[0][3] in ids else 12 for ids in full]
    found = greedy_answers(model, tokenizer, [Probe(prompt, ["x"], 0) for prompt in PROMPTS], 12)
    assert found[0] == tokenizer.decode(full[0][: stops[0] + 1])
    assert found == [tokenizer.decode(ids[: stop + 1]) for ids, stop in zip(full, stops, strict=True)]
    assert min(stops) < 12


def test_sampling_and_penalties_of_the_model_are_left_aside(make_model, tokenizer):
    model = make_model().eval()
    probes = [Probe(prompt, ["x"], 0) for prompt in PROMPTS]
    expected = greedy_answers(model, tokenizer, probes, 12)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=3.0)
    assert greedy_answers(model, tokenizer, probes, 12) == expected


def test_a_prompt_without_tokens_is_named(make_model, tokenizer):
    with pytest.raises(ValueError, match=r"probes\[0\]: expected tokens in the prompt"):
        greedy_answers(make_model(), tokenizer, [Probe("", ["x"], 0)], 4)


@pytest.mark.parametrize(
    ("given", "wanted", "exact", "contains"),
    [
        (" Coal.", "coal", True, True),
        ("It carries coal, of course.", "coal", False, True),
        ("charcoal", "coal", False, False),
        ("the  red\nstone!", "Red stone", False, True),
        ("stone red", "red stone", False, False),
        ("+", "+", True, True),
        ("5", "+", False, False),
        ("", "coal", False, False),
    ],
)
def test_words_are_compared(given, wanted, exact, contains):
    assert is_answer(given, wanted) is exact
    assert contains_answer(given, wanted) is contains
