"""How much there is to learn: what the text before a suffix tells the teacher about it and the student does not know."""

from collections.abc import Sequence
from statistics import fmean, median
from typing import NamedTuple

import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedModel

from disc_train.causal_lm import head_of, hidden_states, log_probability
from disc_train.dataset import DocumentDataset
from disc_train.objectives import suffix_kl
from disc_train.packing import Sample, pack


MIN_DIVERGENCE = 0.005
MIN_GAIN = 0.02


class Signal(NamedTuple):
    """Both in nats a token, over the tokens that are trained on."""

    divergence: float  # KL(teacher with prefix || student without), at the training temperature: what is minimised
    gain: float  # how much more log-probability the teacher gives to the text itself, at temperature 1
    documents: list[float]  # each document's divergence

    def __str__(self) -> str:
        low, middle, high = min(self.documents), median(self.documents), max(self.documents)
        return (
            f"{self.divergence:.4f} nats a token (documents: {low:.4f} to {high:.4f}, median {middle:.4f});"
            f" with its prefix the text is {self.gain:.4f} nats a token more likely"
        )


def weakness(signal: Signal) -> str | None:
    """What is wrong with the data if there is hardly any signal, else None."""
    if signal.divergence < MIN_DIVERGENCE or signal.gain < MIN_GAIN:
        return (
            "there is hardly anything to learn: what stands before a suffix tells the teacher next to nothing about it."
            " Distillation teaches what documents restate or imply, not what they say once."
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
    """Measure the signal on some documents, one at a time, forward only; the student's mode is kept.

    Args:
        student, teacher: prepared by `disc_train.causal_lm.use_attention(model, attention, ...)`, on one device.
    """
    training = student.training
    student.eval()
    divergences, gains, documents = [], [], []
    for sample in samples:
        batch = send_to_device(pack([sample]), student.device)
        student_hidden = hidden_states(student, batch["input_ids"], batch["layout"], attention)
        teacher_hidden = hidden_states(teacher, batch["teacher_input_ids"], batch["teacher_layout"], attention)
        student_head, teacher_head = head_of(student), head_of(teacher)
        rows = suffix_kl((student_hidden, student_head), (teacher_hidden, teacher_head), batch, temperature, "none")
        targets = batch["teacher_input_ids"].new_tensor(
            [token for start, stop in sample.splits for token in sample.document.input_ids[start + 1 : stop]]
        )
        gain = log_probability(teacher_head, teacher_hidden[0, batch["teacher_index"]], targets) - log_probability(
            student_head, student_hidden[0, batch["student_index"]], targets
        )
        divergences += rows.tolist()
        gains += gain.tolist()
        documents.append(float(rows @ batch["row_weight"]))
    student.train(training)
    return Signal(fmean(divergences), fmean(gains), documents)
