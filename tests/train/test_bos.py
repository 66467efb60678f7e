"""Sequences start as the tokenizer starts a text: parity with a loop that does so, in every method, never twice."""

import copy

import pytest
from transformers import TrainingArguments

from disc_train.config import parse_arguments
from disc_train.data.sequence_start import bos_prefix
from disc_train.data.templates import read_templates
from disc_train.data.training_data import load_training_data
from disc_train.objectives.signal import Signal
from disc_train.packing.collator import pack
from disc_train.trainer import DiscTrainer
from tests.train.bos_tokenizer import with_bos
from tests.train.files import write_jsonl
from tests.train.loop import gradient_error, loop_loss
from tests.train.test_parity import TEMPERATURE, TOLERANCE
from tests.train.world import SENTENCES, make_model, perturbed

TEXT = " ".join(SENTENCES)


@pytest.fixture
def starting(tokenizer):
    return with_bos(tokenizer)


@pytest.fixture
def folder(tmp_path, starting):
    """A model whose tokenizer starts every text with a BOS token."""
    make_model(vocab_size=304).save_pretrained(tmp_path / "model")
    starting.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
def test_loss_and_every_gradient_equal_a_loop_that_starts_with_bos(architecture, make_dataset, starting, tmp_path):
    teacher = make_model(architecture, vocab_size=304)
    student = perturbed(teacher)
    expected = copy.deepcopy(student)
    start = bos_prefix(starting)
    dataset = make_dataset(num_splits=3, templates=read_templates(None, None, starting, start))
    examples = [
        [([*start, *ids[:first]], start, ids[first:stop]) for first, stop in dataset.splits(number)]
        for number, ids in enumerate(document.input_ids.tolist() for document in dataset.documents)
    ]
    loss = loop_loss(expected, teacher, examples, TEMPERATURE) / len(examples)
    loss.backward()
    batch = pack([dataset[i] for i in range(len(dataset))])
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    trainer = DiscTrainer(student, teacher, args, dataset, temperature=TEMPERATURE)
    got = trainer.training_step(student, batch, num_items_in_batch=batch["num_examples"])
    assert float(got) == pytest.approx(float(loss.detach()), rel=TOLERANCE)
    assert gradient_error(student, expected) < TOLERANCE


def load(folder, tokenizer, tmp_path, *flags, **record):
    path = write_jsonl(tmp_path / "data.jsonl", record or {"text": TEXT})
    arguments = ["--model_name_or_path", str(folder), "--train_file", str(path), "--output_dir", str(tmp_path / "out")]
    return load_training_data(*parse_arguments([*arguments, "--use_cpu", "true", *flags]), tokenizer)


def trunks(data):
    example = data.dataset[0]
    return example.teacher_trunk.tolist(), example.student_trunk.tolist()


@pytest.mark.parametrize("method", ["disc", "ft", "split_ft", "ft_kl", "talr"])
@pytest.mark.parametrize("text", [TEXT, "<s>" + TEXT, "<s><s>" + TEXT])
def test_documents_start_with_one_bos(folder, starting, tmp_path, method, text):
    data = load(folder, starting, tmp_path, "--method", method, text=text)
    teacher, student = trunks(data)
    bos = starting.bos_token_id
    assert teacher[0] == student[0] == bos
    assert student == [bos]
    example = data.dataset[0]
    assert bos not in [*teacher[1:], *(token for branch in example.branches for token in branch.target)]
    assert all(branch.first == 0 for branch in example.branches)
    assert ("sequences", "start, for both models, with '<s>' (as the tokenizer starts a text)") in data.description


def test_records_start_with_one_bos(folder, starting, tmp_path):
    starting.chat_template = "<s>{% for m in messages %}{{ m.content }}{% endfor %}"
    for context in ("Say when.", "<s>Say when.", [{"role": "user", "content": "Say when."}]):
        data = load(folder, starting, tmp_path, "--method", "cd", teacher_context=context, target="In the spring.")
        teacher, student = trunks(data)
        assert (teacher[0], teacher.count(starting.bos_token_id)) == (starting.bos_token_id, 1)
        assert student == [starting.bos_token_id]


def test_a_target_that_starts_with_bos_gets_no_second(folder, starting, tmp_path):
    flags = ("--method", "cd")
    data = load(folder, starting, tmp_path, *flags, teacher_context="Say when.", target="<s>In the spring.")
    assert starting.bos_token_id not in data.dataset[0].branches[0].target


def test_a_context_of_bos_alone_is_empty(folder, starting, tmp_path):
    with pytest.raises(ValueError, match="expected a teacher_context that is not empty"):
        load(folder, starting, tmp_path, "--method", "cd", teacher_context="<s>", target="In the spring.")


def test_whole_documents_lose_no_first_token(folder, starting, tmp_path):
    description = dict(load(folder, starting, tmp_path, "--method", "ft").description)
    assert description["tokens"].endswith("predicted; skipped: 0 first")
    assert "templates" not in description


@pytest.mark.parametrize("text", [TEXT, "<s>" + TEXT])
def test_a_document_fills_the_context_with_its_bos(folder, starting, tmp_path, text):
    data = load(folder, starting, tmp_path, "--method", "ft", "--long_documents", "cut", text=text * 9)
    [branch] = data.dataset[0].branches
    assert branch.student.attach + len(branch.target) == 256
    assert "templates" not in dict(load(folder, starting, tmp_path).description)


def test_what_is_replayed_starts_with_bos(folder, starting, tmp_path):
    replay = write_jsonl(tmp_path / "old.jsonl", {"text": TEXT})
    data = load(folder, starting, tmp_path, "--replay_file", str(replay), "--replay_objective", "kl")
    assert data.dataset.replay[0].student_trunk.tolist() == [starting.bos_token_id]


def test_templates_that_write_one_get_no_second(folder, starting, tmp_path):
    flags = ("--teacher_template", "<s>News: {{ prefix }}", "--student_template", "{{ bos_token }}News: ")
    teacher, student = trunks(load(folder, starting, tmp_path, *flags))
    for trunk in (teacher, student):
        assert (trunk[0], trunk.count(starting.bos_token_id)) == (starting.bos_token_id, 1)


def test_without(folder, starting, tokenizer, tmp_path):
    data = load(folder, starting, tmp_path, "--add_bos", "false")
    assert trunks(data)[1] == []
    [start] = [text for label, text in data.description if label == "sequences"]
    assert start == "start with nothing added (--add_bos false), though the tokenizer starts a text with '<s>'"
    data = load(folder, tokenizer, tmp_path)
    assert trunks(data)[1] == []
    assert ("sequences", "start with nothing added: the tokenizer puts nothing before a text") in data.description
    with pytest.raises(ValueError, match="--add_bos: expected a tokenizer that has a BOS token"):
        load(folder, tokenizer, tmp_path, "--add_bos", "true")


def test_a_cold_start_is_said():
    assert Signal([1.0], [1.5], [1.0]).cold_start_warning("document") is None
    warning = Signal([1.0], [1.5], [0.2]).cold_start_warning("document")
    assert warning is not None
    assert "1.3000 of 1.5000" in warning
    assert "--add_bos" in warning
