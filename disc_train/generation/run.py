"""Run `disc-generate`: load, generate the texts that are not there yet, say what came of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from disc_train.data.context_length import length_of
from disc_train.data.documents import load_documents
from disc_train.generation.config import GenerateArguments
from disc_train.generation.decoding import continue_prompts
from disc_train.generation.texts import TextToGenerate, count_done, list_texts
from disc_train.loading import load_for_inference, load_tokenizer
from disc_train.models.causal_lm import check_vocabulary
from disc_train.summary import print_section


def run(arguments: GenerateArguments) -> None:
    """Generate what the arguments ask for; print how many texts there are, and what was left out.

    Raises:
        ValueError, OSError, ImportError, FloatingPointError: what the user can mend, with a message that says how.
    """
    name, path = str(arguments.model_name_or_path), Path(str(arguments.output_file))
    documents = load_documents(arguments.train_file, arguments.dataset_name, arguments.text_column)
    tokenizer = load_tokenizer(name)
    model = load_for_inference(name, arguments.dtype, arguments.use_cpu, arguments.attention)
    texts, left_out = list_texts(arguments, documents, tokenizer, length_of(model.config, "model"))
    check_vocabulary(model, max(max(text.prompt) for text in texts))
    path.parent.mkdir(parents=True, exist_ok=True)
    done = count_done(path, [text.id for text in texts])

    def sampling(batch: Sequence[int]) -> LogitsProcessorList:
        return LogitsProcessorList(
            [
                TemperatureLogitsWarper(float(arguments.temperature)),
                TopPLogitsWarper(arguments.top_p),
                _Sample([texts[index].seed for index in batch], model.device),
            ]
        )

    empty = cut = 0
    limits = arguments.max_new_tokens, arguments.batch_size, arguments.max_batch_tokens
    prompts = [text.prompt for text in texts]
    with path.open("a", encoding="utf-8", newline="\n") as file:
        for index, generated, ended in continue_prompts(
            model, tokenizer, prompts, *limits, done=done, processors=sampling
        ):
            empty += not generated.strip()
            cut += not ended
            if generated.strip():
                record = _record(arguments.mode, texts[index], generated.strip(), ended)
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: all {len(texts):,} texts are empty: the model ends at once; try another prompt")
    found = f"{len(texts) - done:,} texts written" + (f", {done:,} were there" if done else "")
    print_section(
        "What came of it",
        ("texts", f"{found}; {cut:,} stopped at {arguments.max_new_tokens:,} tokens; {empty:,} empty, left out"),
        ("documents", f"{len(documents):,} read" + "".join(f"; left out: {reason}" for reason in left_out)),
        ("saved", str(path)),
    )


class _Sample(LogitsProcessor):
    """Make the likeliest token a sample from softmax(scores), by Gumbel noise from one generator for each row.

    What is drawn for a text so does not depend on what else is in its batch.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.clamp_min(torch.finfo(noise.dtype).tiny).log()


def _record(mode: str, text: TextToGenerate, generated: str, ended: bool) -> dict[str, Any]:
    record: dict[str, Any] = {"id": text.id, "document": text.document.name, "ended": ended}
    if mode == "rephrase":
        return record | {"text": generated}
    return record | {"teacher_context": f"{text.document.text}\n\n", "student_context": "", "target": generated}
