"""Teach a small model new topics of Python's documentation, from nothing to a table of what it learned and forgot.

python examples/python_docs/run.py --output_dir runs/python_docs
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from prepare import CONTEXT, prepare
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from disc_train.cli import main as disc_train
from disc_train.data.dataset import DocumentDataset
from disc_train.data.documents import load_documents
from disc_train.data.example import Example
from disc_train.data.splits import tokenize_document
from disc_train.evaluation import kl_to_reference, perplexity
from disc_train.models.causal_lm import use_attention
from disc_train.objectives.predictions import cross_entropy, divergence, predict
from disc_train.packing.collator import pack


def load(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    use_attention(model, "sdpa")
    return model


@torch.no_grad()
def compare(student: PreTrainedModel, teacher: PreTrainedModel, examples: Sequence[Example]) -> torch.Tensor:
    """Return [3], nats a token: the suffixes' negative log-likelihood to student and teacher, KL(teacher || student).

    They are means over all tokens that both predict: not the first of a suffix, which the student cannot.
    """
    columns = []
    for example in examples:
        rows = predict(student, teacher, pack([example]))
        assert rows.teacher is not None
        columns.append(
            torch.stack(
                [
                    cross_entropy(rows, reduction="none"),
                    cross_entropy(replace(rows, student=rows.teacher), reduction="none"),
                    divergence(rows, temperature=1.0, reduction="none"),
                ]
            )
        )
    return torch.cat(columns, dim=1).mean(dim=1)


def read_examples(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Read every topic, cut to what the model reads, with every sentence but its first as a suffix."""
    documents = [tokenize_document(each, tokenizer, "document", CONTEXT) for each in load_documents(str(path), None)]
    # More splits than there are sentences, so each is one.
    dataset = DocumentDataset(documents, split_strategy="uniform_sentence", num_splits=CONTEXT)
    return [dataset[i] for i in range(len(dataset))]


def report(folder: Path) -> dict[str, tuple[float, ...]]:
    """Measure the model before and after, and the loss of the teacher, which reads what stands before."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    before, after = (load(folder / name) for name in ("model", "taught"))
    rows: dict[str, tuple[float, ...]] = {}
    for part in ("new", "control"):
        examples = read_examples(folder / f"{part}.jsonl", tokenizer)
        (loss_before, loss_teacher, kl_before), (loss_after, _, kl_after) = (
            compare(student, before, examples).tolist() for student in (before, after)
        )
        rows[f"{part} topics: loss of a sentence, nats a token"] = (loss_before, loss_after, loss_teacher)
        rows[f"{part} topics: KL to the teacher, nats a token"] = (kl_before, kl_after)
    # The beginning of every base topic, about half of what the model can read.
    base = [document.text[:1_000] for document in load_documents(str(folder / "base.jsonl"), None)]
    rows["base topics: perplexity"] = tuple(perplexity(model, tokenizer, base) for model in (before, after))
    rows["base topics: KL to the initial model, nats a token"] = (0.0, kl_to_reference(after, before, tokenizer, base))
    return rows


def show(rows: dict[str, tuple[float, ...]]) -> None:
    print(f"{'':<52}{'before':>10}{'after':>10}{'teacher':>10}")
    for name, values in rows.items():
        print(f"{name:<52}" + "".join(f"{value:>10.3f}" for value in values))
    print("Before and after: the student, without context. The teacher reads all that stands before the sentence.")


def run(folder: Path, flags: Sequence[str] = (), **sizes: int) -> dict[str, tuple[float, ...]]:
    """Prepare, teach and measure in `folder`; `flags` go to disc-train, `sizes` to `prepare`."""
    prepare(folder, **sizes)
    paths = {"model_name_or_path": "model", "train_file": "new.jsonl", "output_dir": "taught"}
    arguments = [f"--{flag}={folder / name}" for flag, name in paths.items()]
    if code := disc_train([str(Path(__file__).with_name("disc.yaml")), *arguments, *flags]):
        sys.exit(code)
    rows = report(folder)
    show(rows)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/python_docs"))
    run(parser.parse_args().output_dir)
