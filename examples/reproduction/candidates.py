"""Define two changes to DiSC that were tried.

One takes the cross-entropy of tokens that their prefix tells; the other draws suffixes by how much their prefixes tell.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from disc_train.data.dataset import DocumentDataset, ExampleDataset
from disc_train.data.example import NO_IDS, Branch, Context, Example
from disc_train.data.splits import TokenizedDocument
from disc_train.models.causal_lm import use_attention
from disc_train.objectives.methods import Settings
from disc_train.objectives.predictions import Predictions, cross_entropy, divergence
from disc_train.objectives.signal import measure_signal

MIN_GAIN = 0.5  # nats, of a token
LEAST = 0.02  # nats a token: what a sentence's gain counts as at least, so that every one may be drawn


def distill_or_tell(predictions: Predictions, settings: Settings) -> Tensor:
    """Add the cross-entropy of tokens on which the prefix tells more than the student knows to the KL of all others.

    A token is told if the teacher gives it at least MIN_GAIN nats more log-probability than the student does (T = 1),
    so it ceases to be once the student has learned it.
    """
    with torch.no_grad():
        by_teacher = cross_entropy(replace(predictions, student=predictions.teacher), reduction="none")
        told = cross_entropy(predictions, reduction="none") - by_teacher > MIN_GAIN
    of_told = cross_entropy(replace(predictions, weight=predictions.weight * told))
    of_others = divergence(replace(predictions, weight=predictions.weight * ~told), settings.temperature)
    return settings.ce_weight * of_told + settings.temperature**2 * of_others


class SplitsByGain(ExampleDataset):
    """Give each document with suffixes drawn by what their prefixes tell, and its last sentence always.

    A sentence is drawn, without replacement, as likely as its prefix makes it likelier to the initial model: by the
    mean gain in nats a token, and at least LEAST.
    """

    def __init__(self, dataset: DocumentDataset, model: PreTrainedModel) -> None:
        super().__init__((), noun=dataset.noun)
        self.dataset = dataset
        use_attention(model, "sdpa")
        sentences = [_sentences(document) for document in dataset.documents]
        each = [replace(example, branches=[branch]) for example in sentences for branch in example.branches]
        gains = iter(measure_signal(model, model, each, temperature=1.0).gain_over_student)
        self.sentences = [(example, [max(next(gains), LEAST) for _ in example.branches]) for example in sentences]

    def __len__(self) -> int:
        return len(self.sentences)

    def __getitem__(self, index: int) -> Example:
        example, gains = self.sentences[index]
        shares = np.array(gains[:-1]) / sum(gains[:-1])
        rng = np.random.default_rng([self.dataset.seed, self.epoch, index])
        drawn = rng.choice(len(shares), self.dataset.num_splits - 1, replace=False, p=shares)
        return replace(example, branches=[*(example.branches[i] for i in sorted(drawn)), example.branches[-1]])

    def longest(self) -> tuple[int, str]:
        return self.dataset.longest()


def _sentences(document: TokenizedDocument) -> Example:
    """Make an example of a document, with all its sentences but the first as suffixes."""
    starts, ids = document.sentence_starts, document.input_ids
    branches = [
        Branch(ids[start:stop], Context(start), Context(0))
        for start, stop in zip(starts[1:], [*starts[2:], len(ids)], strict=True)
    ]
    return Example(document.name, ids, NO_IDS, branches)
