"""Say where a whole training step's time goes: by part of the step, and within each by kind of operation.

    python -m benchmarks.step_profile --documents 1 4

The model has Gemma 3 270M's shape, with random weights in float32 on the CPU; documents have 400 tokens and 5 suffixes
of 25. A step is the batch's collation, `DiscTrainer.training_step` and the optimizer's, under `torch.profiler`. What
counts are the shares: other work on the machine slows all parts alike. Results go to
`benchmarks/results/cpu/step_profile.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainingArguments

from benchmarks import environment
from benchmarks.cached_teacher import RESULTS, TEMPERATURE, documents, gemma_270m
from disc_train.models import causal_lm
from disc_train.models.causal_lm import use_attention
from disc_train.objectives import methods, predictions
from disc_train.trainer import DiscTrainer

# In this order an operation belongs to the first that fits.
KINDS = {
    "products": r"aten::(mm|addmm|bmm|baddbmm)$",
    "attention": r"aten::_?(scaled_dot_product|flash)",
    "the rest": "",
}
# The innermost part around an operation has it; `backward` is what of a training step is in no other.
PARTS = {
    "teacher": (predictions, "predict_as_teacher"),
    "student, forward": (predictions, "predict_as_student"),
    "masks": (causal_lm, "attention_mask"),
    "loss and its gradients": (methods, "divergence"),
}


def named(name: str, function: Callable) -> Callable:
    def run(*args: Any, **options: Any) -> Any:
        with record_function(name):
            return function(*args, **options)

    return run


@contextmanager
def parts_named() -> Iterator[None]:
    """Let the profiler see which part of a step it is in."""
    patches = [patch.object(place, name, named(part, getattr(place, name))) for part, (place, name) in PARTS.items()]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def stepper(batch_size: int, folder: str) -> Callable[[], None]:
    torch.manual_seed(0)
    teacher = gemma_270m().eval()
    use_attention(teacher, "auto")
    dataset = documents(batch_size, teacher.config.vocab_size)
    args = TrainingArguments(folder, use_cpu=True, report_to="none", per_device_train_batch_size=batch_size)
    trainer = DiscTrainer(copy.deepcopy(teacher), teacher, args, dataset, temperature=TEMPERATURE)
    optimizer, student = trainer.create_optimizer(), trainer.model
    with torch.no_grad():  # as different from the teacher as a trained one
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)

    def step() -> None:
        with record_function("collation"):
            batch = trainer.data_collator([dataset[number] for number in range(batch_size)])
        with record_function("backward"):
            trainer.training_step(student, batch, num_items_in_batch=batch_size)
        with record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    return step


def shares(trace: profile, steps: int) -> dict[str, dict[str, float]]:
    """Return the seconds that a step takes, by part of the step and then by kind of operation."""
    parts = {*PARTS, "collation", "backward", "optimizer"}
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(KINDS, 0.0))
    for event in trace.events():
        around = event
        while around is not None and around.name not in parts:
            around = around.cpu_parent
        if around is not None:
            kind = next(kind for kind, pattern in KINDS.items() if re.match(pattern, event.name))
            seconds[around.name][kind] += event.self_cpu_time_total / 1e6 / steps
    return dict(seconds)


def largest(trace: profile, steps: int, count: int = 12) -> dict[str, float]:
    """Return the seconds a step of the operations that take the most time themselves."""
    averages = sorted(trace.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return {event.key: event.self_cpu_time_total / 1e6 / steps for event in averages[:count]}


def measure(batch_size: int, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, parts_named():
        step = stepper(batch_size, folder)
        step()  # memory is allocated, and the optimizer's state
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            for _ in range(steps):
                step()
    return {
        "documents a step": batch_size,
        "steps": steps,
        "seconds a step": shares(trace, steps),
        "largest": largest(trace, steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 4], help="in a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="how many are measured (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    options = parser.parse_args()
    rows = [measure(count, options.steps) for count in options.documents]
    for row in rows:
        total = sum(sum(kinds.values()) for kinds in row["seconds a step"].values())
        print(f"{row['documents a step']} documents a step, {total:.2f} s")
        for part, kinds in row["seconds a step"].items():
            print(f"  {part:24}", *(f"{kind} {seconds / total:6.1%}" for kind, seconds in kinds.items()))
        print("  " + ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in row["largest"].items()))
    folder = options.results / environment.folder_name()
    folder.mkdir(parents=True, exist_ok=True)
    written = {"environment": environment.describe(), "rows": rows}
    (folder / "step_profile.json").write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
