"""Measure how much there is to learn: what a context tells the teacher about its target (a prefix about its suffix).

The divergence alone cannot say: whatever stands before a target changes what a model predicts, for the worse too. So
the teacher's log-probability of the target itself is compared with the student's, which does not read that context, and
with the teacher's after another example's. Only what its own context makes likelier than both is content to learn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedModel

from disc_train.data.dataset import ExampleDataset
from disc_train.data.example import Branch, Context, Example
from disc_train.objectives.cross_entropy import linear_cross_entropy
from disc_train.objectives.predictions import (
    ModelPredictions,
    Predictions,
    divergence,
    predict_as_student,
    predict_as_teacher,
)
from disc_train.packing.collator import PackedBatch, collator
from disc_train.progress import show_progress

MAX_BATCH = 16  # examples
MAX_BATCH_TOKENS = 16_384  # of both models, if every target were read in a sequence of its own
MIN_GAIN = 0.02  # nats a token: half a nat over a target of 25 tokens, less than one choice between two


class Signal(NamedTuple):
    """Hold a number for each example, in nats a token: means over targets of means over tokens, as in the loss."""

    divergence: list[float]  # KL(teacher with its context || student with its own), at the training temperature
    gain_over_student: list[float]  # what the context adds to the target's log-probability (T = 1) over the student's
    gain_over_other_context: list[float]  # the same over the teacher's after another's context, if any has another

    def describe(self, noun: str, temperature: float, kl_clip: float | None = None) -> list[tuple[str, str]]:
        """Write lines (label, text) for the summary.

        Args:
            noun: what an example is called.
            temperature: what the divergence was measured at.
            kl_clip: the most nats of this divergence that a token counts, if there is a bound.
        """
        low, middle, high = min(self.divergence), median(self.divergence), max(self.divergence)
        gains = (
            "make the target itself likelier to the teacher, in nats a token at T = 1:"
            f" {fmean(self.gain_over_student):+.4f} than to the student without"
        )
        if self.gain_over_other_context:
            gains += f", {fmean(self.gain_over_other_context):+.4f} than to the teacher with another {noun}'s"
        lines = [
            (
                "signal",
                f"{fmean(self.divergence):.4f} nats a token at T = {temperature:g}, over the whole vocabulary: mean KL"
                f" from the teacher with its context to the initial student without; by {noun} {low:.4f} to {high:.4f},"
                f" median {middle:.4f} ({len(self.divergence):,} measured)",
            ),
            ("contexts", gains),
        ]
        warnings = self.warning(noun) or self.cold_start_warning(noun), self.clip_warning(kl_clip)
        return [*lines, *(("WARNING", warning) for warning in warnings if warning)]

    def clip_warning(self, kl_clip: float | None) -> str | None:
        """Say if a token of no more than the mean divergence is clipped already; else return None."""
        mean = fmean(self.divergence)
        if kl_clip is None or not kl_clip < mean:
            return None
        return (
            f"--kl_clip {kl_clip:g} is less than the {mean:.4f} nats of a token in the mean: what most of the signal"
            " is in has no gradient; raise it or leave it out."
        )

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
                    "to the teacher, a target is hardly likelier after its own context: by"
                    f" {fmean(gains):+.4f} nats a token (T = 1) than {other}."
                    " Distillation teaches only what the context tells about the target: what is restated or implied,"
                    " not what is said once; cross-entropy (--ce_weight 1, or --method ft) teaches that too."
                )
        return None


def take_evenly(dataset: ExampleDataset, count: int) -> list[Example]:
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
    """Measure the signal of some examples, forward only, and show how far it is.

    Args:
        student: prepared by `disc_train.models.causal_lm.use_attention`; its mode (train or eval) is kept.
        teacher: prepared likewise, on the student's device; None: the student without its adapters.
        examples: those that are measured.
        temperature: of both models' distributions.
    """
    training = student.training
    student.eval()
    collate = collator(student, teacher or student)
    collate_for_student = collator(student, teacher or student, compare_all=False)
    others = _with_other_contexts(examples)
    found: dict[int, tuple[float, float, float | None]] = {}
    for numbers in show_progress(_batches(examples), len(examples), "examples whose signal is measured"):
        own, swapped = [examples[number] for number in numbers], [others[number] for number in numbers]
        batch = send_to_device(collate_for_student(own), student.device)
        # The teacher reads all contexts in one batch: what is another's context here is often an own one there.
        both = send_to_device(collate([*own, *(each for each in swapped if each)]), student.device)
        of_teacher, of_student = predict_as_teacher(student, teacher, both), predict_as_student(student, batch)
        compared = replace(of_teacher, index=of_teacher.index[: len(of_student.index)])
        predictions = Predictions(of_student, compared, batch["targets"], batch["row_weight"], batch["lengths"])

        divergences = _example_means(divergence(predictions, temperature, reduction="none"), batch)
        log_student, log_teacher = _log_probabilities(of_student, batch), _log_probabilities(of_teacher, both)
        log_other = iter(log_teacher[len(own) :])
        for number, kl, by_student, by_teacher, other in zip(
            numbers, divergences, log_student, log_teacher[: len(own)], swapped, strict=True
        ):
            found[number] = kl, by_teacher - by_student, by_teacher - next(log_other) if other else None
    student.train(training)
    kls, over_student, over_other = zip(*(found[number] for number in range(len(examples))), strict=True)
    return Signal(list(kls), list(over_student), [gain for gain in over_other if gain is not None])


def _batches(examples: Sequence[Example]) -> Iterator[list[int]]:
    """Yield the numbers of all examples in batches, each beside the one whose context it is compared with."""
    half = (len(examples) + 1) // 2
    batch: list[int] = []
    tokens = 0
    for number in sorted(range(len(examples)), key=lambda number: number % half):
        of_this = sum(
            2 * _length(branch, branch.teacher) + _length(branch, branch.student)
            for branch in examples[number].branches
        )
        if batch and (len(batch) == MAX_BATCH or tokens + of_this > MAX_BATCH_TOKENS):
            yield batch
            batch, tokens = [], 0
        batch.append(number)
        tokens += of_this
    yield batch


def _length(branch: Branch, context: Context) -> int:
    """Count the tokens of a branch's target and the context that is read before it."""
    return context.attach + len(context.lead) + len(branch.target)


def _log_probabilities(predictions: ModelPredictions, batch: PackedBatch) -> list[float]:
    """Compute the mean log p(target) at T = 1, in nats, of each example."""
    index = torch.from_numpy(predictions.index)
    losses = linear_cross_entropy(predictions.hidden, predictions.head, batch["targets"], index=index, reduction="none")
    return _example_means(-losses, batch)


def _example_means(values: Tensor, batch: PackedBatch) -> list[float]:
    """Compute the mean over targets of the means over tokens of `values` [M], for each example."""
    return torch.stack([part.sum() for part in (values * batch["row_weight"]).split(batch["lengths"])]).tolist()


def _with_other_contexts(examples: Sequence[Example]) -> list[Example | None]:
    """Put each example's targets after another's contexts, far off, as neighbours may be on the same matter.

    None where there is no example with another context.
    """
    trunks = [example.teacher_trunk.tobytes() for example in examples]
    if len(set(trunks)) == 1:
        return [None] * len(examples)
    longest = max(_length(branch, branch.teacher) for example in examples for branch in example.branches)

    def swapped(number: int) -> Example | None:
        for step in range(len(examples)):
            other = (number + len(examples) // 2 + step) % len(examples)
            if trunks[other] != trunks[number]:
                branches = [_swap_context(branch, examples[other], longest) for branch in examples[number].branches]
                # Behind an empty context a target's first token is not predicted.
                if all(new.first == old.first for new, old in zip(branches, examples[number].branches, strict=True)):
                    return replace(examples[number], teacher_trunk=examples[other].teacher_trunk, branches=branches)
        return None

    return [swapped(number) for number in range(len(examples))]


def _swap_context(branch: Branch, other: Example, longest: int) -> Branch:
    """Put a target after the one of another example's contexts that is nearest in length.

    A context is cut where it would make more than `longest` tokens with the target: the teacher may not read more.
    """
    nearest = min((each.teacher for each in other.branches), key=lambda each: abs(each.attach - branch.teacher.attach))
    room = max(0, longest - len(nearest.lead) - len(branch.target))
    return branch._replace(teacher=nearest._replace(attach=min(nearest.attach, room)))
