"""Compute what packed steps are compared with, in a loop over targets with plain sequences and full softmaxes."""

import torch
from torch.nn.functional import log_softmax


def loop_loss(student, teacher, examples, temperature):
    """Sum the T^2 KL of examples: the mean over an example's targets of the mean over a target's tokens.

    Args:
        examples: of each its targets, in token ids: (teacher's context, student's context, target). The first token of
            a target is predicted where both models read something before it.
    """
    losses = []
    for targets in examples:
        for teacher_context, student_context, target in targets:
            rows = len(target) - (0 if teacher_context and student_context else 1)
            with torch.no_grad():
                teacher_logits = teacher(torch.tensor([[*teacher_context, *target]])).logits[0, -rows - 1 : -1]
            student_logits = student(torch.tensor([[*student_context, *target]])).logits[0, -rows - 1 : -1]
            p, q = (log_softmax(logits / temperature, dim=-1) for logits in (teacher_logits, student_logits))
            losses.append((p.exp() * (p - q)).sum() / rows / len(targets))
    return temperature**2 * torch.stack(losses).sum()


def gradient_error(student, expected):
    """Return the largest relative error of a trained parameter's gradient; 1 for a gradient of zeros."""
    return max(
        float((got.grad - want.grad).norm() / want.grad.norm())
        for got, want in zip(student.parameters(), expected.parameters(), strict=True)
        if got.requires_grad
    )
