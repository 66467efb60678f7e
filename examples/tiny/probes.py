"""The probes of the example: questions in the model's chat form, and whether it answers them word for word."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from disc_train.evaluation import Probe

END = "<|endoftext|>"


def load_probes(path: Path, documents: Path | None = None) -> list[Probe]:
    """The questions in `path`; with `documents`, each with the document that answers it in its context."""
    texts = {} if documents is None else {record["id"]: f"{record['text']}\n\n" for record in read_jsonl(documents)}
    return [
        Probe(
            prompt=f"User: {record['question']}\nAssistant:",
            choices=[f" {choice}{END}" for choice in record["choices"]],
            answer=record["choices"].index(record["answer"]),
            context=texts[record["document"]] if texts else "",
        )
        for record in read_jsonl(path)
    ]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def exact_match(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe]) -> float:
    """The share of probes whose answer, end of text included, is what greedy generation gives."""
    right = 0
    for probe in probes:
        prompt = tokenizer.encode(probe.context + probe.prompt)
        answer = tokenizer.encode(probe.choices[probe.answer])
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        # Greedy generation gives the answer iff each of its tokens is the likeliest after those before it.
        right += logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    return right / len(probes)
