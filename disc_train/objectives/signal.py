"""How much there is to learn: what a context tells the teacher about its target (a prefix about its suffix).

The divergence alone cannot say: whatever stands in front changes what a model predicts, for the worse too. So the
teacher's log-probability of the target itself is compared with the student's, which does not read that context, and
with the teacher's behind another example's. Only what its own context makes likelier than both is content to learn.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedModel

from disc_train.data.dataset import ExampleDataset
from disc_train.data.example import Branch, Example
from disc_train.objectives.cross_entropy import linear_cross_entropy
from disc_train.objectives.methods import Side, batch_rows, divergence, teacher_side
from disc_train.packing.collator import collator

MIN_GAIN = 0.02  # nats a token: half a nat over a target of 25 tokens, less than one choice between two


class Signal(NamedTuple):
    """A number an example, in nats a token: means over targets of means over tokens, as in the loss."""

    divergence: list[float]  # KL(teacher with its context || student with its own), at the training temperature
    over_none: list[float]  # what the context adds to the target's log-probability (T = 1) over the student's
    over_other: list[float]  # the same over the teacher's behind another example's context, if any has another

    def describe(self, noun: str) -> list[tuple[str, str]]:
        """Lines (label, text) for the summary; `noun` is what an example is called."""
        low, middle, high = min(self.divergence), median(self.divergence), max(self.divergence)
        gains = f"add {fmean(self.over_none):+.4f} nats a token to the log-probability of what follows"
        if self.over_other:
            gains += f"; {fmean(self.over_other):+.4f} compared with another {noun}'s in their place"
        lines = [
            (
                "signal",
                f"{fmean(self.divergence):.4f} nats a token: mean KL from the teacher with its context to the initial"
                f" student without; by {noun} {low:.4f} to {high:.4f}, median {middle:.4f}"
                f" ({len(self.divergence):,} measured)",
            ),
            ("contexts", gains),
        ]
        weakness = self.weakness(noun)
        return lines if weakness is None else [*lines, ("WARNING", weakness)]

    def weakness(self, noun: str) -> str | None:
        """What is wrong with the data if there is hardly any signal, else None."""
        compared = [(self.over_none, "without it")]
        # What records' contexts have in common, instructions say, may be all there is to learn, and cancels out here.
        if self.over_other and noun == "document":
            compared.append((self.over_other, "behind another document's"))
        for gains, other in compared:
            noise = np.std(gains, ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
            if fmean(gains) > MIN_GAIN and fmean(gains) <= 2 * noise:
                return (
                    f"it is not certain that there is a signal: to the teacher, a target is {fmean(gains):+.4f} nats a"
                    f" token likelier behind its context than {other}, but with a standard error of {noise:.4f}; more"
                    f" {noun}s would tell."
                )
            if not fmean(gains) > MIN_GAIN:
                return (
                    "there is hardly any signal: to the teacher, a target is no likelier behind its context than"
                    f" {other}. Distillation teaches only what the context tells about the target: what is restated or"
                    " implied, not what is said once; cross-entropy (--ce_weight 0.1, or --method ft) teaches that too."
                )
        return None


def evenly_spaced(dataset: ExampleDataset, count: int = 100) -> list[Example]:
    """Up to `count` of the examples, evenly taken, as they are in the current epoch."""
    count = min(count, len(dataset))
    return [dataset[i * len(dataset) // count] for i in range(count)]


@torch.no_grad()
def measure_signal(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    examples: Sequence[Example],
    *,
    temperature: float,
) -> Signal:
    """Measure the signal of some examples, one at a time, forward only.

    Args:
        student, teacher: prepared by `disc_train.models.causal_lm.use_attention`, on one device; the
            student's mode (train or eval) is kept. No teacher: the student without its adapters.
    """
    training = student.training
    student.eval()
    collate = collator(student, teacher or student)
    longest = max(_teacher_reads(branch) for example in examples for branch in example.branches)
    signal = Signal([], [], [])
    for number, example in enumerate(examples):
        batch = send_to_device(collate([example]), student.device)
        weight, targets = batch["row_weight"], batch["targets"]
        rows = batch_rows(student, teacher, batch)
        assert rows.teacher is not None
        signal.divergence.append(float(divergence(rows, temperature, reduction="none") @ weight))

        own = _log_probability(rows.teacher, targets) @ weight
        none = _log_probability(rows.student, targets) @ weight
        signal.over_none.append(float(own - none))

        other = _another(examples, number)
        if other is not None:
            batch = send_to_device(collate([_behind(other, example, longest)]), student.device)
            behind = _log_probability(teacher_side(student, teacher, batch), targets) @ weight
            signal.over_other.append(float(own - behind))
    student.train(training)
    return signal


def _log_probability(side: Side, targets: Tensor) -> Tensor:
    """[M], in nats."""
    index = torch.from_numpy(side.index)
    return -linear_cross_entropy(side.hidden, side.head, targets, index=index, reduction="none")


def _another(examples: Sequence[Example], number: int) -> Example | None:
    """An example with another context, from far off as neighbours may be on the same matter; None if there is none."""
    for step in range(len(examples)):
        other = examples[(number + len(examples) // 2 + step) % len(examples)]
        if not np.array_equal(other.teacher_trunk, examples[number].teacher_trunk):
            return other
    return None


def _teacher_reads(branch: Branch) -> int:
    """The tokens of a branch's context and target."""
    return branch.teacher.attach + len(branch.teacher.lead) + len(branch.target)


def _behind(other: Example, example: Example, longest: int) -> Example:
    """An example whose targets the teacher reads behind contexts of another, each the one nearest in length.

    A context is cut where it would make more than `longest` tokens with the target: the teacher may not read more.
    """

    def behind(branch: Branch) -> Branch:
        contexts = [candidate.teacher for candidate in other.branches]
        nearest = min(contexts, key=lambda place: abs(place.attach - branch.teacher.attach))
        room = max(0, longest - len(nearest.lead) - len(branch.target))
        return branch._replace(teacher=nearest._replace(attach=min(nearest.attach, room)))

    return replace(example, teacher_trunk=other.teacher_trunk, branches=[behind(branch) for branch in example.branches])
