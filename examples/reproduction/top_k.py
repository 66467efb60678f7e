"""Compute the KL over the teacher's K likeliest tokens in the place of all, as a loss of the runs of top_k.yaml."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from disc_kernels import fused_topk_kl
from disc_kernels.hf.head import logits_of
from disc_train.objectives import methods
from disc_train.objectives.methods import Settings, distill
from disc_train.objectives.predictions import Predictions, predict_as_teacher
from disc_train.trainer import DiscTrainer

TAILS = ("bucket", "renormalise", "cut")


def distill_top_k(k: int, tail: str, predictions: Predictions, settings: Settings) -> Tensor:
    """Compute T^2 KL(teacher || student) where only the teacher's K likeliest tokens are known.

    Args:
        tail: what becomes of the rest. "bucket": one more outcome, for both models (TRL's `add_tail`). "renormalise":
            left out of both. "cut": left out of the teacher alone, whose K probabilities are made to sum to 1, as in
            Tinker's top-k cross-entropy; at K = 1 that is cross-entropy on the teacher's likeliest token.
    """
    student, teacher = predictions.student, predictions.teacher
    with torch.no_grad():
        logits = logits_of(teacher.head, teacher.hidden.flatten(0, -2)[teacher.index])
        logprobs, ids = (logits / settings.temperature).log_softmax(-1).topk(k)
    loss = fused_topk_kl(
        student.hidden,
        student.head,
        ids,
        logprobs.log_softmax(-1) if tail == "cut" else logprobs,
        tail="renormalise" if tail == "renormalise" else "bucket",
        student_index=torch.from_numpy(student.index),
        row_weight=predictions.weight,
        temperature=settings.temperature,
        reduction="sum",
    )
    return settings.temperature**2 * loss


def distilling(k: int, tail: str) -> AbstractContextManager[None]:
    """Train `disc`, while entered, by the KL over the teacher's K likeliest tokens; for K = 0 by that over all."""
    return training_by(partial(distill_top_k, k, tail)) if k else nullcontext()


@contextmanager
def training_by(objective: Callable[[Predictions, Settings], Tensor]) -> Iterator[None]:
    """Train `disc` by another objective while entered."""
    methods.OBJECTIVES["disc"] = objective
    try:
        yield
    finally:
        methods.OBJECTIVES["disc"] = distill


def gradient(trainer: DiscTrainer, batch: list, k: int, tail: str) -> Tensor:
    """Compute the gradient of a step's loss in all weights, as one vector."""
    with distilling(k, tail):
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=batch["num_examples"])
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, weights)])


def deviation(other: Tensor, full: Tensor) -> tuple[float, float]:
    """Compute the norm of a difference over that of the full gradient, in percent, and the cosine between the two.

    In float64: over the 10^8 weights of a real model float32 sums are off by a percent.
    """
    other, full = other.double(), full.double()
    norm = full.norm()
    return 100 * ((other - full).norm() / norm).item(), (other @ full / (other.norm() * norm)).item()


@torch.no_grad()
def mass_left_out(trainer: DiscTrainer, batch: list, k: int) -> float:
    """Compute the mean probability of all but the teacher's K likeliest tokens, at the loss's T, in percent."""
    teacher = predict_as_teacher(trainer.model, trainer.teacher, batch)
    logits = logits_of(teacher.head, teacher.hidden.flatten(0, -2)[teacher.index])
    return 100 * (1 - (logits / trainer.settings.temperature).softmax(-1).topk(k).values.sum(-1)).mean().item()
