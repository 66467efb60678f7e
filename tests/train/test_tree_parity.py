"""Trees equal a loop over branches: plain sequences and full softmaxes in float64, whatever is shared."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM

from disc_train.data.contexts import load_records
from disc_train.data.dataset import DocumentDataset
from disc_train.data.templates import read_templates
from disc_train.models.causal_lm import use_attention
from disc_train.objectives.methods import Settings, batch_loss
from disc_train.packing.collator import collator, pack
from disc_train.packing.rows import RowRule
from tests.train.loop import gradient_error, loop_loss
from tests.train.world import make_model, perturbed

TEMPERATURE = 2.0
TOLERANCE = 3e-6  # measured: at most 7e-7; row_weight and, inside the models, norms are float32
RULES = {
    "one row": RowRule(),
    "short rows": RowRule(dense_hidden_size=1),
    "long rows": RowRule(dense_hidden_size=1024),
    "separate": RowRule(share=False),
}


@pytest.fixture
def encode(tokenizer):
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


DOCUMENT_CASES = {
    # name: (teacher's template, its header, its footer, student's template, its header)
    "footer": ("{{ prefix }}\nGo on:", "", "\nGo on:", None, ""),
    "headers": ("News: {{ prefix }}", "News: ", "", "News: ", "News: "),
    "all": ("News: {{ prefix }}\nGo on:", "News: ", "\nGo on:", "Q{{ eos_token }} ", "Q "),
    "student only": (None, "", "", "Say: ", "Say: "),
    "chat": (
        "{{ chat('Read: ' + prefix, system='Be brief.') }}So, ",
        "<system>Be brief.</>\n<user>Read: ",
        "</>\n<assistant>So, ",
        "{{ chat('Go on') }}",
        "<user>Go on</>\n<assistant>",
    ),
}


@pytest.fixture
def document_case(make_dataset, chat_tokenizer, encode):
    """document_case(name): four documents as examples, and as contexts and targets in plain lists."""

    def make(name):
        teacher, header, footer, student, student_header = DOCUMENT_CASES[name]
        plain = make_dataset(4, num_splits=3)
        dataset = DocumentDataset(
            plain.documents, templates=read_templates(teacher, student, chat_tokenizer), num_splits=3
        )
        expected = []
        for index, document in enumerate(plain.documents):
            ids = document.input_ids.tolist()
            expected.append(
                [
                    (encode(header) + ids[:start] + encode(footer), encode(student_header), ids[start:stop])
                    for start, stop in plain.splits(index)
                ]
            )
        return [dataset[i] for i in range(4)], expected

    return make


INSTRUCTION = "Answer like a surveyor who has seen every bridge in the valley, in three words."
RECORD_CASES = {
    "texts": [
        ({"teacher_context": INSTRUCTION, "student_context": "Go: ", "target": f"The river {i} opened."})
        for i in range(3)
    ]
    + [{"teacher_context": "Other. ", "target": "The quarry closed."}],
    "one instruction, several inputs": [
        {"teacher_context": f"{INSTRUCTION} {question}", "student_context": question, "target": answer}
        for question, answer in (("Where?", " In Merin."), ("When? ", "In spring."), ("Why?", " By the river."))
    ],
    "messages": [
        {
            "teacher_context": [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": question}],
            "student_context": [{"role": "user", "content": question}],
            "target": [{"role": "assistant", "content": answer}],
        }
        for question, answer in (("Where?", " In Merin. "), ("When?", "In spring."), ("Where?", "By the river."))
    ],
}


def _plain(record, encode):
    def text(context):
        return (
            context
            if isinstance(context, str)
            else "".join(f"<{m['role']}>{m['content'].strip()}</>\n" for m in context) + "<assistant>" * bool(context)
        )

    target = record["target"]
    answer = target if isinstance(target, str) else target[0]["content"].strip() + "</>\n"
    return [(encode(text(record["teacher_context"])), encode(text(record.get("student_context", ""))), encode(answer))]


@pytest.fixture
def record_case(chat_tokenizer, encode, tmp_path):
    """record_case(name): records as examples, and as contexts and targets in plain lists."""

    def make(name):
        records = RECORD_CASES[name]
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return load_records(str(path), None, chat_tokenizer), [_plain(record, encode) for record in records]

    return make


@pytest.fixture
def compare():
    """compare(examples, expected, batch=, model=): relative errors of the loss and of the worst gradient."""

    def run(examples, expected, make_batch, model=None):
        teacher = (make_model() if model is None else model).double().eval()
        student = perturbed(teacher)
        loop_student = copy.deepcopy(student)
        loop_student.set_attn_implementation("eager")
        loss = loop_loss(loop_student, copy.deepcopy(teacher), expected, TEMPERATURE)
        loss.backward()

        for prepared in (student, teacher):
            use_attention(prepared, "auto")
        got = batch_loss("cd", student, teacher, make_batch(student, teacher), Settings(TEMPERATURE))
        got.backward()
        return SimpleNamespace(
            loss=float(abs(got.detach() / loss.detach() - 1)), gradient=gradient_error(student, loop_student)
        )

    return run


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", DOCUMENT_CASES)
def test_documents_with_templates(case, rule, document_case, compare):
    examples, expected = document_case(case)
    error = compare(examples, expected, lambda *_: pack(examples, student=RULES[rule], teacher=RULES[rule]))
    assert max(error.loss, error.gradient) < TOLERANCE


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", RECORD_CASES)
def test_records(case, rule, record_case, compare):
    examples, expected = record_case(case)
    error = compare(examples, expected, lambda *_: pack(examples, student=RULES[rule], teacher=RULES[rule]))
    assert max(error.loss, error.gradient) < TOLERANCE


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma2"])
def test_architectures(architecture, document_case, compare):
    """With the rows that each gets of itself; Gemma 2's window ends within every trunk."""
    examples, expected = document_case("all")
    error = compare(
        examples, expected, lambda student, teacher: collator(student, teacher)(examples), make_model(architecture)
    )
    assert max(error.loss, error.gradient) < TOLERANCE


def test_a_model_that_cannot_share(document_case, compare):
    """Its convolutions mix neighbours whatever the mask."""
    config = Lfm2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        layer_types=["conv", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    examples, expected = document_case("all")
    batches = []

    def make_batch(student, teacher):
        batches.append(collator(student, teacher)(examples))
        return batches[0]

    error = compare(examples, expected, make_batch, Lfm2ForCausalLM(config))
    assert max(error.loss, error.gradient) < TOLERANCE
    # A row for every sequence; some documents end in the same sentence.
    (batch,) = batches
    assert len(batch["teacher_input_ids"]) == sum(len(example.branches) for example in examples)
    assert len(batch["input_ids"]) == len({str(branch[1:]) for branches in expected for branch in branches})


def _read_footer_as_trunk(batch):
    """Every branch sees the whole trunk."""
    layout = batch["teacher_layout"]
    length = layout.tree_id.bincount(weights=(layout.branch_id == 0).double())[layout.tree_id].long()
    offset = layout.position_ids - layout.attach
    attach = torch.where(layout.branch_id == 0, layout.attach, length)
    batch["teacher_layout"] = type(layout)(
        tree_id=layout.tree_id,
        branch_id=layout.branch_id,
        attach=attach,
        position_ids=torch.where(layout.branch_id == 0, layout.position_ids, attach + offset),
    )


def _skip_first_token(batch):
    keep = np.arange(len(batch["targets"])) % 7 > 0
    for name in ("student_index", "teacher_index", "row_weight"):
        batch[name] = batch[name][keep]


def _predict_from_the_next_row(batch):
    batch["student_index"] += 1
    batch["student_index"] = batch["student_index"].clip(max=batch["input_ids"].numel() - 1)


@pytest.mark.parametrize("mutate", [_read_footer_as_trunk, _skip_first_token, _predict_from_the_next_row])
def test_a_wrong_batch_fails(mutate, document_case, compare):
    examples, expected = document_case("all")

    def make_batch(*_):
        batch = pack(examples)
        mutate(batch)
        return batch

    assert compare(examples, expected, make_batch).gradient > 1000 * TOLERANCE
