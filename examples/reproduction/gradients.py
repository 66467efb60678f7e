"""Measure how far the gradient of a top-k KL is from the full one's, at the start of DiSC's training and half-way.

python examples/reproduction/gradients.py      # about two minutes; writes results/top_k/gradients.md
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import torch
from cells import Cell, read_grid
from page import spread, table
from top_k import TAILS, deviation, gradient, mass_left_out
from update import Laboratory

from disc_train.trainer import DiscTrainer

HERE = Path(__file__).resolve().parent
SEEDS, KS = (0, 1, 2), (1, 20, 100)


def batches(trainer: DiscTrainer, size: int) -> Iterator[list]:
    dataset = trainer.train_dataset
    for start in range(0, len(dataset), size):
        yield trainer.data_collator([dataset[index] for index in range(start, start + size)])


def main() -> None:
    torch.set_num_threads(1)
    grid = read_grid(HERE / "top_k.yaml")
    laboratory = Laboratory(grid.model, grid.device, grid.pretraining_steps)
    # Renormalised, the one token of K = 1 has all probability, and the loss is always 0.
    settings = [(tail, k) for tail in TAILS for k in KS if (tail, k) != ("renormalise", 1)]
    lines, left_out = [], {k: [] for k in KS}
    for name, epochs in (("initial", 0), ("half-trained", 10)):
        errors: dict[tuple[str, int], list[float]] = {setting: [] for setting in settings}
        cosines: dict[tuple[str, int], list[float]] = {setting: [] for setting in settings}
        for seed in SEEDS:
            trainer = _trainer(laboratory, seed, epochs)
            for batch in batches(trainer, 4):
                full = gradient(trainer, batch, 0, "")
                for tail, k in settings:
                    error, cosine = deviation(gradient(trainer, batch, k, tail), full)
                    errors[tail, k].append(error)
                    cosines[tail, k].append(cosine)
                for k in KS if not epochs else ():
                    left_out[k].append(mass_left_out(trainer, batch, k))
        lines += [
            [tail, str(k), name, spread(errors[tail, k]), spread(cosines[tail, k], ".4f")] for tail, k in settings
        ]
    rest = ", ".join(f"{fmean(left_out[k]):.2f} % beyond {k}" for k in KS)
    text = (
        "# The gradient of a top-k KL against the full one's\n\n"
        f"Mean ± standard deviation over {len(SEEDS)} seeds of five steps of four documents; error: norm of the"
        " difference over the full gradient's norm, percent. Of the teacher's probability at T = 2 there is"
        f" {rest}, of a vocabulary of {laboratory.model.config.vocab_size:,}. Written by `gradients.py`; the"
        " protocol says what is asked.\n\n"
        + table(["what becomes of the rest", "K", "student", "error", "cosine"], lines)
    )
    path = HERE / "results" / "top_k" / "gradients.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def _trainer(laboratory: Laboratory, seed: int, epochs: int) -> DiscTrainer:
    """Make DiSC's trainer, with a student that has been trained for so many epochs."""
    cell = Cell(seed, 3.2e-4, documents=20, epochs=epochs, batch_size=4)
    corpus = laboratory.corpora(seed, cell.documents, cell.said)[0]
    student, teacher = copy.deepcopy(laboratory.model), copy.deepcopy(laboratory.model)
    trainer = laboratory.trainer(student, teacher, corpus, cell)
    if epochs:
        trainer.train()
    student.eval()
    return trainer


if __name__ == "__main__":
    main()
