"""Read the example's probes, questions in the model's chat form, and see whether it answers them word for word."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from disc_train.evaluation import Probe

END = "<|endoftext|>"


def load_probes(path: Path, documents: Path | None = None) -> list[Probe]:
    """Read the questions in `path`; with `documents`, each with the document that answers it in its context."""
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


def exact_match(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe]) -> float:
    """Return the share of probes that are answered exactly."""
    return sum(answers_exactly(model, tokenizer, probe) for probe in probes) / len(probes)


@torch.no_grad()
def answers_exactly(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probe: Probe) -> bool:
    """Tell whether greedy generation gives a probe's answer, end of text included."""
    prompt = tokenizer.encode(probe.context + probe.prompt)
    answer = tokenizer.encode(probe.choices[probe.answer])
    logits = model(input_ids=torch.tensor([prompt + answer], device=model.device)).logits[0]
    # Greedy generation gives the answer iff each of its tokens is the likeliest after those before it.
    return logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
