"""Make a byte-level tokenizer, a few documents and a tiny model; run the command on them in processes of its own."""

import copy
import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from disc_train.data.dataset import DocumentDataset
from disc_train.data.documents import Document
from disc_train.data.splits import tokenize_document
from tests.train import world
from tests.train.runs import environments_of, start_processes
from tests.train.world import SENTENCES


@pytest.fixture(scope="session", name="make_model")
def _make_model():
    return world.make_model


@pytest.fixture(scope="session")
def perturbed():
    return world.perturbed


@pytest.fixture(scope="session")
def tokenizer():
    """Train a byte-level BPE tokenizer with 300 entries and neither a pad nor a BOS token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


@pytest.fixture
def chat_tokenizer(tokenizer):
    """Return a tokenizer whose chat template, as many do, strips what it is given: <user>Hello</>, and a line end."""
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return chat


@pytest.fixture(scope="session")
def sentences():
    """Draw seven documents, as lists of 2 to 8 sentences."""
    rng = random.Random(0)
    return [rng.sample(SENTENCES, count) for count in (2, 5, 8, 3, 6, 4, 7)]


@pytest.fixture
def make_dataset(sentences, tokenizer):
    """Return make_dataset(count, **options): it gives the first `count` documents, tokenised the authors' way."""

    def make(count=7, **options):
        documents = [Document(f"doc{i}", " ".join(text)) for i, text in enumerate(sentences[:count])]
        return DocumentDataset(
            [tokenize_document(document, tokenizer, "sentence", None) for document in documents], **options
        )

    return make


@pytest.fixture
def model_folder(tmp_path, tokenizer):
    """Save a tiny Llama and its tokenizer, and return the folder."""
    folder = tmp_path / "model"
    world.make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write_documents(tmp_path):
    """Return write_documents(texts): it writes a .jsonl file of them."""

    def write(texts):
        path = tmp_path / "documents.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write


@pytest.fixture
def start(model_folder, write_documents, sentences, tmp_path):
    """Return start(*flags, world=1, ...): it starts the command in `world` processes, on 8 documents.

    `by_rank` has each rank's own flags, `folders` the one it is started in; `prepare` is called before the command.
    """
    documents = write_documents([" ".join(text) for text in (*sentences, sentences[2][::-1])])
    runs, numbers = [], iter(range(1000))

    def run(*flags, world=1, by_rank=None, folders=None, prepare=None, environment=None):
        common = [
            *("--model_name_or_path", model_folder, "--output_dir", tmp_path / "out"),
            *("--use_cpu", "true", "--disable_tqdm", "true", "--learning_rate", "1e-2"),
        ]
        each = [(*flags, *own) for own in by_rank or [()] * world]
        data = [() if "--train_file" in own else ("--train_file", documents) for own in each]
        argvs = [[str(part) for part in (*common, *files, *own)] for files, own in zip(data, each, strict=True)]
        environments = [variables | (environment or {}) for variables in environments_of(world)]
        logs = [tmp_path / f"log-{next(numbers)}" for _ in range(world)]
        runs.append(start_processes(argvs, environments, folders or [tmp_path] * world, logs, prepare))
        return runs[-1]

    yield run
    for started in runs:
        for process in started.processes:
            process.kill()
