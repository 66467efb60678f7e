"""Define transformers' own settings for the loop, with defaults that suit distillation and checks by flag."""

import json
import math
import os
import sys
from dataclasses import MISSING, Field, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames

from disc_train.flags import check_flag, check_installed, flag
from disc_train.parallel.launch import check_launch, is_launched, processes_started

MEASURED = ("loss", "cross_entropy", "kl")  # of held-out examples, see `disc_train.objectives.held_out`; less is better

NEEDS_EVALUATION = (
    *("do_eval", "eval_on_start", "eval_delay", "eval_steps", "per_device_eval_batch_size"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)
# Of transformers' own evaluation, prediction, labels and columns, none of which this trainer has.
WITHOUT_USE = (
    *("do_predict", "prediction_loss_only", "eval_accumulation_steps", "eval_do_concat_batches"),
    *("eval_use_gather_object", "include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval"),
    *("label_names", "label_smoothing_factor", "remove_unused_columns", "length_column_name"),
    "average_tokens_across_devices",
    "enable_jit_checkpoint",  # SIGTERM saves a checkpoint anyway
)
# Each changes nothing unless the other is given.
NEEDED_BY = {
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "activation_checkpointing",
    **dict.fromkeys(("dataloader_persistent_workers", "dataloader_multiprocessing_context"), "dataloader_num_workers"),
    "liger_kernel_config": "use_liger_kernel",
    "fsdp_config": "fsdp",
    **dict.fromkeys(("hub_model_id", "hub_private_repo", "hub_always_push", "hub_revision"), "push_to_hub"),
}


@dataclass
class LoopArguments(TrainingArguments):
    """Extend `transformers.TrainingArguments` by defaults that suit distillation; every flag can be given."""

    learning_rate: float = flag("The initial learning rate (the authors' for models of 7B parameters).", 3e-6)
    logging_steps: float = flag(
        "Log every so many steps; below 1: a share of all steps. Beside the loss: packing_efficiency, the share of"
        " tokens that are not padding, and packing_saving, how many times fewer are read than with a sequence for every"
        " target.",
        10,
    )
    logging_first_step: bool = flag("Log the first step's loss as well.", True)
    dataloader_pin_memory: bool = field(
        default_factory=torch.accelerator.is_available,
        metadata={"help": "Copy batches through pinned memory. On where there is an accelerator to copy to."},
    )
    dataloader_num_workers: int = field(
        default_factory=lambda: int(torch.accelerator.is_available()),
        metadata={
            "help": "Processes that collate the next batches. One where there is an accelerator, which is enough for"
            " models from 500 million parameters on. None elsewhere: it would take a core from the training."
        },
    )
    do_train: bool = flag("There is nothing else to do; false is refused.", True)
    early_stopping_patience: int = flag(
        "--load_best_model_at_end: stop after so many evaluations in a row that are no better than the best; 0: never.",
        0,
    )
    resume_from_checkpoint: str | None = flag(
        "A checkpoint, a folder of them, or true: the last one in --output_dir. Where there is none yet, true begins"
        " anew, so it can always be given."
    )
    logging_nan_inf_filter: bool = flag(
        "Hide losses that are not finite from the logs. Off, since the training stops at the first one.", False
    )

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("--output_dir: expected the folder for checkpoints and the trained model, got none")
        check_flag(
            *(self, "train_sampling_strategy", self.train_sampling_strategy in ("random", "sequential")),
            "random or sequential (documents of any lengths are packed with hardly any padding)",
        )
        # These two flags take texts or a switch, and a YAML file's true and false arrive as words.
        self.fsdp = cast(Any, {"true": True, "false": None}.get(str(self.fsdp).lower(), self.fsdp))
        if str(self.resume_from_checkpoint).lower() == "false":
            self.resume_from_checkpoint = None
        self._check_numbers()
        self._check_uses()
        self._check_json()
        self._check_evaluation()
        if self.accelerator_config is None:  # a copy from pinned memory need not be waited for
            self.accelerator_config = {"non_blocking": self.dataloader_pin_memory}
        if processes_started() > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # else accelerate would take each process for a run of its own
        if not is_launched():  # a process alone has no others to reach by it
            self.ddp_backend = None
        if self.use_cpu:  # on the CPU transformers would join the other processes without the time-out asked for
            PartialState(cpu=True, backend=self.ddp_backend, timeout=timedelta(seconds=self.ddp_timeout))
        if self.disable_tqdm is None and not sys.stderr.isatty():
            self.disable_tqdm = True  # the logs are printed as plain lines
        if self.deepspeed:
            check_installed("--deepspeed", "deepspeed")
        if self.use_liger_kernel:
            check_installed("--use_liger_kernel", "liger_kernel", install="liger-kernel")
        super().__post_init__()
        check_launch(self)
        self._check_optimizer()
        self._check_scheduler()
        missing = set(self.report_to or ()) - set(get_available_reporting_integrations())
        if missing:
            raise ValueError(
                f"--report_to: expected none, or loggers that are installed, got {', '.join(sorted(missing))}:"
                " pip install 'disc-kernels[log]' installs TensorBoard"
            )

    def _check_numbers(self) -> None:
        """Raise ValueError for a number that transformers or PyTorch would refuse late, or without naming its flag."""
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            check_flag(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"):
            check_flag(self, name, 0 <= getattr(self, name) < math.inf, "0 or a positive, finite number")
        for name in ("adam_beta1", "adam_beta2"):
            check_flag(self, name, 0 <= getattr(self, name) < 1, "a number from 0 to 1, less than 1")
        check_flag(self, "seed", 0 <= self.seed < 2**32, "a number from 0 to 2^32 - 1")
        check_flag(self, "dataloader_num_workers", self.dataloader_num_workers >= 0, "0 (no other processes) or more")
        for name in ("save_steps", "eval_steps", "logging_steps"):
            check_flag(self, name, getattr(self, name) is None or getattr(self, name) > 0, "a positive number")
        if self.max_steps <= 0:
            check_flag(self, "num_train_epochs", 0 < self.num_train_epochs < math.inf, "a positive, finite number")

    def _check_uses(self) -> None:
        """Raise ValueError for a flag that was given and would change nothing."""
        given = [item.name for item in fields(self) if item.init and getattr(self, item.name) != _default(item)]
        for name in given:
            if name in WITHOUT_USE:
                raise ValueError(f"--{name} would change nothing, got {getattr(self, name)}: leave it out")
            if name in NEEDS_EVALUATION and self.eval_strategy == "no":
                raise ValueError(
                    f"--{name} needs --eval_strategy steps or epoch (and --eval_file), got --eval_strategy no"
                )
            if (needed := NEEDED_BY.get(name)) and not getattr(self, needed):
                raise ValueError(f"--{name} needs --{needed}, got it without")
        optim = OptimizerNames(self.optim).value
        if self.optim_args and optim in ("adamw_torch", "adamw_torch_fused", "adafactor", "adagrad"):
            raise ValueError(f"--optim_args is not for --optim {optim}, which has flags of its own: leave it out")
        if self.optim_target_modules and not optim.startswith(("galore", "apollo")):
            raise ValueError(f"--optim_target_modules is for --optim galore and apollo, got it with {optim}")
        if optim.startswith(("galore", "apollo")) and not self.optim_target_modules:
            raise ValueError(f"--optim {optim} needs --optim_target_modules, got it without")
        check_flag(self, "do_train", self.do_train, "true (--dry_run says what would run, disc-eval evaluates)")
        if self.eval_steps is not None and self.eval_strategy == "epoch":
            raise ValueError("--eval_steps needs --eval_strategy steps, got epoch")
        on_cpu = self.use_cpu or processes_started() > 1
        for name in ("bf16", "fp16"):
            if getattr(self, name) and not on_cpu and not torch.accelerator.is_available():
                raise ValueError(
                    f"--{name} is for a GPU, and none was found: leave it out on a CPU, or add --use_cpu to run the"
                    " matrix products in 16 bits there, which is slower"
                )

    def _check_json(self) -> None:
        """Raise ValueError for a flag that is neither JSON nor a file of it, or has fields that accelerate lacks."""
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            try:
                if isinstance(value, str) and name == "deepspeed":
                    HfDeepSpeedConfig(value)  # base64 too
                elif isinstance(value, str) and value.startswith("{"):
                    value = json.loads(value)
                elif isinstance(value, str):  # transformers itself reads files for some of these flags only
                    value = {**json.loads(Path(value).read_text(encoding="utf-8"))}
                    setattr(self, name, value)
            except (OSError, ValueError, TypeError, AttributeError) as error:  # the last two: JSON, but no object
                raise ValueError(f"--{name}: expected JSON, or a file of it, got {value}: {error}") from error
            if name == "accelerator_config" and isinstance(value, dict):
                try:
                    AcceleratorConfig(**value)
                except TypeError as error:
                    raise ValueError(f"--{name}: expected fields of AcceleratorConfig, got: {error}") from error

    def _check_optimizer(self) -> None:
        """Raise ValueError for an optimizer whose package is missing; it is made for a model that stands in here."""
        try:
            Trainer.get_optimizer_cls_and_kwargs(self, torch.nn.Linear(1, 1))  # type: ignore[arg-type]
        except (ImportError, ValueError) as error:
            optim = OptimizerNames(self.optim).value
            missing = isinstance(error, ImportError) or isinstance(error.__context__, ImportError)
            if missing or "install" in str(error):
                raise ValueError(f"--optim {optim}: {error}") from error
            if not self.optim_target_modules:  # which are the run's model's
                raise ValueError(
                    f"--optim_args: expected name=value, as --optim {optim} has them, got {self.optim_args}: {error}"
                ) from error

    def _check_scheduler(self) -> None:
        """Raise ValueError for arguments that the schedule of the learning rate does not have, or lacks."""
        optimizer = torch.optim.SGD([torch.zeros(1)], self.learning_rate)
        kind, options = self.lr_scheduler_type, cast(dict[str, Any] | None, self.lr_scheduler_kwargs)  # no JSON by now
        try:
            get_scheduler(kind, optimizer, 0, 1, scheduler_specific_kwargs=options)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            name = SchedulerType(kind).value
            raise ValueError(
                f"--lr_scheduler_kwargs: expected arguments of the {name} schedule, got: {error}"
            ) from error

    def _check_evaluation(self) -> None:
        """Raise ValueError for settings of the best model that do not go together; the best has the least."""
        check_flag(self, "early_stopping_patience", self.early_stopping_patience >= 0, "0 (never) or more")
        if self.early_stopping_patience and not self.load_best_model_at_end:
            raise ValueError("--early_stopping_patience needs --load_best_model_at_end true, got it without")
        if self.save_strategy == "best" and self.eval_strategy == "no":
            raise ValueError(
                "--save_strategy best needs --eval_strategy steps or epoch (and --eval_file), got --eval_strategy no"
            )
        if self.save_strategy == "best" and not (self.metric_for_best_model or self.load_best_model_at_end):
            raise ValueError("--save_strategy best needs --metric_for_best_model, got it without")
        # transformers takes all but losses for what should be large.
        if self.greater_is_better is None and str(self.metric_for_best_model).removeprefix("eval_") in MEASURED:
            self.greater_is_better = False


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


@dataclass
class CacheLoopArguments(LoopArguments):
    """Hold the settings of the loop for `disc-cache`, which trains nothing and so needs no `--output_dir`."""

    output_dir: str | None = flag("Not used: nothing is trained.", os.curdir)
