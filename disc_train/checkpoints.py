"""Find checkpoints, check them, and save them so that they are complete or absent.

One is written in a folder `unfinished` beside its place and moved there when everything is in it. A process that is
killed while it saves leaves that folder, which is never read; the next save begins by removing it.
"""

import shutil
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from disc_train.flags import check_folder
from disc_train.loop_config import LoopArguments
from disc_train.models.adapters import has_adapters, load_adapters
from disc_train.models.saving import convert, copy_processor, write_dtype
from disc_train.parallel.sharding import free_gathered_parameters, local_part
from disc_train.resume import save_settings

UNFINISHED = "unfinished"
# Beside the weights, what a training goes on from: transformers begins anew with what it does not find.
TRAINING_STATE_FILES = ("optimizer*", "scheduler.pt", "rng_state*.pth")
MODEL_FILES = ("config.json", "adapter_config.json", TRAINER_STATE_NAME)


def find_checkpoint(loop: LoopArguments) -> str | None:
    """Return the checkpoint to go on from, or None for a new run.

    With `--resume_from_checkpoint true` a run that has no checkpoint yet begins anew, so that a scheduler can repeat
    one command line until the run is done.

    Raises:
        ValueError: a new run in a folder that holds one, a folder that cannot be written to, or nothing to go on from.
    """
    folder, wanted = Path(str(loop.output_dir)), loop.resume_from_checkpoint
    check_folder("--output_dir", folder)
    if wanted is not None and wanted.lower() != "true":  # YAML's true arrives as True
        checkpoint = wanted if _is_complete(Path(wanted)) else _last_checkpoint(Path(wanted))
        if checkpoint is None:
            raise ValueError(
                "--resume_from_checkpoint: expected a checkpoint, a folder with checkpoints, or true for the last one"
                f" in --output_dir ({folder}), got {wanted}, which has none"
            )
        return checkpoint
    last = _last_checkpoint(folder)
    if last is not None and wanted is None:
        raise ValueError(
            f"--output_dir: {folder} already holds a run: continue it with --resume_from_checkpoint true, or choose"
            " another folder"
        )
    if last is None and any((folder / name).exists() for name in MODEL_FILES):
        raise ValueError(f"--output_dir: {folder} already holds a model: choose another folder")
    return last


def steps_done(checkpoint: str | None, steps: int) -> int:
    """Return how many optimizer steps were done when a checkpoint was saved; 0 for none.

    Raises:
        ValueError: they are more than asked for, or the checkpoint lacks files, or they are damaged.
    """
    if checkpoint is None:
        return 0
    done = load_state(checkpoint).global_step
    if done > steps:
        raise ValueError(
            f"--resume_from_checkpoint: expected a checkpoint of at most {steps} steps, which is all there are, got"
            f" {checkpoint} of {done}; for more, raise --max_steps or --num_train_epochs"
        )
    _check_files(Path(checkpoint), () if done == steps else TRAINING_STATE_FILES)
    return done


def is_finished(output_dir: str, done: int, steps: int) -> bool:
    """Tell whether the model in a folder was saved at the end of a training, after `done` of `steps` steps."""
    try:
        state = load_state(output_dir)
    except (OSError, ValueError):
        return False
    return (state.global_step, state.max_steps) == (done, steps)


def load_state(checkpoint: str) -> TrainerState:
    """Read the state of the training that wrote a checkpoint; raise ValueError if its file is damaged."""
    path = Path(checkpoint, TRAINER_STATE_NAME)
    try:
        return TrainerState.load_from_json(str(path))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected the state of a training, got a damaged file: {error}") from error


def move_into_place(written: Path, place: Path) -> None:
    """Rename a finished checkpoint; one that is there already gives way, and is never seen in parts."""
    if place.exists():  # of a run that was continued from an earlier one
        place.rename(written.parent / "replaced")
    written.rename(place)
    shutil.rmtree(written.parent)


def _check_files(checkpoint: Path, wanted: Sequence[str]) -> None:
    for pattern in wanted:
        if not any(checkpoint.glob(pattern)):
            raise ValueError(
                f"--resume_from_checkpoint: expected {pattern} in {checkpoint}, got no such file: training would not go"
                " on as it was; continue from another checkpoint, or train what it holds as a new model"
            )
    for path in checkpoint.iterdir():  # their ends are looked at, they are not read
        damage: object = None
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt"):
                    pass
            except SafetensorError as error:
                damage = error
        elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            damage = "it does not end as it should"
        if damage:
            raise ValueError(f"{path}: cannot be read, the file is damaged: {damage}")


def _is_complete(checkpoint: Path) -> bool:
    # Of folders that another program wrote in place: this is what `transformers.Trainer` writes last.
    return (checkpoint / TRAINER_STATE_NAME).is_file()


def _last_checkpoint(folder: Path) -> str | None:
    complete = {
        int(step): path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (step := path.name.rpartition("-")[2]).isdecimal() and _is_complete(path)
    }
    return str(complete[max(complete)]) if complete else None


class CheckpointingTrainer(Trainer):
    """Save checkpoints that are complete or absent, and load them; also of adapters and of divided models."""

    run_settings: dict[str, Any] | None = None  # that checkpoints keep, see `disc_train.resume`
    _saving = False  # a checkpoint is being written
    save_dtype: torch.dtype | None = None  # of the model itself, when it is saved; checkpoints are exact

    @property
    def student(self) -> PreTrainedModel:
        """Return the model that is trained, without what the Trainer wraps it in."""
        return self.accelerator.unwrap_model(self.model)

    def restore(self, checkpoint: str) -> None:
        """Load a checkpoint's weights and state without training on, when all its steps are done."""
        free_gathered_parameters(self.student)
        self.state = load_state(checkpoint)
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best or checkpoint)

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
            if self.state.best_model_checkpoint == str(unfinished / name):
                self.state.best_model_checkpoint = str(folder / name)
                if self.args.should_save:
                    self.state.save_to_json(str(unfinished / name / TRAINER_STATE_NAME))
            if self.run_settings is not None and self.args.should_save:
                save_settings(self.run_settings, unfinished / name)
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        # One process a file system: where nodes share it, the main process leaves nothing to the others.
        with self.args.main_process_first(local=False):
            if self.is_local_process_zero() and unfinished.exists():
                move_into_place(unfinished / name, folder / name)
        if self.args.should_save:
            rotate_checkpoints(
                str(folder), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )
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
        """Save both; for adapters of a divided model without the whole model, which the Trainer would save too."""
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
        trained = [(name, value) for name, value in self.student.named_parameters() if value.requires_grad]
        names, parameters = zip(*trained, strict=True)
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

    def _load_best_model(self) -> None:
        """Load the best checkpoint's weights; the Trainer would not look for adapters in a transformers model."""
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save as the Trainer does, but the model itself in its dtype and with the files of its processor."""
        folder, dtype = output_dir or str(self.args.output_dir), None if self._saving else self.save_dtype
        if dtype is not None and self.args.should_save:
            try:
                state_dict = convert(self.student, state_dict, dtype)
            except OverflowError as error:  # what was trained is not lost for that
                warnings.warn(f"{error}: saved in the dtype that it was trained in", stacklevel=2)
                dtype = self.save_dtype = None
        with warnings.catch_warnings():  # peft looks for a config where an adapter's base is an adapter, which has none
            warnings.filterwarnings("ignore", "Unable to fetch remote file|Could not find a config file")
            super()._save(folder, state_dict)
        if self.args.should_save and not self._saving:
            copy_processor(self.student, folder)
            if dtype is not None:
                write_dtype(folder, dtype)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load a checkpoint's weights; the Trainer would not look for adapters in a transformers model."""
        if has_adapters(self.student):
            load_adapters(self.student, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn of weights that a checkpoint lacks, but not of those that are tied to others and so never saved."""
        missing = [name for name in load_result.missing_keys if name not in self.student.all_tied_weights_keys]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))
