"""Train by `transformers.Trainer`, with the loss of a method.

What is overridden besides the loss says why: whole steps as the unit of averaging, checkpoints that are complete or
absent, and models divided over processes.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, save_fsdp_optimizer
from torch import Tensor, nn
from torch.utils.data import RandomSampler, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from disc_train.checkpoints import UNFINISHED, load_state, move_into_place
from disc_train.data.dataset import ExampleDataset
from disc_train.models.adapters import has_adapters, load_adapters
from disc_train.models.attention import prepare_attention
from disc_train.models.teacher import freeze
from disc_train.objectives import methods
from disc_train.packing.collator import PackedBatch, PackingStats, collator
from disc_train.parallel.even_steps import PaddedDataset, PaddedSampler
from disc_train.parallel.sharding import free_gathered_parameters, local_part, run_as_forward, shard
from disc_train.parallel.termination import StopOnSigterm, collate_in_own_process_group


class DiscTrainer(Trainer):
    """Train `model` by one of the methods of `disc_train.objectives.methods`.

    A batch is counted in examples: documents, or records. The loss of a step is the mean over all its examples, however
    they are spread over micro-batches and processes::

        documents = [
            tokenize_document(document, tokenizer, "document", max_tokens=4096)
            for document in load_documents("news.jsonl", None)
        ]
        args = TrainingArguments("out", learning_rate=3e-6, per_device_train_batch_size=4)
        trainer = DiscTrainer(student, teacher, args, DocumentDataset(documents), processing_class=tokenizer)
        trainer.train()

    Args:
        model: the student, a causal language model.
        teacher: another model object, usually with the same weights; it is frozen and moved to the student's device,
            or divided over the processes as the student is (FSDP2).
            None where method and data need none (ft, talr), or `model` has adapters (`disc_train.models.adapters`):
            the teacher is then `model` with them switched off.
        args: as for `transformers.Trainer`. Its `logging_nan_inf_filter` may be off: a loss that is not finite ends the
            training either way, and the filter waits for the device at every micro-batch.
        train_dataset: the examples.
        method: disc, cd, ft, ft_kl or talr; `disc_train.data.dataset` has the examples for each.
        temperature: disc and cd: of both models' distributions; the KL is multiplied by its square.
        ce_weight: disc and cd: of the cross-entropy on the same tokens.
        kl_weight: ft_kl: of the KL from the teacher.
        attention: "auto", or a backend as `disc_kernels.shared_prefix.attention_implementation` names it.
        options: more of `transformers.Trainer`'s; the tokenizer, as `processing_class`, is saved with the model.

    Attributes:
        attention: what `disc_train.models.attention.prepare_attention` gave the models.
        examples_read, packing: counts so far by this object, on all processes. The logs have the packing since the last
            ones: packing_efficiency, the share of tokens that are not padding; packing_saving, how many times fewer
            tokens are read than with a sequence for every target.

    Raises:
        ValueError: an unknown method; `teacher` is `model`, or missing, or not needed; a model fails the checks of
            `disc_train.models.causal_lm.use_attention`; one process would use several GPUs.
        FloatingPointError: by `train`, before the optimizer step, if a loss is not finite: names step and examples;
            and before weights that are not finite are saved.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        args: TrainingArguments,
        train_dataset: ExampleDataset,
        *,
        method: str = "disc",
        temperature: float = 2.0,
        ce_weight: float = 0.0,
        kl_weight: float = 0.1,
        attention: str = "auto",
        **options: Any,
    ) -> None:
        if method not in methods.OBJECTIVES:
            raise ValueError(f"method: expected one of {', '.join(methods.OBJECTIVES)}, got {method!r}")
        compared = method in methods.WITH_TEACHER
        _check_teacher(model, teacher, needed=compared or train_dataset.replays_by_kl)
        if args.n_gpu > 1:
            raise ValueError(
                f"expected one GPU a process, got {args.n_gpu}: start one process a GPU with torchrun or accelerate"
                " launch, or choose a GPU with CUDA_VISIBLE_DEVICES"
            )
        self._padded_dataset = PaddedDataset(train_dataset)
        self._saving = False
        super().__init__(model, args, train_dataset=self._padded_dataset, **options)
        if args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(
                "--fsdp: expected an accelerator in every process, started by torchrun or accelerate launch; got"
                f" {args.world_size} on {args.device.type}: leave it out there"
            )
        self.add_callback(_EpochSetter(self._padded_dataset))
        self.termination = StopOnSigterm()
        self.add_callback(self.termination)
        # The loss is divided by the examples of the whole step here; the Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        self.teacher = None if teacher is None else freeze(teacher)
        for prepared, trained in ((model, True), (self.teacher, False)):
            if prepared is not None:
                self._move_to_device(prepared, trained)
        self.method = method
        self.settings = methods.Settings(temperature, ce_weight, kl_weight)
        self.noun = train_dataset.noun
        self.examples_read = 0
        self.packing = self._logged_packing = PackingStats()
        self.attention = prepare_attention(model, self.teacher, attention, train_dataset, args.train_batch_size)
        # Processes put a divided teacher together in step, so it reads at every one whatever is replayed there.
        compared |= self.is_fsdp_enabled and train_dataset.replays_by_kl
        self.data_collator = partial(
            collate_in_own_process_group, collator(model, self.teacher or model, compare_all=compared)
        )

    @property
    def student(self) -> nn.Module:
        """Return the model that is trained, without what the Trainer wraps it in."""
        return self.accelerator.unwrap_model(self.model)

    def _move_to_device(self, model: PreTrainedModel, trained: bool) -> None:
        """Move a model, or this process's part of it, to this process's device."""
        if self.is_fsdp_enabled:
            shard(model, self.accelerator, trained=trained)
        else:
            model.to(self.args.device)  # type: ignore[arg-type]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Name all parameters, as torch and the method's authors have it; the Trainer would spare biases and norms."""
        return [name for name, _ in model.named_parameters()]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """Sample as the Trainer does; several processes take equally many examples, and none twice."""
        sampler, args = super()._get_train_sampler(train_dataset), self.args
        if args.world_size == 1 or args.dataloader_drop_last or not isinstance(sampler, RandomSampler):
            return sampler
        seed = args.seed if args.data_seed is None else args.data_seed
        return PaddedSampler(self._padded_dataset, args.train_batch_size * args.world_size, seed)

    def get_batch_samples(
        self, epoch_iterator: Iterator[PackedBatch], num_batches: int, device: torch.device
    ) -> tuple[list[PackedBatch], int]:
        """Return the micro-batches of one optimizer step, and count the examples in them on all processes together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        stats = sum((batch["packing"] for batch in batches), PackingStats())
        counts = torch.tensor(
            [self.termination.requested, sum(batch["num_examples"] for batch in batches), *astuple(stats)]
        )
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts.to(device))
        terminated, examples, *stats_of_all = counts.tolist()
        self.termination.agreed = terminated > 0
        self.examples_read += examples
        self.packing += PackingStats(*stats_of_all)
        if self.method == "talr" and (len(batches) > 1 or self.args.world_size > 1):
            self.settings = self.settings._replace(tau=self._tau(batches))
        return batches, examples

    @torch.no_grad()
    def _tau(self, batches: list[PackedBatch]) -> Tensor | None:
        """Compute TALR's tau where a step's sequences are not all at hand at once: one more forward pass of each.

        Dropout is off: it would take random numbers that a run which is resumed here has not restored yet.
        """
        self.model_wrapped.eval()  # the training step turns dropout on again
        means = torch.cat(
            [self._run_wrapped(self.model_wrapped, batch, methods.batch_sequence_means) for batch in batches]
        )
        if self.args.world_size > 1:  # processes may have different numbers of them
            means = torch.tensor(gather_object(means.tolist()), device=means.device)
        return methods.median(means) if len(means) else None  # all may be replayed

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Compute this batch's part of the step's loss: its examples' losses over the number of the step's examples."""

        def loss_of(student: PreTrainedModel, batch: PackedBatch) -> Tensor:
            return methods.batch_loss(self.method, student, self.teacher, batch, self.settings)

        loss = self._run_wrapped(model, inputs, loss_of)
        # DDP averages gradients over processes, but the loss is a sum over the examples of all of them.
        return loss * (self.accelerator.num_processes / num_items_in_batch)

    def _run_wrapped(
        self, model: nn.Module, batch: Any, function: Callable[[PreTrainedModel, PackedBatch], Tensor]
    ) -> Tensor:
        """Run `function` on the student and a batch as the forward of what wraps the student: there DDP prepares to
        reduce gradients."""
        student = self.accelerator.unwrap_model(model)

        def forward(batch: PackedBatch) -> Tensor:
            with self.accelerator.autocast():
                return function(student, batch)

        return forward(batch) if model is student else run_as_forward(student, forward, batch, wrapper=model)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Take a step as the Trainer does; end the training at a loss that is not finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        # Read only now that the backward pass is queued, so the device has work while this waits for the loss.
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()} on the {self.noun}s"
                f" {', '.join(inputs['names'])}; stopped before the optimizer step, saved checkpoints are intact"
            )
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what the Trainer does, and how well the batches were packed since the last time."""
        since = self.packing - self._logged_packing
        if since.tokens:
            logs |= {"packing_efficiency": round(since.efficiency, 4), "packing_saving": round(since.saving, 4)}
            self._logged_packing = self.packing
        super().log(logs, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does, and stop behind a checkpoint on SIGTERM."""
        free_gathered_parameters(self.student)  # left by measurements before the training
        with self.termination:
            return super().train(*args, **kwargs)

    def restore(self, checkpoint: str) -> None:
        """Load a checkpoint's weights and state without training on, when all its steps are done."""
        free_gathered_parameters(self.student)
        self._load_from_checkpoint(checkpoint)
        self.state = load_state(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint in a folder `unfinished`, and give it its name once it is complete."""
        folder = Path(self._get_output_dir(trial))
        unfinished, name = folder / UNFINISHED, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.is_local_process_zero():
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was stopped while it saved
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        # One process a file system: where nodes share it, the main process leaves nothing to the others.
        with self.args.main_process_first(local=False):
            if self.is_local_process_zero() and unfinished.exists():
                move_into_place(unfinished / name, folder / name)
        if self.args.should_save:
            rotate_checkpoints(str(folder), self.args.save_total_limit, use_mtime=True)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))

    # The Trainer writes a checkpoint in place, and asks these methods where and what while it does.

    def _get_output_dir(self, trial: Any) -> str:
        """Return the folder of the checkpoints; while one is written, the folder `unfinished` in it."""
        folder = super()._get_output_dir(trial)
        return str(Path(folder, UNFINISHED)) if self._saving else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint to the Hub, but none that is still being written."""
        if not self._saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save both; of a divided model with adapters not, as the Trainer would, the whole model once more."""
        if not (self.is_fsdp_enabled and has_adapters(self.student)):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the Trainer does, unless its last step left weights that are not finite."""
        names, parameters = zip(*self.student.named_parameters(), strict=True)
        broken = torch.stack([~torch.isfinite(local_part(parameter)).all() for parameter in parameters]).int()
        if self.is_fsdp_enabled:
            broken = self.accelerator.reduce(broken.to(self.args.device))
            if not _internal_call:  # the model itself, which is of one piece whatever checkpoints are
                self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        if broken.any():
            name = names[int(broken.argmax())]
            raise FloatingPointError(
                f"step {self.state.global_step}: {name} is not finite after it; not saved, earlier checkpoints are"
                " intact"
            )
        super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load a checkpoint's weights; the Trainer would not look for adapters in a transformers model."""
        if has_adapters(self.student):
            load_adapters(self.student, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


def _check_teacher(model: PreTrainedModel, teacher: PreTrainedModel | None, needed: bool) -> None:
    if teacher is model:
        raise ValueError("teacher: expected a model object of its own, got the one that is trained")
    if needed and teacher is None and not has_adapters(model):
        raise ValueError("teacher: expected a model, which this method compares the student with, got None")
    if teacher is not None and not needed:
        raise ValueError(f"teacher: expected None, this method compares with no teacher, got {type(teacher).__name__}")


class _EpochSetter(TrainerCallback):
    """Tell the dataset the epoch; unlike the data loader's `set_epoch`, also when one is resumed in its middle."""

    def __init__(self, dataset: PaddedDataset) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.dataset.set_epoch(int(state.epoch or 0))
