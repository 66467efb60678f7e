"""Heads of models: the loss from hidden states and head is that from the model's own logits, gradients too."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2Config, GPT2Model

from disc_kernels import (
    LogitTransform,
    expected_embedding_kl,
    fused_cross_entropy,
    fused_suffix_kl,
    fused_topk_kl,
    teacher_summary,
)
from disc_kernels.hf import OutputHead, check_output_head, last_hidden_states, output_head
from tests.hf.models import FAMILIES, IDS, gradients, loss_of_logits, make, perturbed


def fused_loss(student, teacher, **options):
    with torch.no_grad():
        teacher_hidden, teacher_head = last_hidden_states(teacher, input_ids=IDS), output_head(teacher)
    hidden = last_hidden_states(student, input_ids=IDS, labels=IDS)
    return fused_suffix_kl(hidden, output_head(student), teacher_hidden, teacher_head, impl="torch", **options)


def assert_same_loss(student, teacher, **options):
    expected = loss_of_logits(student, teacher)
    of_logits = gradients(student, expected)
    loss = fused_loss(student, teacher, **options)
    of_hidden = gradients(student, loss)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    assert of_hidden.keys() == of_logits.keys()
    for name, gradient in of_logits.items():
        torch.testing.assert_close(of_hidden[name], gradient, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_models_logits(family):
    teacher = make(family)
    check_output_head(teacher, IDS)
    assert_same_loss(perturbed(teacher), teacher)


@pytest.mark.parametrize(
    ("name", "value"), [("logit_scale", 1.01), ("final_logit_softcapping", 20.0), ("logits_scaling", 0.99)]
)
def test_a_model_that_does_not_what_its_config_says_is_refused(name, value):
    model = make()
    setattr(model.config, name, value)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: .*LogitTransform.* differ by up to [0-9.e-]+ "):
        check_output_head(model, IDS)


def test_a_head_that_is_not_the_models_is_refused():
    class Other(type(make())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + self.extra
            return output

    model = make()
    model.__class__, model.extra = Other, torch.randn(96)
    with pytest.raises(ValueError, match="differ by up to"):
        check_output_head(model, IDS)
    model = make()
    model.get_output_embeddings = lambda: nn.Linear(32, 96)
    for call in (lambda: check_output_head(model, IDS), lambda: last_hidden_states(model, input_ids=IDS)):
        with pytest.raises(ValueError, match=r"expected a model that calls its get_output_embeddings\(\)"):
            call()
    with pytest.raises(ValueError, match="student_hidden: expected last dimension"):
        fused_suffix_kl(torch.randn(3, 8), output_head(make()), torch.randn(3, 8), torch.randn(96, 8))


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_an_encoder_is_refused(kind):
    config = BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    for call in (output_head, lambda model: last_hidden_states(model, input_ids=IDS)):
        with pytest.raises(ValueError, match=f"{kind.__name__}: expected a causal language model"):
            call(kind(config))
    wrapped = get_peft_model(BertForMaskedLM(config), LoraConfig(target_modules=["query"]))
    for model in (wrapped, torch.compile(BertForMaskedLM(config), backend="eager")):
        with pytest.raises(ValueError, match="BertForMaskedLM: expected a causal language model"):
            output_head(model)


def test_models_without_a_usable_head_are_refused():
    with pytest.raises(ValueError, match=r"GPT2Model: expected a causal language model .*, got NoneType"):
        output_head(GPT2Model(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=16)))
    with pytest.raises(ValueError, match=r"Linear: expected a causal language model .*, got no such method"):
        output_head(nn.Linear(2, 2))
    model = make()
    model.lm_head.weight = nn.Parameter(torch.empty(0))
    model.lm_head.weight.ds_id = 0  # what ZeRO-3 leaves of a parameter between modules
    with pytest.raises(ValueError, match=r"got \[0\], a part of ZeRO-3; .*GatheredParameters"):
        output_head(model)


def test_the_vocabulary_that_both_heads_have_is_compared():
    teacher, student = output_head(make()), output_head(make())
    hidden, other = torch.randn(2, 5, 32, dtype=torch.float64)
    longer = teacher._replace(weight=torch.cat([teacher.weight, teacher.weight]), vocab_size=100)
    expected = fused_suffix_kl(hidden, student.weight, other, longer.weight, vocab_size=96)
    assert torch.equal(fused_suffix_kl(hidden, student, other, longer), expected)
    fewer = fused_suffix_kl(hidden, student, other, longer, vocab_size=50)
    assert torch.equal(fewer, fused_suffix_kl(hidden, student.weight, other, longer.weight, vocab_size=50))
    with pytest.raises(ValueError, match="vocab_size: expected at most 96, as the OutputHead says, got 97"):
        fused_suffix_kl(hidden, student, other, longer, vocab_size=97)
    with pytest.raises(ValueError, match="vocab_size: expected an int, which expected_embedding_kl must be given too"):
        teacher_summary(other, teacher._replace(vocab_size=50), student._replace(weight=student.weight.detach()))


@pytest.mark.parametrize(("name", "value"), [("bias", torch.zeros(96)), ("transform", LogitTransform())])
def test_a_head_and_its_parts_are_not_both_given(name, value):
    head, hidden = output_head(make()), torch.randn(3, 32, dtype=torch.float64)
    calls = [
        lambda side: fused_suffix_kl(hidden, head, hidden, head, **{f"{side}_{name}": value}),
        lambda side: teacher_summary(hidden, head, head, **{f"{side}_{name}": value}),
        lambda side: fused_cross_entropy(hidden, head, torch.zeros(3, dtype=torch.int64), **{name: value}),
    ]
    for call, sides in zip(calls, [("student", "teacher"), ("teacher",), ("",)], strict=True):
        for side in sides:
            with pytest.raises(ValueError, match=f"{name}: expected None, because {side}_?weight is an OutputHead"):
                call(side)


def test_every_loss_takes_a_head():
    """As the same call with the head's parts."""
    head = OutputHead(
        torch.randn(20, 8, dtype=torch.float64), torch.randn(20, dtype=torch.float64), LogitTransform(0.5), 17
    )
    hidden, other = torch.randn(2, 6, 8, dtype=torch.float64)
    labels, entries = torch.arange(6), {"vocab_size": 17}
    got = fused_cross_entropy(hidden, head, labels)
    parts = {"bias": head.bias, "transform": head.transform}
    assert torch.equal(got, fused_cross_entropy(hidden, head.weight, labels, **parts, **entries))
    ids, given = torch.arange(12).view(6, 2), torch.full((6, 2), -2.0, dtype=torch.float64)
    got = fused_topk_kl(hidden, head, ids, given)
    parts = {"student_bias": head.bias, "student_transform": head.transform}
    assert torch.equal(got, fused_topk_kl(hidden, head.weight, ids, given, **parts, **entries))
    summary = teacher_summary(other, head, head)
    expected = teacher_summary(
        *(other, head.weight, head.weight),
        student_bias=head.bias,
        teacher_bias=head.bias,
        teacher_transform=head.transform,
        **entries,
    )
    assert all(torch.equal(*pair) for pair in zip(summary, expected, strict=True))
    parts = {"student_bias": head.bias, "student_scale": 0.5}
    expected = expected_embedding_kl(hidden, head.weight, summary, **parts, **entries)
    assert torch.equal(expected_embedding_kl(hidden, head, summary), expected)
    with pytest.raises(ValueError, match=r"student_scale: expected 1.0, because .* OutputHead, .*, got 0.5"):
        expected_embedding_kl(hidden, head, summary, student_scale=0.5)
    with pytest.raises(ValueError, match=r"student_weight: expected a head without a softcap, .*got softcap 2.0"):
        expected_embedding_kl(hidden, head._replace(transform=LogitTransform(1.0, 2.0)), summary)
