"""Measure whole steps with a live teacher and with a cached one, in bfloat16 autocast where there is a GPU.

    python -m benchmarks.cached_teacher --seconds 60

All variants of a shape are in one process, and take their steps in turn, so that what else the machine does slows all
alike: what counts is the ratio, on a CPU of processor time on one thread. A step is `DiscTrainer.training_step` and the
optimizer's, with the batch's collation; the cache is filled before, so this is the speed from the second epoch on.
Results go to `benchmarks/results/<device>/cached_teacher.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, TrainingArguments

from benchmarks import environment
from disc_kernels import LogitTransform
from disc_kernels.hf import OutputHead, output_head
from disc_train.data.dataset import DocumentDataset
from disc_train.data.splits import TokenizedDocument
from disc_train.models.causal_lm import use_attention
from disc_train.models.frozen_head import freeze_head
from disc_train.teacher_cache.cached_teacher import CachedTeacher
from disc_train.teacher_cache.fill import FrozenHead, row_bytes, rows_of
from disc_train.teacher_cache.sequences import TeacherSequence, sequences_of
from disc_train.teacher_cache.store import Store, writer
from disc_train.trainer import DiscTrainer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RESULTS = Path(__file__).parent / "results"
clock = time.perf_counter if DEVICE == "cuda" else time.process_time
TEMPERATURE = 2.0


def tiny():
    """Make a model of the shape that the tests and the demo use."""
    config = LlamaConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def gemma_270m():
    """Make a model of Gemma 3 270M's shape with random weights; its tied embeddings are 62 % of the parameters."""
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=262_144,
            hidden_size=640,
            intermediate_size=2048,
            num_hidden_layers=18,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            sliding_window=512,
        )
    )


# What makes a model of the shape, and how many documents a step of it has.
SHAPES: dict[str, tuple[Callable, int]] = {"tiny": (tiny, 4), "gemma-270m": (gemma_270m, 16 if DEVICE == "cuda" else 1)}
VARIANTS = (
    "live, frozen head",
    "cached summaries, frozen head",
    "cached hidden states, frozen head",
    "live, trained head",
    "cached hidden states, trained head",
)


def documents(count: int, vocabulary: int) -> DocumentDataset:
    """Make documents of 400 random tokens in 16 sentences of 25, of which 5 are suffixes."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary, (count, 400), dtype=np.int32)
    return DocumentDataset(
        [TokenizedDocument(f"d{number}", ids, tuple(range(0, 400, 25))) for number, ids in enumerate(tokens)]
    )


def cache(teacher, dataset: DocumentDataset, folder: Path, frozen: bool) -> CachedTeacher:
    """Fill a cache in bfloat16, as disc-train would, and return the teacher that it stands in for."""
    head = output_head(teacher)
    summarised = FrozenHead(head, TEMPERATURE, None, None) if frozen else None
    size = row_bytes(head.weight.shape[1], frozen, torch.bfloat16)
    with writer(folder) as store:
        store.fill(sequences_of(dataset, 1), lambda some: rows_of(teacher, some, summarised, torch.bfloat16), 4, size)
    kept = None if frozen else OutputHead(head.weight.detach().clone(), head.bias, LogitTransform())
    return CachedTeacher(Store(folder), kept, TEMPERATURE if frozen else None, None, "")


def stepper(student, teacher, dataset: DocumentDataset, batch_size: int, folder: str) -> Callable[[], None]:
    """Make a function that takes one step on the next documents."""
    args = TrainingArguments(
        folder,
        use_cpu=DEVICE == "cpu",
        bf16=DEVICE == "cuda",
        report_to="none",
        per_device_train_batch_size=batch_size,
        learning_rate=1e-5,
    )
    trainer = DiscTrainer(student, teacher, args, dataset, temperature=TEMPERATURE)
    optimizer = trainer.create_optimizer()
    number = 0

    def step() -> None:
        nonlocal number
        examples = [dataset[(number + i) % len(dataset)] for i in range(batch_size)]
        number += batch_size
        batch = send_to_device(trainer.data_collator(examples), DEVICE)
        trainer.training_step(student, batch, num_items_in_batch=batch_size)
        optimizer.step()
        optimizer.zero_grad()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return step


def measure(shape: str, seconds: float, chosen: tuple[str, ...]) -> list[dict]:
    """Time the chosen variants of a shape in turn, round by round; return a row for each."""
    make, batch_size = SHAPES[shape]
    torch.manual_seed(0)
    teacher = make().to(DEVICE).eval()
    dataset = documents(2 * batch_size, teacher.config.vocab_size)
    use_attention(teacher, "auto")
    with tempfile.TemporaryDirectory() as folder:
        caches = {frozen: cache(teacher, dataset, Path(folder, str(frozen)), frozen) for frozen in (True, False)}
        rounds: dict[str, list[float]] = {name: [] for name in chosen}
        steps = {}
        for name in chosen:
            student = copy.deepcopy(teacher)
            with torch.no_grad():  # as different from the teacher as a trained one
                for parameter in student.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=1e-3)
                student.get_output_embeddings().weight.copy_(teacher.get_output_embeddings().weight)
            student.requires_grad_(True)
            if "frozen" in name:
                freeze_head(student)
            kind = copy.deepcopy(teacher) if "live" in name else caches["summaries" in name]
            steps[name] = stepper(student, kind, dataset, batch_size, folder)
            steps[name]()  # memory is allocated, and the optimizer's state
        began = time.monotonic()
        while time.monotonic() - began < seconds or len(rounds[chosen[0]]) < 3:
            for name, step in steps.items():
                start = clock()
                step()
                rounds[name].append(clock() - start)
    live = rounds[VARIANTS[0]]
    return [
        {
            "shape": shape,
            "variant": name,
            "documents a step": batch_size,
            "steps": len(times),
            "documents a second": batch_size / statistics.median(times),
            "of live, frozen head": statistics.median(one / other for one, other in zip(live, times, strict=True)),
        }
        for name, times in rounds.items()
    ]


def own_bytes() -> int:
    """Count the bytes that this process holds itself, without the files that it has mapped."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) << 10


def opening(documents: int = 25_000, rows: int = 400, width: int = 32) -> dict:
    """Fill a cache of made-up rows, open it and read some; measure processor time and the process's own memory."""
    tokens = np.random.default_rng(0).integers(0, 30_000, (documents, rows + 1), dtype=np.int32)
    made_up = [TeacherSequence(f"d{number}", ids, 0) for number, ids in enumerate(tokens)]
    with tempfile.TemporaryDirectory() as folder:
        with writer(folder) as store:
            ones = torch.ones(1000 * rows, width, dtype=torch.bfloat16)
            store.fill(made_up, lambda some: {"hidden": ones[: rows * len(some)]}, 1000, 2 * width)
        before, began = own_bytes(), time.process_time()
        opened = Store(folder)
        seconds, held = time.process_time() - began, own_bytes()
        for sequence in made_up[::20]:
            opened.read([(sequence, rows + 1)])
        return {
            "tokens": opened.rows,
            "width": width,
            "seconds to open (processor)": seconds,
            "bytes held once open": held - before,
            "bytes held after sequence 1 in 20": own_bytes() - before,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each shape (default: %(default)s)")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="measure only the first so many variants")
    parser.add_argument("--opening", action="store_true", help="measure how a large cache is opened, and nothing else")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    options = parser.parse_args()
    folder = options.results / environment.folder_name()
    folder.mkdir(parents=True, exist_ok=True)
    if options.opening:
        result = {"environment": environment.describe(), "opening": opening()}
        (folder / "teacher_cache_opening.json").write_text(json.dumps(result, indent=2) + "\n")
        return
    file = folder / "cached_teacher.json"
    known = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = [row for row in known if row["shape"] not in options.shapes]
    for shape in options.shapes:
        rows += measure(shape, options.seconds, VARIANTS[: options.variants])
        for row in rows[-options.variants :]:
            print(row, flush=True)
        written = {"environment": environment.describe(), "rows": rows}
        file.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
