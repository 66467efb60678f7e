"""How much there is to learn: what the text before a suffix tells the teacher about the suffix.

The divergence alone cannot say: whatever stands in front changes what a model predicts, for the worse too. So the
teacher's log-probability of the text itself is compared with the student's, which reads no prefix, and with the
teacher's behind another document. Only what its own document makes likelier than both is content that can be learned.
"""

import itertools
from collections.abc import Sequence
from statistics import fmean, median
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedModel

from disc_kernels import SharedPrefixLayout
from disc_train.causal_lm import head_of, hidden_states, log_probability
from disc_train.dataset import DocumentDataset
from disc_train.objectives import suffix_kl
from disc_train.packing import Sample, pack

MIN_GAIN = 0.02  # nats a token: half a nat over a suffix of 25 tokens, less than one choice between two


class Signal(NamedTuple):
    """A number a document, in nats a token: means over suffixes of means over tokens, as in the loss."""

    divergence: list[float]  # KL(teacher with prefix || student without), at the training temperature
    over_none: list[float]  # what the prefix adds to the text's log-probability (T = 1) over the student's
    over_other: list[float]  # the same over the teacher's behind another document

    def describe(self) -> list[tuple[str, str]]:
        """Lines (label, text) for the summary."""
        low, middle, high = min(self.divergence), median(self.divergence), max(self.divergence)
        lines = [
            (
                "signal",
                f"{fmean(self.divergence):.4f} nats a token: mean KL from the teacher with its prefix to the initial"
                f" student without; by document {low:.4f} to {high:.4f}, median {middle:.4f}"
                f" ({len(self.divergence):,} measured)",
            ),
            (
                "prefixes",
                f"add {fmean(self.over_none):+.4f} nats a token to the log-probability of what follows;"
                f" {fmean(self.over_other):+.4f} compared with another document in their place",
            ),
        ]
        weakness = self.weakness()
        return lines if weakness is None else [*lines, ("WARNING", weakness)]

    def weakness(self) -> str | None:
        """What is wrong with the data if there is hardly any signal, else None."""
        for gains, other in ((self.over_none, "without it"), (self.over_other, "behind another document")):
            noise = np.std(gains, ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
            if fmean(gains) > MIN_GAIN and fmean(gains) <= 2 * noise:
                return (
                    f"it is not certain that there is a signal: to the teacher, a suffix is {fmean(gains):+.4f} nats a"
                    f" token likelier behind its prefix than {other}, but with a standard error of {noise:.4f}; more"
                    " documents would tell."
                )
            if not fmean(gains) > MIN_GAIN:
                return (
                    "there is hardly any signal: to the teacher, a suffix is no likelier behind its prefix than"
                    f" {other}. Distillation teaches what a document restates or implies, not what it says once."
                )
        return None


def evenly_spaced(dataset: DocumentDataset, count: int = 100) -> list[Sample]:
    """Up to `count` of the documents, evenly taken, with the splits of the current epoch."""
    count = min(count, len(dataset))
    return [dataset[i * len(dataset) // count] for i in range(count)]


@torch.no_grad()
def measure_signal(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    samples: Sequence[Sample],
    *,
    temperature: float,
    attention: str,
) -> Signal:
    """Measure the signal of some documents, one at a time, forward only.

    Args:
        student, teacher: prepared by `disc_train.causal_lm.use_attention(model, attention, ...)`, on one device; the
            student's mode (train or eval) is kept.
    """
    training = student.training
    student.eval()
    student_head, teacher_head = head_of(student), head_of(teacher)
    signal = Signal([], [], [])
    for number, sample in enumerate(samples):
        batch = send_to_device(pack([sample]), student.device)
        weight = batch["row_weight"]
        student_hidden = hidden_states(student, batch["input_ids"], batch["layout"], attention)
        teacher_hidden = hidden_states(teacher, batch["teacher_input_ids"], batch["teacher_layout"], attention)
        divergence = suffix_kl(
            (student_hidden, student_head), (teacher_hidden, teacher_head), batch, temperature, reduction="none"
        )
        signal.divergence.append(float(divergence @ weight))

        targets = _targets(sample).to(student.device)
        own = log_probability(teacher_head, teacher_hidden[0, batch["teacher_index"]], targets) @ weight
        none = log_probability(student_head, student_hidden[0, batch["student_index"]], targets) @ weight
        signal.over_none.append(float(own - none))

        other = _another(samples, number)
        if other is not None:
            input_ids, layout = send_to_device(_behind(other, sample), student.device)
            hidden = hidden_states(teacher, input_ids, layout, attention)[0, -len(targets) :]
            signal.over_other.append(float(own - log_probability(teacher_head, hidden, targets) @ weight))
        else:
            signal.over_other.append(signal.over_none[-1])
    student.train(training)
    return signal


def _another(samples: Sequence[Sample], number: int) -> Sample | None:
    """A sample of another text, from far off since neighbours may be on the same matter; None if there is none."""
    for step in range(len(samples)):
        other = samples[(number + len(samples) // 2 + step) % len(samples)]
        if not np.array_equal(other.document.input_ids, samples[number].document.input_ids):
            return other
    return None


def _behind(other: Sample, sample: Sample) -> tuple[Tensor, SharedPrefixLayout]:
    """A sample's suffixes, each behind about as much of another document as it has prefix, in whole sentences."""
    trunk = other.document.input_ids.tolist()
    ends = [*other.document.sentence_starts[1:], len(trunk)]
    attach = [min(ends, key=lambda end: abs(end - split.start)) for split in sample.splits]
    branches = [sample.document.input_ids[start : stop - 1].tolist() for start, stop in sample.splits]
    layout = SharedPrefixLayout.from_trees([(len(trunk), list(zip(attach, map(len, branches), strict=True)))])
    return torch.tensor([list(itertools.chain(trunk, *branches))]), layout


def _targets(sample: Sample) -> Tensor:
    """[M] int64: the token that each row predicts."""
    ids = torch.from_numpy(sample.document.input_ids).long()
    return torch.cat([ids[start + 1 : stop] for start, stop in sample.splits])
