"""Train by `transformers.Trainer`, with the loss of a method.

A step's loss is averaged over all its examples, however they are spread; models may be divided over processes.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import partial
from typing import Any, Literal

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.utils.data import RandomSampler, Sampler
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_utils import speed_metrics

from disc_kernels.hf.forward import run_as_forward
from disc_train.checkpoints import CheckpointingTrainer
from disc_train.data.context_length import check_lengths, length_of, smaller
from disc_train.data.dataset import ExampleDataset, ReplayDataset
from disc_train.evaluation.in_training import AskProbes
from disc_train.models.adapters import has_adapters
from disc_train.models.attention import prepare_attention
from disc_train.models.live_teacher import FollowStudent, freeze
from disc_train.models.parts import freeze_unread, uses_all_parameters
from disc_train.objectives import methods
from disc_train.objectives.held_out import held_out_sums
from disc_train.packing.collator import PackedBatch, PackingStats, collator
from disc_train.packing.drawing import are_shared, group_contexts
from disc_train.parallel.even_steps import PaddedDataset, PaddedSampler
from disc_train.parallel.launch import check_launch
from disc_train.parallel.sharding import free_gathered_parameters, shard
from disc_train.parallel.termination import StopOnSignal, collate_in_own_process_group
from disc_train.progress import show_progress
from disc_train.teacher_cache.cached_teacher import CachedTeacher, Teacher, live, read_by


class DiscTrainer(CheckpointingTrainer):
    """Train `model` by one of the methods of `disc_train.objectives.methods`.

    A batch is counted in examples: documents, or records. The loss of a step is the mean over all its examples, however
    they are spread over micro-batches and processes. docs/trainer.md has code from files to a trained model.

    Args:
        model: the student, a causal language model.
        teacher: another model object, usually with the same weights; it is frozen and moved to the student's device,
            or divided over the processes as the student is (FSDP2).
            None where method and data need none (ft, split_ft, talr), or `model` has adapters
            (`disc_train.models.adapters`): the teacher is then `model` with them switched off. Or what
            `disc_train.teacher_cache` holds of one.
        args: as for `transformers.Trainer`. Its `logging_nan_inf_filter` may be off: a loss that is not finite ends the
            training either way, and the filter waits for the device at every micro-batch.
        train_dataset: the examples.
        method: disc, cd, ft, split_ft, ft_kl or talr; `disc_train.data.dataset` has the examples for each.
        temperature: disc and cd: of both models' distributions; the KL is multiplied by its square.
        ce_weight: disc and cd: of the cross-entropy on the same tokens.
        kl_weight: ft_kl: of the KL from the teacher.
        divergence: disc and cd: what is minimised, as `disc_kernels.fused_suffix_kl` names it.
        beta: of "jsd".
        kl_clip: disc, cd and ft_kl: the most nats that a token's divergence counts; None: there is no bound.
        teacher_ema_decay: that `teacher`, a copy of the model (`disc_train.models.live_teacher.copy_to_follow`), is to
            follow it: teacher = decay * teacher + (1 - decay) * model. None: the teacher stays as it is.
        teacher_sync_steps: how many optimizer steps there are from one such update to the next.
        attention: "auto", or a backend as `disc_kernels.shared_prefix.attention_implementation` names it.
        options: more of `transformers.Trainer`'s: `eval_dataset`, examples of the same kind; the tokenizer, as
            `processing_class`, is saved with the model.

    Attributes:
        attention: what `disc_train.models.attention.prepare_attention` gave the models.
        examples_read: how many this object has read so far, on all processes.
        packing: counts of tokens so far, on all processes. The logs have the packing since the last ones:
            packing_efficiency, the share of tokens that are not padding; packing_saving, how many times fewer tokens
            are read than with a sequence for every target.

    Raises:
        ValueError: an unknown method; `teacher` is `model`, or missing, or not needed; a model fails the checks of
            `disc_train.models.causal_lm.use_attention`; an example is longer than a model's context; one process would
            use several GPUs, or several processes were started and each would train alone.
        FloatingPointError: by `train`, before the optimizer step, if a loss is not finite: names step and examples;
            and before weights that are not finite are saved.
    """

    probes: AskProbes | None = None  # that are asked as it trains

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: Teacher,
        args: TrainingArguments,
        train_dataset: ExampleDataset,
        *,
        method: str = "disc",
        temperature: float = 2.0,
        ce_weight: float = 0.0,
        kl_weight: float = 0.1,
        divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl",
        beta: float = 0.5,
        kl_clip: float | None = None,
        teacher_ema_decay: float | None = None,
        teacher_sync_steps: int = 1,
        attention: str = "auto",
        **options: Any,
    ) -> None:
        if method not in methods.OBJECTIVES:
            raise ValueError(f"method: expected one of {', '.join(methods.OBJECTIVES)}, got {method!r}")
        compared = method in methods.WITH_TEACHER
        _check_teacher(model, teacher, needed=compared or train_dataset.replays_by_kl)
        check_launch(args)
        if args.n_gpu > 1:
            raise ValueError(
                f"expected one GPU a process, got {args.n_gpu}: start one process a GPU with torchrun or accelerate"
                " launch, or choose a GPU with CUDA_VISIBLE_DEVICES"
            )
        held_out: ExampleDataset | None = options.get("eval_dataset")
        models = ("model", model), ("teacher", live(teacher))
        lengths = [length_of(each.config, role) for role, each in models if each]
        for dataset in (train_dataset, held_out):
            if dataset is not None:
                check_lengths(dataset, smaller(*lengths))
        self._padded_dataset = PaddedDataset(train_dataset)
        super().__init__(model, args, train_dataset=self._padded_dataset, **options)
        if args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(
                "--fsdp: expected an accelerator in every process, started by torchrun or accelerate launch; got"
                f" {args.world_size} on {args.device.type}: leave it out there"
            )
        self.add_callback(_EpochSetter(self._padded_dataset))
        self.termination = StopOnSignal()
        self.add_callback(self.termination)
        # The loss is divided by the examples of the whole step here; the Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        freeze_unread(model)
        self._move_to_device(model, trained=True)
        self._expect_all_gradients(model)
        self.teacher: Teacher = None
        if isinstance(teacher, CachedTeacher):
            self.teacher = teacher.to(args.device)
        elif teacher is not None:
            self.teacher = freeze(teacher)
            self._move_to_device(teacher, trained=False)
        self.follow: FollowStudent | None = None
        if teacher_ema_decay is not None:
            if self.is_fsdp_enabled or not isinstance(teacher, PreTrainedModel):
                got = "--fsdp, which divides it" if self.is_fsdp_enabled else type(teacher).__name__
                raise ValueError(f"--teacher ema: expected a model that is whole in every process, got {got}")
            self.follow = FollowStudent(teacher, model, teacher_ema_decay, teacher_sync_steps)
            self.add_callback(self.follow)
        self.method = method
        self.settings = methods.Settings(temperature, ce_weight, kl_weight, divergence, beta, kl_clip)
        self.noun = train_dataset.noun
        self.examples_read = 0
        self.packing = self._logged_packing = PackingStats()
        self.attention = prepare_attention(model, live(teacher), attention, train_dataset, args.train_batch_size)
        # Processes put a divided teacher together in step, so it reads at every one whatever is replayed there.
        compared |= self.is_fsdp_enabled and train_dataset.replays_by_kl and not isinstance(teacher, CachedTeacher)
        self.data_collator = partial(
            collate_in_own_process_group, collator(model, read_by(self.teacher, model), compare_all=compared)
        )

    def _move_to_device(self, model: PreTrainedModel, trained: bool) -> None:
        """Move a model, or this process's part of it, to this process's device."""
        if self.is_fsdp_enabled:
            shard(model, self.accelerator, trained=trained)
        else:
            model.to(self.args.device)  # type: ignore[arg-type]

    def _expect_all_gradients(self, model: PreTrainedModel) -> None:
        """Keep DDP from looking at every step for parameters without a gradient where there are none."""
        ddp, args = self.accelerator.ddp_handler, self.args
        if ddp is None or args.world_size == 1 or self.is_fsdp_enabled or args.ddp_find_unused_parameters is not None:
            return
        ddp.find_unused_parameters = ddp.find_unused_parameters and not uses_all_parameters(model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Name all parameters, as torch and the method's authors have it; the Trainer would spare biases and norms."""
        return [name for name, _ in model.named_parameters()]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """Sample as the Trainer does, and records that share a context together.

        Several processes take equally many examples, and none twice.
        """
        sampler, args = super()._get_train_sampler(train_dataset), self.args
        at_once = args.train_batch_size * args.world_size
        multiple = 1 if args.world_size == 1 or args.dataloader_drop_last else at_once
        dataset = self._padded_dataset.dataset
        # What is replayed, and so what is shared, differs from epoch to epoch; the sampler looks anew at each.
        shared = isinstance(dataset, ReplayDataset) or are_shared(group_contexts(dataset.contexts()))
        if not isinstance(sampler, RandomSampler) or not (shared or multiple > 1):
            return sampler
        seed = args.seed if args.data_seed is None else args.data_seed
        return PaddedSampler(self._padded_dataset, multiple, seed, at_once * args.gradient_accumulation_steps)

    def get_batch_samples(
        self, epoch_iterator: Iterator[PackedBatch], num_batches: int, device: torch.device
    ) -> tuple[list[PackedBatch], int]:
        """Return the micro-batches of one optimizer step, and count the examples in them on all processes together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        stats = sum((batch["packing"] for batch in batches), PackingStats())
        counts = torch.tensor(
            [*self.termination.votes(), sum(batch["num_examples"] for batch in batches), *astuple(stats)]
        )
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts.to(device))
        *votes, examples, read, padded, unshared = counts.tolist()
        self.termination.agree(votes)
        self.examples_read += examples
        self.packing += PackingStats(read, padded, unshared)
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
        """Run `function` on the student and a batch as the forward of what wraps the student.

        DDP prepares there to reduce gradients.
        """
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

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the examples of `eval_dataset` on all processes together, and log their means.

        Returns:
            eval_loss, eval_cross_entropy and, where the method has a teacher, eval_kl, as
            `disc_train.objectives.held_out` has them; and how fast that was.
        """
        held_out: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        student, args = self.student, self.args
        started, training, each = time.time(), student.training, args.eval_batch_size * args.world_size
        batches: Any = [range(i, i + each, args.world_size) for i in range(0, len(held_out), each)]
        if not args.disable_tqdm:
            batches = show_progress(batches, sum(map(len, batches)), f"{self.noun}s evaluated")
        # Where a process has no more examples it reads one that does not count: divided models are gathered in step.
        examples = PaddedDataset(held_out)
        student.eval()
        sums = []
        for batch in batches:
            mine: Any = [examples[i + args.process_index] for i in batch]
            inputs = send_to_device(self.data_collator(mine), args.device)
            with self.accelerator.autocast():
                sums.append(held_out_sums(self.method, student, self.teacher, inputs, self.settings))
        student.train(training)
        free_gathered_parameters(student)
        totals = self.accelerator.reduce({name: torch.stack([sum_[name] for sum_ in sums]).sum() for name in sums[0]})
        metrics = {f"{metric_key_prefix}_{name}": float(total) / len(held_out) for name, total in totals.items()}
        metrics |= speed_metrics(metric_key_prefix, started, num_samples=len(held_out))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what the Trainer does, and how well the batches were packed since the last time."""
        since = self.packing - self._logged_packing
        if "loss" in logs and since.tokens:
            logs |= {"packing_efficiency": round(since.efficiency, 4), "packing_saving": round(since.saving, 4)}
            self._logged_packing = self.packing
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save both, and the weights of a teacher that follows the student."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.follow and self.args.should_save:
            self.follow.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load what `_save_optimizer_and_scheduler` saved."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.follow and checkpoint is not None:
            self.follow.load(checkpoint)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does, and stop after a checkpoint on SIGTERM or Ctrl-C."""
        free_gathered_parameters(self.student)  # left by measurements before the training
        with self.termination:
            return super().train(*args, **kwargs)


def _check_teacher(model: PreTrainedModel, teacher: Teacher, needed: bool) -> None:
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
