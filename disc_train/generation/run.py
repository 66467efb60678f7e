"""One run of `disc-generate`: load, write the texts that are not there yet, say what came of it."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from disc_train.batches import batches_by_length
from disc_train.data.context_length import length_of
from disc_train.data.documents import load_documents
from disc_train.decoding import continue_batch, end_tokens
from disc_train.generation.config import GenerateArguments
from disc_train.generation.jobs import Job, plan, resume
from disc_train.loading import load_for_inference, load_tokenizer
from disc_train.models.causal_lm import check_vocabulary
from disc_train.summary import show


def run(arguments: GenerateArguments) -> None:
    """Do what the arguments ask; print how many texts there are, and what was left out.

    Raises:
        ValueError, OSError, ImportError, FloatingPointError: what the user can mend, with a message that says how.
    """
    documents = load_documents(arguments.train_file, arguments.dataset_name, arguments.text_column)
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    model = load_for_inference(arguments.model_name_or_path, arguments.dtype, arguments.use_cpu)
    jobs, left_out = plan(arguments, documents, tokenizer, length_of(model.config, "model"))
    check_vocabulary(model, max(max(job.prompt) for job in jobs))
    path = Path(arguments.output_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = resume(path, [job.id for job in jobs])
    empty = cut = 0
    with path.open("a", encoding="utf-8", newline="\n") as file:
        for job, text, ended in write_texts(arguments, jobs, done, model, tokenizer):
            empty += not text
            cut += not ended
            if text:
                file.write(json.dumps(_record(arguments.mode, job, text, ended), ensure_ascii=False) + "\n")
                file.flush()
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: all {len(jobs):,} texts are empty: the model ends at once; try another prompt")
    found = f"{len(jobs) - done:,} texts written" + (f", {done:,} were there" if done else "")
    show(
        "What came of it",
        ("texts", f"{found}; {cut:,} stopped at {arguments.max_new_tokens:,} tokens; {empty:,} empty, left out"),
        ("documents", f"{len(documents):,} read" + "".join(f"; left out: {reason}" for reason in left_out)),
        ("saved", str(path)),
    )


def write_texts(
    arguments: GenerateArguments,
    jobs: Sequence[Job],
    done: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[tuple[Job, str, bool]]:
    """Every job but the first `done`, with its text and whether the model ended it."""
    ends = end_tokens(model, tokenizer)
    lengths = [len(job.prompt) + arguments.max_new_tokens for job in jobs]
    for batch in batches_by_length(lengths, arguments.batch_size, arguments.max_batch_tokens):
        if batch[-1] < done:
            continue
        # A batch is read whole again, whatever part of it is done: what stands beside a text may round it differently.
        processors = LogitsProcessorList(
            [
                TemperatureLogitsWarper(float(arguments.temperature)),
                TopPLogitsWarper(arguments.top_p),
                _Draw([jobs[place].seed for place in batch], model.device),
            ]
        )
        prompts = [jobs[place].prompt for place in batch]
        continuations = continue_batch(model, prompts, arguments.max_new_tokens, ends, processors)
        for place, ids in zip(batch, continuations, strict=True):
            if place >= done:
                text: str = tokenizer.decode(ids, skip_special_tokens=True)  # type: ignore[assignment]
                yield jobs[place], text.strip(), ids[-1] in ends


class _Draw(LogitsProcessor):
    """Makes the likeliest token a sample from softmax(scores), by Gumbel noise from a generator a row.

    So what is drawn for a text does not depend on what else is in its batch, as with one generator for all it would.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.clamp_min(torch.finfo(noise.dtype).tiny).log()


def _record(mode: str, job: Job, text: str, ended: bool) -> dict[str, Any]:
    record: dict[str, Any] = {"id": job.id, "document": job.document.name, "ended": ended}
    if mode == "rephrase":
        return record | {"text": text}
    return record | {"teacher_context": f"{job.document.text}\n\n", "student_context": "", "target": text}
