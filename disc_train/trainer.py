"""`transformers.Trainer` with the loss of context distillation; all but the loss and its normalisation is theirs."""

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from disc_train import objectives
from disc_train.causal_lm import use_attention
from disc_train.dataset import DocumentDataset
from disc_train.packing import PackedBatch, pack
from disc_train.teacher import freeze


class DiscTrainer(Trainer):
    """Train `model` to predict without a document's beginning what `teacher` predicts with it.

    A batch is counted in documents. The loss of a step is the mean over all its documents, however they are spread over
    micro-batches and processes::

        documents = [
            tokenize_document(document, tokenizer, "document", max_tokens=4096)
            for document in load_documents("news.jsonl", None)
        ]
        args = TrainingArguments("out", learning_rate=3e-6, per_device_train_batch_size=4)
        trainer = DiscTrainer(student, teacher, args, DocumentDataset(documents), processing_class=tokenizer)
        trainer.train()

    Args:
        model: the student, a causal language model.
        teacher: another model object, usually with the same weights; it is frozen and moved to the student's device.
        args: as for `transformers.Trainer`. Its `logging_nan_inf_filter` may be off: a loss that is not finite ends the
            training either way, and the filter waits for the device at every micro-batch.
        train_dataset: the documents.
        temperature: of both models' distributions; the loss is multiplied by its square.
        attention: "auto", or a backend as `disc_kernels.shared_prefix.attention_implementation` names it.
        options: more of `transformers.Trainer`'s; the tokenizer, as `processing_class`, is saved with the model.

    Attributes:
        documents_read, tokens_read: so far by this object, on all processes; the tokens of both models.

    Raises:
        ValueError: `teacher` is `model`; a model fails the checks of `disc_train.causal_lm.use_attention`; one process
            would use several GPUs.
        FloatingPointError: by `train`, before the optimizer step, if a loss is not finite: names step and documents;
            and before weights that are not finite are saved.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        args: TrainingArguments,
        train_dataset: DocumentDataset,
        *,
        temperature: float = 2.0,
        attention: str = "auto",
        **options: Any,
    ) -> None:
        if teacher is model:
            raise ValueError("teacher: expected a model object of its own, got the one that is trained")
        if args.n_gpu > 1:
            raise ValueError(
                f"expected one GPU a process, got {args.n_gpu}: start one process a GPU with torchrun or accelerate"
                " launch, or choose a GPU with CUDA_VISIBLE_DEVICES"
            )
        super().__init__(
            model,
            args,
            data_collator=pack,  # type: ignore[arg-type]
            train_dataset=train_dataset,
            **options,
        )
        self.add_callback(_EpochSetter(train_dataset))
        # The loss is divided by the documents of the whole step here; the Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        self.teacher = freeze(teacher).to(args.device)  # type: ignore[arg-type]
        self.temperature = temperature
        self.attention = attention
        self.documents_read = 0
        self.tokens_read = 0
        for prepared in (model, self.teacher):
            use_attention(prepared, attention, train_dataset.few_tokens().to(args.device))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All of them, as torch and the method's authors have it; the Trainer would spare biases and norms."""
        return [name for name, _ in model.named_parameters()]

    def get_batch_samples(
        self, epoch_iterator: Iterator[PackedBatch], num_batches: int, device: torch.device
    ) -> tuple[list[PackedBatch], int]:
        """The micro-batches of one optimizer step, and the documents in them, on all processes together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.tensor(
            [
                sum(batch["num_documents"] for batch in batches),
                sum(batch["input_ids"].numel() + batch["teacher_input_ids"].numel() for batch in batches),
            ]
        )
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts.to(device))
        documents, tokens = counts.tolist()
        self.documents_read += documents
        self.tokens_read += tokens
        return batches, documents

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """This batch's part of the step's loss: its documents' losses over the number of documents in the step."""
        student = self.accelerator.unwrap_model(model)

        def loss_of(batch: PackedBatch) -> Tensor:
            with self.accelerator.autocast():
                return objectives.disc(
                    student, self.teacher, batch, temperature=self.temperature, attention=self.attention
                )

        # Through the forward of whatever wraps the student, not around it: there DDP prepares to reduce gradients.
        with patch.object(student, "forward", loss_of):
            loss = model(inputs)
        # DDP averages gradients over processes, but the loss is a sum over the documents of all of them.
        return loss * (self.accelerator.num_processes / num_items_in_batch)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As the Trainer's; a loss that is not finite ends the training."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        # Read only now that the backward pass is queued, so the device has work while this waits for the loss.
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()} on the documents"
                f" {', '.join(inputs['names'])}; stopped before the optimizer step, saved checkpoints are intact"
            )
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's, but a checkpoint is never one of a model that broke in its last step."""
        for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters():
            if not torch.isfinite(parameter).all():
                raise FloatingPointError(
                    f"step {self.state.global_step}: {name} is not finite after it; not saved, earlier checkpoints are"
                    " intact"
                )
        super().save_model(output_dir, _internal_call)


class _EpochSetter(TrainerCallback):
    """Tells the dataset the epoch; unlike the data loader's `set_epoch`, also when one is resumed in its middle."""

    def __init__(self, dataset: DocumentDataset) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.dataset.set_epoch(int(state.epoch or 0))
