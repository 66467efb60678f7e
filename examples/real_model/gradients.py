"""Measure how far the gradient of a top-k KL is from the full one's, on a real model's vocabulary.

    python examples/real_model/gradients.py --data_folder runs/real_model [--documents 4]

The KL is DiSC's at T = 2 and 1, over the teacher's K likeliest tokens (`top_k.py` of examples/reproduction says what
becomes of the rest), at the initial student and after 20 steps of DiSC at 2e-5. It writes results/gradients.md.
"""

import argparse
import sys
from pathlib import Path
from statistics import fmean, stdev

import yaml

sys.path.append(str(Path(__file__).resolve().parent))

from page import table
from run import GRID, top_k, training_flags

from disc_train.config import parse_arguments
from disc_train.run import load_inputs, make_trainer
from disc_train.trainer import DiscTrainer

HERE = Path(__file__).resolve().parent
METHODS = ("DiSC", "DiSC, T = 1")
SETTINGS = [(tail, k) for tail in ("bucket", "cut") for k in (1, 20, 100)]
STEPS, RATE = 20, 2e-5


def make(name: str, data: Path, model: str) -> DiscTrainer:
    """Return the trainer of a method of the grid, with a live teacher."""
    grid = yaml.safe_load(GRID.read_text(encoding="utf-8"))
    grid["sizes"]["live"] = {"cache": False}
    cell = {"name": name, "size": "live", "learning_rate": RATE, "seed": 0}
    flags = [*training_flags(grid, cell, data, model), f"--max_steps={STEPS}", f"--output_dir={data / 'gradients'}"]
    arguments = parse_arguments(flags)
    return make_trainer(*arguments, load_inputs(*arguments))


def compared(trainer: DiscTrainer, batches: list, student: str) -> list[list[str]]:
    """Compare every setting's gradients with the full one's; return a line of the table each."""
    errors: dict[tuple[str, int], list[float]] = {setting: [] for setting in SETTINGS}
    cosines: dict[tuple[str, int], list[float]] = {setting: [] for setting in SETTINGS}
    temperature = f"{trainer.settings.temperature:g}"
    for number, batch in enumerate(batches, 1):
        print(f"T = {temperature}, {student} student: document {number} of {len(batches)}", flush=True)
        full = top_k.gradient(trainer, batch, 0, "")
        for tail, k in SETTINGS:
            error, cosine = top_k.deviation(top_k.gradient(trainer, batch, k, tail), full)
            errors[tail, k].append(error)
            cosines[tail, k].append(cosine)
    return [
        [temperature, student, tail, str(k), spread(errors[tail, k], ".1f"), spread(cosines[tail, k], ".4f")]
        for tail, k in SETTINGS
    ]


def spread(values: list[float], form: str) -> str:
    return f"{fmean(values):{form}} ± {stdev(values):{form}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_folder", type=Path, required=True, help="What prepare.py wrote.")
    parser.add_argument("--model", help="Any causal model's name or folder; by default the data folder's.")
    parser.add_argument("--documents", type=int, default=4, help="How many of the file, evenly spaced.")
    asked = parser.parse_args()
    if asked.documents < 2:  # a standard deviation is written
        parser.error(f"--documents: expected at least 2, got {asked.documents}")
    model = asked.model or str(asked.data_folder / "model")
    lines, left_out = [], []
    for name in METHODS:
        trainer = make(name, asked.data_folder, model)
        dataset = trainer.train_dataset
        count = min(asked.documents, len(dataset))
        places = range(0, len(dataset), len(dataset) // count)[:count]
        batches = [trainer.data_collator([dataset[place]]) for place in places]
        beyond = {k: fmean(top_k.mass_left_out(trainer, batch, k) for batch in batches) for _, k in SETTINGS[:3]}
        shares = ", ".join(f"{share:.2f} % beyond {k}" for k, share in beyond.items())
        left_out.append(f"at T = {trainer.settings.temperature:g} there is {shares}")
        lines += compared(trainer, batches, "initial")
        trainer.train()
        lines += compared(trainer, batches, f"after {STEPS} steps")
    student = f"{type(trainer.student).__name__} of {trainer.student.num_parameters():,} parameters"
    text = (
        "# The gradient of a top-k KL against the full one's, on a real model\n\n"
        f"{student}. Mean ± standard deviation over {len(batches)} steps of one document; error: norm of the difference"
        f" over the full gradient's norm, percent, over all weights that are trained. Of the teacher's probability"
        f" {'; '.join(left_out)}, of a vocabulary of {trainer.student.config.vocab_size:,}. Written by"
        " `gradients.py`.\n\n" + table(["T", "student", "what becomes of the rest", "K", "error", "cosine"], lines)
    )
    (HERE / "results" / "gradients.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
