"""Take training steps by each system: a function prepares what is not timed, and returns the call that is.

The call computes the mean loss of a step's documents, and adds its gradients to the student's. The optimizer's part is
the same for all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from benchmarks.peers import NotAvailable
from benchmarks.step_cases import StepCase
from disc_train.data.dataset import DocumentDataset
from disc_train.data.example import Example
from disc_train.trainer import DiscTrainer

Backward = Callable[[Sequence[Example]], Tensor]  # gives the mean loss of the documents, []
TEMPERATURE = 2.0


def ours(
    case: StepCase,
    dataset: DocumentDataset,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    attention: str = "auto",
) -> Backward:
    """Do what `DiscTrainer.train` does with a step's documents: its collator, in this process, its `training_step`.

    Its logging and callbacks are left out, and data loader workers that would collate the next step meanwhile.
    """
    if attention in ("flex", "varlen") and student.device.type == "cpu":
        raise NotAvailable("needs CUDA")
    args = TrainingArguments(
        tempfile.gettempdir(),  # nothing is saved
        per_device_train_batch_size=case.documents,
        bf16=case.shape.autocast,
        use_cpu=student.device.type == "cpu",
    )
    trainer = DiscTrainer(student, teacher, args, dataset, temperature=TEMPERATURE, attention=attention)

    def backward(examples: Sequence[Example]) -> Tensor:
        # As the Trainer's data loader does; its `training_step` moves tensors only, not layouts.
        batch = send_to_device(trainer.data_collator(examples), student.device)
        return trainer.training_step(student, batch, num_items_in_batch=len(examples))

    return backward


ours_sdpa, ours_flex, ours_varlen = (partial(ours, attention=name) for name in ("sdpa", "flex", "varlen"))


def per_split_loop(
    case: StepCase, dataset: DocumentDataset, student: PreTrainedModel, teacher: PreTrainedModel
) -> Backward:
    """Follow the procedure of the method's authors (arXiv 2602.16093), one split point after another.

    The teacher reads prefix and suffix, the student the suffix, both give the logits of all they read, and the
    gradients are added up. Softmaxes are float32 here, or the loss could not be held to ours. Documents are on the
    device beforehand.
    """
    for model in (student, teacher):
        model.set_attn_implementation("sdpa")  # transformers' default; ours may have changed the teacher's
    documents = {
        example.name: torch.from_numpy(example.teacher_trunk).long().to(student.device)
        for example in (dataset[i] for i in range(len(dataset)))
    }

    def split_loss(document: Tensor, start: int, stop: int) -> Tensor:
        n = stop - start
        with torch.no_grad():
            teacher_logits = teacher(document[None, :stop], use_cache=False).logits[0, -n:-1]
        with torch.autocast(student.device.type, torch.bfloat16, enabled=case.shape.autocast):
            student_logits = student(document[None, start:stop], use_cache=False).logits[0, :-1]
        log_p = F.log_softmax(teacher_logits.float() / TEMPERATURE, dim=-1)
        log_q = F.log_softmax(student_logits.float() / TEMPERATURE, dim=-1)
        return TEMPERATURE**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    def backward(examples: Sequence[Example]) -> Tensor:
        student.train()
        total = torch.zeros((), device=student.device)
        for example in examples:
            for branch in example.branches:
                start = branch.teacher.attach
                loss = split_loss(documents[example.name], start, start + len(branch.target))
                loss = loss / (len(example.branches) * len(examples))
                loss.backward()
                total += loss.detach()
        return total

    return backward
