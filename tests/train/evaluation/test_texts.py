"""Losses, KL and entropies are those of full logits, text by text."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from disc_train.evaluation import kl_to_reference, perplexity, text_sums
from disc_train.evaluation.results import TextSums

TEXTS = ["The quarry is at", "", "It opened in the spring. The surveyor lived in", "W", "Was the quarry ever closed?"]


@pytest.fixture
def pair(make_model, perturbed):
    reference = make_model("gemma2").eval()
    return perturbed(reference), reference


@torch.no_grad()
def _rows(pair, tokenizer, text):
    """Log-probabilities [2, L, V] of model and reference after every token."""
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    return torch.stack([log_softmax(model(ids).logits[0], dim=-1) for model in pair])


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_sums_a_text(batch_size, pair, tokenizer):
    model, reference = pair
    tokens = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    found = text_sums(model, tokens, reference, batch_size)
    alone = text_sums(model, tokens, None, batch_size)
    assert alone == [TextSums(tokens=s.tokens, predicted=s.predicted, loss=s.loss) for s in found]
    for text, sums in zip(TEXTS, found, strict=True):
        if not text:
            assert sums == TextSums()
            continue
        q, p = _rows(pair, tokenizer, text)
        assert (sums.tokens, sums.predicted) == (len(q), len(q) - 1)
        ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
        assert sums.loss == pytest.approx(float(cross_entropy(q[:-1], ids[1:], reduction="sum")), rel=1e-4)
        assert sums.kl == pytest.approx(float(kl_div(q, p, log_target=True, reduction="sum")), rel=1e-4)
        assert sums.entropy == pytest.approx(float(-(q.exp() * q).sum()), rel=1e-5)
        assert sums.reference_entropy == pytest.approx(float(-(p.exp() * p).sum()), rel=1e-5)
        assert sums.agreement == int((q.argmax(-1) == p.argmax(-1)).sum())
    assert 0 < sum(sums.agreement or 0 for sums in found) < sum(sums.tokens for sums in found)


def test_the_mean_is_over_tokens(pair, tokenizer):
    rows = []
    for text in filter(None, TEXTS):
        q, p = _rows(pair, tokenizer, text)
        rows.append(kl_div(q, p, log_target=True, reduction="none").sum(-1))
    assert kl_to_reference(*pair, tokenizer, TEXTS) == pytest.approx(float(torch.cat(rows).mean()), rel=1e-5)
    assert kl_to_reference(pair[1], pair[1], tokenizer, TEXTS) == pytest.approx(0.0, abs=1e-7)
    with pytest.raises(ValueError, match="texts"):
        kl_to_reference(*pair, tokenizer, [""])


def test_vocabularies_that_differ_in_padding(make_model, tokenizer):
    reference = make_model().eval()
    padded = make_model()
    padded.resize_token_embeddings(320)
    found = kl_to_reference(padded.eval(), reference, tokenizer, TEXTS)
    assert found == pytest.approx(0.0, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_perplexity(architecture, make_model, tokenizer):
    model = make_model(architecture).eval()
    losses = []
    for text in filter(None, TEXTS):
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        losses.append(cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    expected = torch.cat(losses).mean().exp().item()
    for batch_size in (1, 3, 64):
        assert perplexity(model, tokenizer, TEXTS, batch_size) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="at least two tokens"):
        perplexity(model, tokenizer, ["", "a"])
