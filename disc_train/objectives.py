"""What is minimised: one function a method, from a packed batch to a loss."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from disc_kernels import fused_suffix_kl
from disc_train.causal_lm import Head, common_vocabulary, head_of, hidden_states
from disc_train.packing import PackedBatch


def distill(student: PreTrainedModel, teacher: PreTrainedModel, batch: PackedBatch, *, temperature: float) -> Tensor:
    """Context distillation, of documents (disc) and of records (cd): KL(teacher behind its context || student).

    Args:
        student, teacher: causal language models on the batch's device, prepared by
            `disc_train.causal_lm.use_attention`; gradients flow to the student alone.
        temperature: T; both models' logits are divided by it.

    Returns:
        T^2 times the sum over the batch's examples of the mean over their targets of the mean KL in nats over their
        tokens: a scalar. T^2 keeps the gradients as large as at T = 1 (Hinton et al., arXiv 1503.02531).
    """
    # The teacher gives what its own dtype gives, whatever mixed precision the student is trained in.
    with torch.no_grad(), torch.autocast(batch["input_ids"].device.type, enabled=False):
        teacher_hidden = hidden_states(teacher, batch["teacher_input_ids"], batch["teacher_layout"])
    student_hidden = hidden_states(student, batch["input_ids"], batch["layout"])
    divergence = suffix_kl(
        (student_hidden, head_of(student)), (teacher_hidden, head_of(teacher)), batch, temperature, reduction="sum"
    )
    return temperature**2 * divergence


def suffix_kl(
    student: tuple[Tensor, Head],
    teacher: tuple[Tensor, Head],
    batch: PackedBatch,
    temperature: float,
    reduction: str,
) -> Tensor:
    """`fused_suffix_kl` over a batch's M rows, from both models' hidden states [rows, L, D] and heads."""
    (student_hidden, student_head), (teacher_hidden, teacher_head) = student, teacher
    return fused_suffix_kl(  # type: ignore[return-value]
        student_hidden,
        student_head.weight,
        teacher_hidden,
        teacher_head.weight,
        student_index=torch.from_numpy(batch["student_index"]),
        teacher_index=torch.from_numpy(batch["teacher_index"]),
        row_weight=batch["row_weight"],
        temperature=temperature,
        reduction=reduction,
        student_bias=student_head.bias,
        teacher_bias=teacher_head.bias,
        student_transform=student_head.transform,
        teacher_transform=teacher_head.transform,
        vocab_size=common_vocabulary(student_head, teacher_head),
    )
