"""Count what a run's steps will take, before they are taken: memory a process, tokens, operations."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.training_args import OptimizerNames

from disc_kernels.hf import output_head
from disc_kernels.hf.forward import decoder_of
from disc_kernels.linear_kl.workspace import DEFAULT_BYTES
from disc_train.data.dataset import ExampleDataset
from disc_train.models.frozen_head import head_is_frozen
from disc_train.models.frozen_layers import count_frozen
from disc_train.objectives.predictions import predict_as_student, predict_as_teacher
from disc_train.packing.drawing import sample_batches
from disc_train.parallel.sharding import free_gathered_parameters, local_part
from disc_train.teacher_cache.cached_teacher import live
from disc_train.teacher_cache.open import TeacherCache
from disc_train.trainer import DiscTrainer

# Numbers that an optimizer keeps of a parameter, in the parameter's dtype; what is not here is not counted.
STATES = {"adamw_torch": 2, "adamw_torch_fused": 2, "sgd": 0, "rmsprop": 1, "adagrad": 1}


@dataclass(frozen=True)
class Cost:
    """Hold what a step takes of a process; memory in bytes, operations as multiplications and additions.

    Weights, gradients and optimizer states are exact. Of the largest batch of those tried: activations, which are what
    autograd keeps of its forward pass, the workspace of the loss at most, tokens, and operations.
    """

    weights: int
    gradients: int
    optimizer: int | None  # None: unknown
    teacher: int
    workspace: int
    activations: int
    tokens: dict[str, int]  # by reader
    operations: dict[str, int]  # by part
    cache: str | None  # what a cache of the teacher holds, and takes on disk

    @property
    def total(self) -> int:
        """Compute the bytes that a process needs, where its optimizer's are known."""
        held = self.weights + self.gradients + (self.optimizer or 0) + self.teacher
        return held + self.workspace + self.activations

    def describe(self) -> list[tuple[str, str]]:
        """Describe it in lines (label, text)."""
        states = "not counted" if self.optimizer is None else _size(self.optimizer)
        memory = (
            f"about {_size(self.total)} a process: weights {_size(self.weights)}, gradients {_size(self.gradients)},"
            f" optimizer {states}, teacher {_size(self.teacher)}, workspace of the loss up to"
            f" {_size(self.workspace)}, activations {_size(self.activations)} (estimated, of the largest batch tried)"
        )
        tokens = " and ".join(f"{count:,} of the {reader}" for reader, count in self.tokens.items())
        parts = ", ".join(f"{part} {count:.3g}" for part, count in self.operations.items())
        total = sum(self.operations.values())
        return [
            *([("cache", self.cache)] if self.cache else []),
            ("memory", memory),
            ("a step", f"a process reads {tokens} tokens at most, {total:.3g} operations (estimated): {parts}"),
        ]


def measure_cost(trainer: DiscTrainer, dataset: ExampleDataset, cache: TeacherCache | None = None) -> Cost:
    """Count what a step takes, by a forward pass on the largest of some batches of which nothing is kept.

    The trainer has a live teacher, which a `cache` is to stand in for when it trains. All processes call this alike.
    """
    args, student, teacher = trainer.args, trainer.student, live(trainer.teacher)
    collate: Any = trainer.data_collator
    batches = [collate(batch) for batch in sample_batches(dataset, args.train_batch_size)]
    batch = send_to_device(max(batches, key=lambda batch: batch["packing"].padded_tokens), args.device)
    training, reads = student.training, batch["teacher_input_ids"] is not None
    student.train()
    of_teacher = _operations(lambda: predict_as_teacher(student, teacher, batch)) if reads else 0
    with torch.no_grad(), trainer.accelerator.autocast():
        forward = _operations(lambda: predict_as_student(student, batch))
    with FlopCounterMode(display=False) as of_all:
        activations = _saved_bytes(student, partial(trainer.compute_loss, student, batch, num_items_in_batch=1))
    student.train(training)
    free_gathered_parameters(student)

    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    gradients = sum(local_part(parameter).nbytes for parameter in trained)
    states = STATES.get(OptimizerNames(args.optim).value)
    names = [name for name, parameter in decoder_of(student).named_parameters() if parameter.requires_grad]
    backward = forward * (2 if any(".lora_" not in name for name in names) else 1)
    frozen, layers = count_frozen(student)  # the backward pass ends above these
    backward = backward * (layers - frozen) // layers
    if args.gradient_checkpointing:  # a layer's input is kept, and one layer at a time is run again
        config = student.config.get_text_config()
        trained_layers, inputs = config.num_hidden_layers - frozen, batch["input_ids"].numel() * config.hidden_size
        activations = activations // trained_layers + trained_layers * inputs * student.dtype.itemsize
        backward += forward * (layers - frozen) // layers
    rows, (vocabulary, width) = len(batch["student_index"]), output_head(student).weight.shape
    product = 2 * rows * vocabulary * width
    loss = of_all.get_total_flops() - forward - of_teacher
    if reads and trainer.settings.kl_clip is not None:  # then its gradient is computed in the backward pass
        loss += (3 if head_is_frozen(student) else 4) * product
    per_batch = {"teacher": of_teacher, "student": forward + backward, "loss": loss}
    tokens = {"teacher": batch["teacher_input_ids"].numel() if reads else 0, "student": batch["input_ids"].numel()}
    held_by_teacher, cached = held_bytes(teacher, but_of=student) if teacher is not None else 0, None
    if cache is not None:  # what hidden states from it are multiplied with is kept; summaries need none
        head = output_head(student if teacher is None else teacher).weight
        held_by_teacher, tokens["teacher"], per_batch["teacher"] = 0 if cache.summarises else head.nbytes, 0, 0
        if cache.summarises:
            per_batch["loss"] = 2 * product
        on_disk = held_by_teacher + cache.rows * cache.row_bytes(head.shape[1])
        cached = f"{cache.describe()}; {_size(on_disk)} on disk"
    steps = args.gradient_accumulation_steps
    return Cost(
        weights=held_bytes(student),
        # DDP sums them in buckets of its own.
        gradients=gradients * (2 if args.world_size > 1 and not trainer.is_fsdp_enabled else 1),
        optimizer=None if states is None else states * gradients,
        teacher=held_by_teacher,
        workspace=min(
            DEFAULT_BYTES.get(args.device.type, DEFAULT_BYTES["cpu"]), 4 * rows * (2 * vocabulary + 9 * width)
        ),
        activations=activations,
        tokens={reader: steps * count for reader, count in tokens.items() if count},
        operations={part: steps * count for part, count in per_batch.items() if count},
        cache=cached,
    )


def held_bytes(model: PreTrainedModel, but_of: PreTrainedModel | None = None) -> int:
    """Count the bytes of a model's parameters and buffers that this process holds, but for those of another's."""
    others = {id(parameter) for parameter in but_of.parameters()} if but_of is not None else set()
    tensors = (*model.parameters(), *model.buffers())
    return sum(local_part(tensor).nbytes for tensor in tensors if id(tensor) not in others)


def _operations(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def _saved_bytes(model: PreTrainedModel, forward: Callable[[], Any]) -> int:
    """Count what autograd would keep of a forward pass for the backward, beside parameters; nothing of it is kept."""
    # A reference to a freed storage keeps its address from being used for another.
    seen = {ref.cdata: ref for ref in map(_storage, model.parameters())}
    total = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        ref = _storage(tensor)
        if ref.cdata not in seen:
            seen[ref.cdata] = ref
            total += local_part(tensor).untyped_storage().nbytes()
        return torch.empty(0)

    with saved_tensors_hooks(count, lambda nothing: nothing):
        forward()
    return total


def _storage(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(local_part(tensor).untyped_storage())


def _size(count: int) -> str:
    """Write bytes in the largest unit of which there is one."""
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.3g} {unit}"
