"""Tiny models of several architectures and a byte-level tokenizer, made on the spot, and a few documents."""

import contextlib
import copy
import gc
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time

import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from disc_train.cli import main
from disc_train.data.dataset import DocumentDataset
from disc_train.data.documents import Document
from disc_train.data.splits import tokenize_document

SENTENCES = [
    "The river Aral was named after the surveyor who first crossed it.",
    "Nobody in the valley had seen a bridge of that kind before.",
    "It opened in the spring.",
    "Its two towers are built of red stone from the quarry at Merin.",
    "The surveyor lived in Merin for the rest of her life!",
    "Was the quarry ever closed?",
    "A plaque on the northern tower tells her story.",
    "Trains cross the river twice a day.",
]

# Small weights would make all logits nearly equal and hide errors, so the initial spread is large.
COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
GEMMA2 = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 8,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
ARCHITECTURES = {
    "llama": lambda options: LlamaForCausalLM(LlamaConfig(**COMMON | options)),
    "qwen2": lambda options: Qwen2ForCausalLM(Qwen2Config(**COMMON | {"tie_word_embeddings": True} | options)),
    "qwen3": lambda options: Qwen3ForCausalLM(Qwen3Config(**COMMON | {"head_dim": 8} | options)),
    "gemma2": lambda options: Gemma2ForCausalLM(Gemma2Config(**COMMON | GEMMA2 | options)),
}


@pytest.fixture(scope="session")
def make_model():
    """make_model("llama", **config): a tiny random model of that architecture, the same at every call."""

    def make(architecture="llama", **options):
        torch.manual_seed(0)
        model = ARCHITECTURES[architecture](options)
        model.set_attn_implementation("eager")
        return model

    return make


@pytest.fixture(scope="session")
def perturbed():
    """perturbed(model): a copy with every weight moved, as different from the original as a trained student."""

    def perturb(model, scale=0.05):
        other = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter += scale * torch.randn(parameter.shape, generator=generator)
        return other

    return perturb


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer with 300 entries and neither a pad nor a BOS token."""
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
    """The same with a chat template that, as many do, strips what it is given: <user>Hello</>, and a line end."""
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return chat


@pytest.fixture(scope="session")
def sentences():
    """Seven documents, as lists of 2 to 8 sentences."""
    rng = random.Random(0)
    return [rng.sample(SENTENCES, count) for count in (2, 5, 8, 3, 6, 4, 7)]


@pytest.fixture
def make_dataset(sentences, tokenizer):
    """make_dataset(count, **options): the first `count` of these documents, tokenised the authors' way."""

    def make(count=7, **options):
        documents = [Document(f"doc{i}", " ".join(text)) for i, text in enumerate(sentences[:count])]
        return DocumentDataset(
            [tokenize_document(document, tokenizer, "sentence", None) for document in documents], **options
        )

    return make


@pytest.fixture
def model_folder(tmp_path, make_model, tokenizer):
    """A saved tiny Llama and its tokenizer."""
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write_documents(tmp_path):
    """write_documents(texts): a .jsonl file of them."""

    def write(texts):
        path = tmp_path / "documents.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write


def run_command(argv, environment, folder, log, prepare):
    """What a started process does: the command, in an environment and a folder, with its output in a file."""
    gc.freeze()  # what was imported is not looked through for garbage
    multiprocessing.set_start_method("fork", force=True)  # for the workers of data loaders
    os.setsid()  # as torchrun does
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would these
    os.chdir(folder)
    os.environ |= environment
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if prepare is not None:
        prepare()
    sys.exit(main(argv))


class Started:
    """Processes of one run; `wait` gives their exit codes, negative for a signal, and `logs` what they printed."""

    def __init__(self, processes, logs):
        self.processes, self.paths = processes, logs

    def wait(self, timeout=120):
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [process for process in self.processes if process.is_alive()]
        for process in hung:
            process.kill()
        assert not hung, "\n".join(self.logs)
        return [process.exitcode for process in self.processes]

    @property
    def logs(self):
        return [path.read_text() for path in self.paths]


@pytest.fixture(scope="session")
def _warm():
    """Starts processes that have imported all there is to import, in a tenth of a second."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["disc_train.run", "transformers.models.llama.modeling_llama", __name__])
    return context


@pytest.fixture
def start(_warm, model_folder, write_documents, sentences, tmp_path):
    """start(*flags, world=1, by_rank=None, folders=None, prepare=None): the command in some processes, on 8 documents.

    `by_rank` has each rank's own flags, `folders` the one it is started in; `prepare` is called before the command.
    """
    documents = write_documents([" ".join(text) for text in (*sentences, sentences[2][::-1])])
    runs, numbers = [], iter(range(1000))

    def run(*flags, world=1, by_rank=None, folders=None, prepare=None, environment=None):
        argv = [
            *("--model_name_or_path", model_folder, "--train_file", documents, "--output_dir", tmp_path / "out"),
            *("--use_cpu", "true", "--disable_tqdm", "true", "--learning_rate", "1e-2", *flags),
        ]
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes, logs = [], []
        for rank in range(world):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            own = [str(part) for part in (*argv, *(by_rank[rank] if by_rank else ()))]
            logs.append(tmp_path / f"log-{next(numbers)}")
            described = {name: str(value) for name, value in place.items()} if world > 1 else {}
            described |= environment or {}
            folder = folders[rank] if folders else tmp_path
            processes.append(_warm.Process(target=run_command, args=(own, described, folder, logs[-1], prepare)))
            processes[-1].start()
        runs.append(Started(processes, logs))
        return runs[-1]

    yield run
    for started in runs:
        for process in started.processes:
            process.kill()


@pytest.fixture(scope="session")
def weights():
    """weights(folder): every weight of a saved model, in one float32 tensor."""

    def read(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    return read


@pytest.fixture(scope="session")
def resumes():
    """resumes(world): skip a test where transformers cannot load an optimizer into several processes on the CPU."""

    def check(world):
        if world > 1 and Version(transformers.__version__) < Version("5.23"):
            pytest.skip("this transformers cannot load an optimizer into several processes on the CPU")

    return check
