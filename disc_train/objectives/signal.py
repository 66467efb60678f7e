"""Measure how much there is to learn: what a context tells the teacher about its target (a prefix about its suffix).

The divergence alone cannot say: whatever stands before a target changes what a model predicts, for the worse too. So
the teacher's log-probability of the target itself is compared with the student's, which does not read that context, and
with the teacher's after another example's. Only what its own context makes likelier than both is content to learn.
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
from disc_train.objectives.predictions import ModelPredictions, divergence, predict, predict_as_teacher
from disc_train.packing.collator import collator

MIN_GAIN = 0.02  # nats a token: half a nat over a target of 25 tokens, less than one choice between two


class Signal(NamedTuple):
    """Hold a number for each example, in nats a token: means over targets of means over tokens, as in the loss."""

    divergence: list[float]  # KL(teacher with its context || student with its own), at the training temperature
    gain_over_student: list[float]  # what the context adds to the target's log-probability (T = 1) over the student's
    gain_over_other_context: list[float]  # the same over the teacher's after another's context, if any has another

    def describe(self, noun: str) -> list[tuple[str, str]]:
        """Write lines (label, text) for the summary; `noun` is what an example is called."""
        low, middle, high = min(self.divergence), median(self.divergence), max(self.divergence)
        gains = f"add {fmean(self.gain_over_student):+.4f} nats a token to the log-probability of what follows"
        if self.gain_over_other_context:
            gains += f"; {fmean(self.gain_over_other_context):+.4f} compared with another {noun}'s in their place"
        lines = [
            (
                "signal",
                f"{fmean(self.divergence):.4f} nats a token: mean KL from the teacher with its context to the initial"
                f" student without; by {noun} {low:.4f} to {high:.4f}, median {middle:.4f}"
                f" ({len(self.divergence):,} measured)",
            ),
            ("contexts", gains),
        ]
        warning = self.warning(noun) or self.cold_start_warning(noun)
        return lines if warning is None else [*lines, ("WARNING", warning)]

    def cold_start_warning(self, noun: str) -> str | None:
        """Say if most of what a document's context adds, that of any other document adds as well; else return None."""
        if not self.gain_over_other_context or noun != "document":
            return None
        whole, own = fmean(self.gain_over_student), fmean(self.gain_over_other_context)
        any_text = whole - own
        if not any_text > max(own, MIN_GAIN):
            return None
        return (
            f"most of what a context adds, {any_text:.4f} of {whole:.4f} nats a token, any other document's adds as"
            " well: the student lacks a text before its target, not this document's content. See whether sequences"
            " start as the model knows them (--add_bos), or give the student a --student_template."
        )

    def warning(self, noun: str) -> str | None:
        """Say what is wrong with the data if there is hardly any signal; return None if there is."""
        compared = [(self.gain_over_student, "without it")]
        # What records' contexts have in common, instructions say, may be all there is to learn, and cancels out here.
        if self.gain_over_other_context and noun == "document":
            compared.append((self.gain_over_other_context, "after another document's"))
        for gains, other in compared:
            noise = np.std(gains, ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
            if fmean(gains) > MIN_GAIN and fmean(gains) <= 2 * noise:
                return (
                    f"it is not certain that there is a signal: to the teacher, a target is {fmean(gains):+.4f} nats a"
                    f" token likelier after its context than {other}, but with a standard error of {noise:.4f}; more"
                    f" {noun}s would tell."
                )
            if not fmean(gains) > MIN_GAIN:
                return (
                    "there is hardly any signal: to the teacher, a target is no likelier after its context than"
                    f" {other}. Distillation teaches only what the context tells about the target: what is restated or"
                    " implied, not what is said once; cross-entropy (--ce_weight 1, or --method ft) teaches that too."
                )
        return None


def take_evenly(dataset: ExampleDataset, count: int = 100) -> list[Example]:
    """Take up to `count` examples at equal distances, as they are in the current epoch."""
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
        student, teacher: prepared by `disc_train.models.causal_lm.use_attention`, on one device; the student's mode
            (train or eval) is kept. No teacher: the student without its adapters.
    """
    training = student.training
    student.eval()
    collate = collator(student, teacher or student)
    longest = max(_teacher_length(branch) for example in examples for branch in example.branches)
    signal = Signal([], [], [])
    for number, example in enumerate(examples):
        batch = send_to_device(collate([example]), student.device)
        weight, targets = batch["row_weight"], batch["targets"]
        predictions = predict(student, teacher, batch)
        assert predictions.teacher is not None
        signal.divergence.append(float(divergence(predictions, temperature, reduction="none") @ weight))

        log_probability = _log_probability(predictions.teacher, targets) @ weight
        of_student = _log_probability(predictions.student, targets) @ weight
        signal.gain_over_student.append(float(log_probability - of_student))

        other = _example_with_another_context(examples, number)
        if other is not None:
            batch = send_to_device(collate([_swap_teacher_context(example, other, longest)]), student.device)
            behind_other = _log_probability(predict_as_teacher(student, teacher, batch), targets) @ weight
            signal.gain_over_other_context.append(float(log_probability - behind_other))
    student.train(training)
    return signal


def _log_probability(predictions: ModelPredictions, targets: Tensor) -> Tensor:
    """Compute log p(target) at T = 1 in nats: [M]."""
    index = torch.from_numpy(predictions.index)
    return -linear_cross_entropy(predictions.hidden, predictions.head, targets, index=index, reduction="none")


def _example_with_another_context(examples: Sequence[Example], number: int) -> Example | None:
    """Find an example with another context, far off, as neighbours may be on the same matter; None if there is none."""
    for step in range(len(examples)):
        other = examples[(number + len(examples) // 2 + step) % len(examples)]
        if not np.array_equal(other.teacher_trunk, examples[number].teacher_trunk):
            return other
    return None


def _teacher_length(branch: Branch) -> int:
    """Count the tokens of a branch's context and target."""
    return branch.teacher.attach + len(branch.teacher.lead) + len(branch.target)


def _swap_teacher_context(example: Example, other: Example, longest: int) -> Example:
    """Put an example's targets after the teacher's contexts of another, each after the one nearest in length.

    A context is cut where it would make more than `longest` tokens with the target: the teacher may not read more.
    """

    def swap(branch: Branch) -> Branch:
        contexts = [candidate.teacher for candidate in other.branches]
        nearest = min(contexts, key=lambda context: abs(context.attach - branch.teacher.attach))
        room = max(0, longest - len(nearest.lead) - len(branch.target))
        return branch._replace(teacher=nearest._replace(attach=min(nearest.attach, room)))

    return replace(example, teacher_trunk=other.teacher_trunk, branches=[swap(branch) for branch in example.branches])
