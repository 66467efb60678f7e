"""Each method's loss and gradients are those of a plain float64 implementation with full logits."""

import copy
import math
import statistics
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax
from transformers import TrainingArguments

from disc_kernels import LogitTransform, teacher_summary
from disc_kernels.hf import OutputHead
from disc_train.data.dataset import whole_documents
from disc_train.data.splits import TokenizedDocument
from disc_train.data.templates import Templates
from disc_train.models.causal_lm import use_attention
from disc_train.models.frozen_head import freeze_head
from disc_train.objectives.methods import OF_SUFFIXES, WITH_TEACHER, Settings, batch_loss, distill, median, talr
from disc_train.objectives.predictions import ModelPredictions, Predictions, SummarisedPredictions, predict
from disc_train.packing.collator import collator, pack
from disc_train.packing.rows import RowRule
from disc_train.trainer import DiscTrainer
from tests.train.loop import gradient_error
from tests.train.world import make_model, perturbed

# Measured: at most 7e-7; row_weight and, inside the models, norms are float32.
TOLERANCE = 5e-6


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
    return _kl(p, q)


def _kl(p, q):
    return (p.exp() * (p - q)).sum(-1)


def _jsd(p, q, beta=0.3):
    mixture = (beta * p.exp() + (1 - beta) * q.exp()).log()
    return beta * _kl(p, mixture) + (1 - beta) * _kl(q, mixture)


def plain_ft(teacher, student, documents):
    return torch.stack([_token_losses(student, ids).mean() for ids in documents]).mean()


def plain_ft_kl(teacher, student, documents, kl_weight=0.1, clip=math.inf):
    divergences = [_token_divergences(teacher, student, ids).clamp(max=clip).mean() for ids in documents]
    return plain_ft(teacher, student, documents) + kl_weight * torch.stack(divergences).mean()


def plain_talr(teacher, student, documents):
    losses = [_token_losses(student, ids) for ids in documents]
    tau = statistics.median(float(each.detach().mean()) for each in losses)
    weights = [(each.detach().neg().exp() ** (1 / tau)).clamp(min=0.01) for each in losses]
    return torch.stack([(w * each).mean() for w, each in zip(weights, losses, strict=True)]).mean()


def plain_disc(teacher, student, samples, temperature=2.0, ce_weight=0.3, between=None):
    """On suffixes; samples are (token ids, [(start, stop), ...])."""
    documents = []
    for ids, splits in samples:
        losses = []
        for start, stop in splits:
            suffix = torch.tensor(ids[start:stop]).long()
            with torch.no_grad():
                p = log_softmax(teacher(torch.tensor(ids[:stop])[None]).logits[0, start:-1] / temperature, dim=-1)
            logits = student(suffix[None]).logits[0, :-1]
            q = log_softmax(logits / temperature, dim=-1)
            divergence = (between or _kl)(p, q).mean()
            losses.append(temperature**2 * divergence + ce_weight * cross_entropy(logits, suffix[1:]))
        documents.append(torch.stack(losses).mean())
    return torch.stack(documents).mean()


def plain_split_ft(teacher, student, samples, header=()):
    """On suffixes, each behind the header alone; samples are (token ids, [(start, stop), ...])."""
    documents = []
    for ids, splits in samples:
        losses = []
        for start, stop in splits:
            read = torch.tensor([*header, *ids[start:stop]]).long()
            first = max(1, len(header))
            losses.append(cross_entropy(student(read[None]).logits[0, first - 1 : -1], read[first:]))
        documents.append(torch.stack(losses).mean())
    return torch.stack(documents).mean()


PLAIN = {"ft": plain_ft, "split_ft": plain_split_ft, "ft_kl": plain_ft_kl, "talr": plain_talr}


@pytest.fixture
def compare(make_dataset):
    """compare(method, architecture): relative errors of the loss and of the worst gradient, on four documents."""

    def run(method, architecture="llama", settings=None, plain=None):
        teacher = make_model(architecture).double().eval()
        student = perturbed(teacher)
        expected = copy.deepcopy(student)
        dataset = make_dataset(4, num_splits=3)
        if method in OF_SUFFIXES:
            data = [(document.input_ids, dataset.splits(i)) for i, document in enumerate(dataset.documents)]
        else:
            data = [document.input_ids for document in dataset.documents]
            dataset = whole_documents(dataset.documents)
        loss = (plain or PLAIN[method])(copy.deepcopy(teacher), expected, data)
        loss.backward()
        for prepared in (student, teacher):
            use_attention(prepared, "auto")
        batch = collator(student, teacher, compare_all=method in WITH_TEACHER)([dataset[i] for i in range(4)])
        got = batch_loss(method, student, teacher, batch, settings or Settings()) / 4
        got.backward()
        gradient = gradient_error(student, expected)
        return SimpleNamespace(loss=abs(float(got.detach() / loss.detach()) - 1), gradient=gradient)

    return run


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("method", PLAIN)
def test_loss_and_gradients(method, architecture, compare):
    """qwen2 has a tied head, gemma2 a soft cap."""
    error = compare(method, architecture)
    assert max(error.loss, error.gradient) < TOLERANCE


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_distillation_with_cross_entropy(architecture, compare):
    error = compare("disc", architecture, Settings(temperature=2.0, ce_weight=0.3), plain_disc)
    assert max(error.loss, error.gradient) < TOLERANCE


@pytest.mark.parametrize("rule", [RowRule(), RowRule(dense_hidden_size=1), RowRule(share=False)])
@pytest.mark.parametrize("header", [(1,), (1, 5, 9)])  # BOS; a template
def test_suffixes_behind_a_header(header, rule, make_dataset):
    """In trees of one and of several rows, and in rows of their own; a suffix's first token counts too."""
    student = make_model().double()
    expected = copy.deepcopy(student)
    use_attention(student, "auto")
    templates = Templates(np.array(header), student_header=np.array(header), start=1)
    dataset = make_dataset(4, num_splits=3, templates=templates)
    batch = pack([dataset[i] for i in range(4)], student=rule, compare_all=False)
    assert batch["teacher_input_ids"] is batch["teacher_rows"] is None
    loss = batch_loss("split_ft", student, None, batch, Settings()) / 4
    data = [(document.input_ids, dataset.splits(i)) for i, document in enumerate(dataset.documents)]
    plain = plain_split_ft(None, expected, data, header)
    assert_same_gradients(loss, student, plain, expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_split_ft_is_what_a_weight_of_cross_entropy_adds_to_disc(architecture, make_dataset):
    teacher = make_model(architecture).double()
    student = perturbed(teacher)
    expected = copy.deepcopy(student)
    for model in (student, expected, teacher):
        use_attention(model, "auto")
    dataset = make_dataset(4, num_splits=3)
    examples = [dataset[i] for i in range(4)]
    alone, both = (collator(student, teacher, compare_all)(examples) for compare_all in (False, True))
    loss = batch_loss("split_ft", student, None, alone, Settings())
    without, with_ce = (batch_loss("disc", expected, teacher, both, Settings(ce_weight=w)) for w in (0.0, 10.0))
    assert_same_gradients(loss, student, (with_ce - without) / 10, expected)


def assert_same_gradients(loss, student, expected_loss, expected):
    """Assert that two losses of two copies of a model are equal, and so are all their gradients."""
    assert float(loss.detach()) == pytest.approx(float(expected_loss.detach()), rel=TOLERANCE)
    loss.backward()
    expected_loss.backward()
    assert gradient_error(student, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("settings", "between"),
    [(Settings(divergence="reverse_kl"), lambda p, q: _kl(q, p)), (Settings(divergence="jsd", beta=0.3), _jsd)],
)
def test_distillation_by_other_divergences(settings, between, compare):
    error = compare("disc", settings=settings, plain=partial(plain_disc, ce_weight=0.0, between=between))
    assert max(error.loss, error.gradient) < TOLERANCE


CLIP = 0.2  # nats; of the tokens here some have more, and some less


def _clipped(p, q, clip=CLIP):
    return _kl(p, q).clamp(max=clip)


@pytest.mark.parametrize(("architecture", "clip"), [("llama", CLIP), ("gemma2", CLIP / 2)])
def test_the_clip_of_a_token(architecture, clip, compare):
    settings, plain = Settings(ce_weight=0.3, kl_clip=clip), partial(plain_disc, between=partial(_clipped, clip=clip))
    error = compare("disc", architecture, settings, plain)
    assert max(error.loss, error.gradient) < TOLERANCE
    error = compare("ft_kl", architecture, Settings(kl_clip=clip), partial(plain_ft_kl, clip=clip))
    assert max(error.loss, error.gradient) < TOLERANCE


def test_the_clip_of_summarised_tokens(make_dataset):
    """With a frozen head, from the summaries that a cache holds."""
    teacher = make_model().double()
    student = freeze_head(perturbed(teacher))
    for model in (student, teacher):
        use_attention(model, "auto")
    dataset = make_dataset(4, num_splits=3)
    live = predict(student, teacher, collator(student, teacher)([dataset[i] for i in range(4)]))
    summary = teacher_summary(live.teacher.hidden, live.teacher.head, live.student.head, temperature=2.0)
    cached = replace(live, teacher=SummarisedPredictions(summary, live.teacher.index, 2.0, None))
    losses = [distill(predictions, Settings(kl_clip=CLIP)) for predictions in (live, cached)]
    wanted, got = (torch.autograd.grad(loss, live.student.hidden, retain_graph=True)[0] for loss in losses)
    assert float(losses[1].detach()) == pytest.approx(float(losses[0].detach()), rel=1e-6)
    assert torch.allclose(got, wanted, rtol=1e-6, atol=1e-9)


def test_what_a_method_leaves_out_would_show(compare):
    """Each mutant of a loss is off by far more than the tolerance."""
    mutants = {
        "no cross-entropy": compare("disc", settings=Settings(2.0, ce_weight=0.0), plain=plain_disc),
        "cross-entropy at the temperature's weight": compare("disc", settings=Settings(2.0, 1.2), plain=plain_disc),
        "the other direction": compare(
            "disc", settings=Settings(divergence="reverse_kl"), plain=partial(plain_disc, ce_weight=0.0)
        ),
        "no clip": compare("disc", plain=partial(plain_disc, ce_weight=0.0, between=_clipped)),
        "no KL": compare("ft_kl", settings=Settings(kl_weight=0.0)),
        "weights of one": compare("ft", plain=plain_talr),
        "a first token that nothing predicts": compare("split_ft", plain=partial(plain_split_ft, header=(1,))),
        "tau of another batch": compare("talr", settings=Settings(tau=torch.tensor(3.0))),
    }
    for name, error in mutants.items():
        assert error.gradient > 100 * TOLERANCE, name


def _rows(losses, lengths):
    """Predictions over a two-token vocabulary whose cross-entropies are those given."""
    losses = torch.tensor(losses, dtype=torch.float64)
    logits = torch.stack([-losses, (-torch.expm1(-losses)).log().clamp(min=-1e4)], dim=1).requires_grad_()
    weight = torch.cat([torch.full((length,), 1 / length) for length in lengths]).double()
    student = ModelPredictions(
        logits[None], OutputHead(torch.eye(2, dtype=torch.float64), None, LogitTransform()), np.arange(len(losses))
    )
    return Predictions(student, None, torch.zeros(len(losses), dtype=torch.int64), weight, lengths)


def test_talr_by_hand():
    """Means of 1, 2 and 5, so tau is 2: 8.4 nats weigh exp(-8.4 / 2) = 0.015, and 9.6 the least there is."""
    rows = _rows([0.5, 1.5, 2.0, 0.4, 8.4, 9.6, 1.6], [2, 1, 4])
    weights = [math.exp(-0.25), math.exp(-0.75), math.exp(-1), math.exp(-0.2), math.exp(-4.2), 0.01, math.exp(-0.8)]
    means = [
        (weights[0] * 0.5 + weights[1] * 1.5) / 2,
        weights[2] * 2.0,
        (weights[3] * 0.4 + weights[4] * 8.4 + weights[5] * 9.6 + weights[6] * 1.6) / 4,
    ]
    assert float(talr(rows, Settings()).detach()) == pytest.approx(sum(means), rel=1e-12)
    # d loss / d logit of the token itself is w (p - 1) over the document's length: the weight is a constant.
    expected = [w * math.expm1(-x) / n for w, x, n in zip(weights, [0.5, 1.5, 2.0], [2, 2, 1], strict=False)]
    assert _gradient(rows)[:3] == pytest.approx(expected, rel=1e-6)


def _gradient(rows):
    (gradient,) = torch.autograd.grad(talr(rows, Settings()), rows.student.hidden)
    return gradient[0, :, 0].tolist()


def test_the_median_of_an_even_number_is_between_the_middle_two():
    assert float(median(torch.tensor([1.0, 9.0, 2.0, 4.0]))) == 3.0


def test_talr_where_everything_is_certain():
    """tau is 0: every weight is 1 and the loss 0, not NaN."""
    rows = _rows([0.0, 0.0], [2])
    assert float(talr(rows, Settings()).detach()) < 1e-100


@pytest.fixture
def talr_step(make_dataset, tmp_path):
    """talr_step(micro_batch, ...): the weights after a step on four documents, whose tau is that of all four."""

    def run(micro_batch, dropout=0.0, resume=None, **options):
        args = TrainingArguments(
            *(tmp_path,),
            **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "optim": "sgd"},
            **{"learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 1, "save_strategy": "no"}
            | {"gradient_accumulation_steps": 4 // micro_batch}
            | options,
            per_device_train_batch_size=micro_batch,
        )
        model = make_model(attention_dropout=dropout)
        trainer = DiscTrainer(model, None, args, whole_documents(make_dataset(4).documents), method="talr")
        trainer.train(resume_from_checkpoint=resume)
        return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])

    return run


def test_taus_sequences_are_all_of_the_step(talr_step, monkeypatch):
    whole = talr_step(4)
    assert torch.allclose(talr_step(1), whole, atol=1e-6)
    monkeypatch.setattr(DiscTrainer, "_tau", lambda self, batches: None)
    assert not torch.allclose(talr_step(1), whole, atol=1e-5)


def test_tau_takes_no_random_numbers_from_a_step(talr_step, tmp_path):
    """A run that is resumed in the middle of an epoch restores them after it."""
    options = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    whole = talr_step(1, 0.2, **options)
    assert torch.equal(talr_step(1, 0.2, str(tmp_path / "checkpoint-1"), **options), whole)


def test_no_teacher_is_read_where_none_is_needed(make_dataset):
    dataset = whole_documents(make_dataset(4).documents)
    batch = pack([dataset[0], dataset[1]], compare_all=False)
    assert batch["teacher_input_ids"] is None
    assert batch["packing"].tokens == batch["input_ids"].numel()


def test_documents_of_one_token_are_left_out():
    documents = [TokenizedDocument(f"d{n}", np.arange(n, dtype=np.int32), (0,)) for n in range(4)]
    dataset = whole_documents(documents)
    assert [dataset[i].name for i in range(len(dataset))] == ["d2", "d3"]
    assert [dataset[i].branches[0].rows for i in range(2)] == [1, 2]
    with pytest.raises(ValueError, match="expected a document of at least 2 tokens, got 2 shorter ones"):
        whole_documents(documents[:2])


def test_an_unknown_method(make_dataset, tmp_path):
    with pytest.raises(ValueError, match="method: expected one of disc, cd, ft, split_ft, ft_kl, talr, got 'sft'"):
        DiscTrainer(make_model(), None, TrainingArguments(tmp_path, use_cpu=True), make_dataset(), method="sft")
