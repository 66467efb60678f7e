"""Run `disc-generate`: load, generate the texts that are not there yet, say what came of it."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from disc_train.data.chat import encode
from disc_train.data.context_length import length_of
from disc_train.data.sequence_start import bos_prefix
from disc_train.flags import check_folder
from disc_train.generation.config import GenerateArguments
from disc_train.generation.decoding import continue_prompts
from disc_train.generation.sources import Source, read_sources
from disc_train.generation.texts import count_done, first_of, list_texts
from disc_train.loading import load_for_inference, load_tokenizer
from disc_train.models.causal_lm import check_vocabulary
from disc_train.models.pretrained import trust_remote_code
from disc_train.summary import print_section


def run(arguments: GenerateArguments) -> None:
    """Generate what the arguments ask for; print how many texts there are, and what was left out.

    Raises:
        ValueError, OSError, ImportError, FloatingPointError: what the user can mend, with a message that says how.
    """
    name, path = str(arguments.model_name_or_path), Path(str(arguments.output_file))
    trust_remote_code(arguments.trust_remote_code)
    check_folder("--output_file", path.parent)
    if path.is_dir():
        raise ValueError(f"--output_file: expected a file, got the folder {path}")
    tokenizer = load_tokenizer(name)
    sources = read_sources(arguments, tokenizer)
    model = load_for_inference(name, arguments.dtype, arguments.use_cpu, arguments.attention)
    texts, left_out = list_texts(arguments, sources, tokenizer, length_of(model.config, "model"))
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

    start = bos_prefix(tokenizer, arguments.add_bos)
    empty = short = cut = 0
    limits = arguments.max_new_tokens, arguments.batch_size, arguments.max_batch_tokens
    prompts = [text.prompt for text in texts]
    with path.open("a", encoding="utf-8", newline="\n") as file:
        for index, generated, ended in continue_prompts(
            model, tokenizer, prompts, *limits, done=done, processors=sampling
        ):
            cut += not ended
            fields = _fields(arguments.mode, texts[index].source, generated)
            if not generated.strip():
                empty += 1
            elif _predicts_nothing(fields, tokenizer, start):
                short += 1
            else:
                origin = "source" if arguments.mode == "answers" else "document"
                record = {"id": texts[index].id, origin: texts[index].source.name, "ended": ended} | fields
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
    if path.stat().st_size == 0:
        raise ValueError(
            f"{path}: all {len(texts):,} texts are empty or a single token: the model ends at once; try another prompt"
        )
    method = "ft" if arguments.mode == "rephrase" else "cd --temperature 1"
    found = f"{len(texts) - done - empty - short:,} texts written" + (f", {done:,} were done before" if done else "")
    left = f"{empty:,} empty" + (f", {short:,} of a single token, which has nothing before it" if short else "")
    left_out_too = f"; {len(left_out):,} left out: {first_of(left_out)}" if left_out else ""
    print_section(
        "What came of it",
        ("texts", f"{found}; {cut:,} stopped at {arguments.max_new_tokens:,} tokens; {left}, left out"),
        (f"{arguments.noun}s", f"{len(sources):,} read{left_out_too}"),
        ("saved", str(path)),
        ("next", f"disc-train --method {method} --train_file {shlex.quote(str(path))}"),
        ("", "with --model_name_or_path and --output_dir, as for any run"),
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


def _predicts_nothing(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, start: Sequence[int]) -> bool:
    """Tell whether a student would predict no token of a record: the first of a text has nothing before it."""
    target = fields.get("target")
    if not isinstance(target, str) or fields.get("student_context") or start:
        return False
    return len(encode(tokenizer, target)) < 2


def _fields(mode: str, source: Source, generated: str) -> dict[str, Any]:
    """Return what a record holds for `disc-train`; an answer is a message where the contexts are messages."""
    if mode == "rephrase":
        return {"text": generated.strip()}
    if mode == "answers" and all(isinstance(context, list) for context in source.contexts.values() if context):
        return {**source.contexts, "target": [{"role": "assistant", "content": generated.strip()}]}
    # What an answer begins with goes on from its context: a space, say.
    return {**source.contexts, "target": generated.rstrip() if mode == "answers" else generated.strip()}
