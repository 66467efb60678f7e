"""Each method's loss and gradients are those of a plain float64 implementation with full logits, a document at a time."""

import copy
import statistics
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from disc_train.causal_lm import use_attention
from disc_train.dataset import whole_documents
from disc_train.objectives import Settings, batch_loss
from disc_train.packing import collator

# Measured in float64: at most 1e-14.
TOLERANCE = 1e-10


def _token_losses(model, ids):
    """Cross-entropy of each token of a document but its first: [n - 1]."""
    ids = torch.tensor(ids).long()
    return cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")


def _token_divergences(teacher, student, ids, temperature=1.0):
    """KL(teacher || student) at each token of a document but its last: [n - 1]."""
    ids = torch.tensor(ids)[None]
    with torch.no_grad():
        p = log_softmax(teacher(ids).logits[0, :-1] / temperature, dim=-1)
    q = log_softmax(student(ids).logits[0, :-1] / temperature, dim=-1)
    return (p.exp() * (p - q)).sum(-1)


def plain_ft(teacher, student, documents):
    return torch.stack([_token_losses(student, ids).mean() for ids in documents]).mean()


def plain_ft_kl(teacher, student, documents, kl_weight=0.1):
    divergences = [_token_divergences(teacher, student, ids).mean() for ids in documents]
    return plain_ft(teacher, student, documents) + kl_weight * torch.stack(divergences).mean()


def plain_talr(teacher, student, documents):
    losses = [_token_losses(student, ids) for ids in documents]
    tau = statistics.median(float(each.detach().mean()) for each in losses)
    weights = [(each.detach().neg().exp() ** (1 / tau)).clamp(min=0.01) for each in losses]
    assert min(float(weight.min()) for weight in weights) == 0.01  # so that the floor is tried
    return torch.stack([(w * each).mean() for w, each in zip(weights, losses, strict=True)]).mean()


PLAIN = {"ft": plain_ft, "ft_kl": plain_ft_kl, "talr": plain_talr}


@pytest.fixture
def compare(make_model, perturbed, make_dataset):
    """compare(method, architecture, count): relative errors of the loss and of the worst gradient."""

    def run(method, architecture="llama", count=4):
        teacher = make_model(architecture).double().eval()
        student = perturbed(teacher)
        expected = copy.deepcopy(student)
        documents = make_dataset(count).documents
        loss = PLAIN[method](copy.deepcopy(teacher), expected, [document.input_ids for document in documents])
        loss.backward()
        for prepared in (student, teacher):
            use_attention(prepared, "auto")
        dataset = whole_documents(documents)
        batch = collator(student, teacher, compare_all=method == "ft_kl")([dataset[i] for i in range(count)])
        got = batch_loss(method, student, teacher, batch, Settings()) / count
        got.backward()
        errors = [
            float((p.grad - q.grad).norm() / q.grad.norm())
            for p, q in zip(student.parameters(), expected.parameters(), strict=True)
        ]
        return SimpleNamespace(loss=abs(float(got.detach() / loss.detach()) - 1), gradient=max(errors))

    return run


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("method", PLAIN)
def test_loss_and_gradients(method, architecture, compare):
    """qwen2 has a tied head, gemma2 a soft cap."""
    error = compare(method, architecture)
    print(error)
    assert max(error.loss, error.gradient) < TOLERANCE
