"""Teach the tiny model 50 documents with DiSC on the CPU, and print what it learned and what it kept.

    python examples/tiny/demo.py

Flags of `disc-train` for the training may follow, and win over `disc.yaml`: --learning_rate 1e-4.
The teacher's column is the model before training, given the document that answers each question.
"""

import shutil
import sys
from pathlib import Path

import torch
from probes import load_probes, read_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from disc_train.cli import main as disc_train
from disc_train.evaluation import choice_accuracy, kl_to_reference

HERE = Path(__file__).resolve().parent
OUTPUT = Path("runs") / "tiny-demo"


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def report(before: PreTrainedModel, after: PreTrainedModel) -> str:
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")

    def row(label: str, *cells: float | None) -> str:
        return f"{label:46}" + "".join(f"{'-' if cell is None else format(cell, '.1%'):>10}" for cell in cells)

    documents = HERE / "documents.jsonl"
    lines = [f"{'':46}{'before':>10}{'after':>10}{'teacher':>10}"]
    for label, name in (
        ("new facts, without the document", "new_facts"),
        ("old facts", "old_facts"),
        ("skills", "skills"),
    ):
        probes = load_probes(HERE / f"{name}.jsonl")
        with_document = load_probes(HERE / f"{name}.jsonl", documents) if name == "new_facts" else None
        lines.append(
            row(
                label,
                choice_accuracy(before, tokenizer, probes),
                choice_accuracy(after, tokenizer, probes),
                choice_accuracy(before, tokenizer, with_document) if with_document else None,
            )
        )
    other_texts = [
        probe.prompt + probe.choices[probe.answer]
        for name in ("old_facts", "skills")
        for probe in load_probes(HERE / f"{name}.jsonl")
    ]
    for label, texts in (
        ("KL to the initial model, the documents", [record["text"] for record in read_jsonl(documents)]),
        ("KL to the initial model, old facts and skills", other_texts),
    ):
        lines.append(f"{label:46}{0:10.3f}{kl_to_reference(after, before, tokenizer, texts):10.3f}{'-':>10}")
    lines.append(
        "Accuracy: the likeliest of 8 choices for facts (chance 12.5%), of 4 to 8 for skills. KL in nats a token."
    )
    return "\n".join(lines)


def main() -> int:
    # Products this small gain nothing from a second thread, and lose much where another program holds its core.
    torch.set_num_threads(1)
    shutil.rmtree(OUTPUT, ignore_errors=True)  # the demo's own, made anew at every run
    code = disc_train(
        [
            str(HERE / "disc.yaml"),
            f"--model_name_or_path={HERE / 'model'}",
            f"--train_file={HERE / 'documents.jsonl'}",
            f"--output_dir={OUTPUT}",
            *sys.argv[1:],
        ]
    )
    if code == 0:
        print(report(load(HERE / "model"), load(OUTPUT)))
    return code


if __name__ == "__main__":
    sys.exit(main())
