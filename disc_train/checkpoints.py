"""Find checkpoints, check that they are complete, and give them their names.

One is written in a folder `unfinished` beside its place and moved there when everything is in it. A process that is
killed while it saves leaves that folder, which is never read; the next save begins by removing it.
"""

import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from disc_train.config import LoopArguments

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
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(f"--output_dir: expected a folder that can be written to, got {folder}")
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
    """Return how many optimizer steps a checkpoint is behind; 0 for none.

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


def is_finished(output_dir: str, steps: int) -> bool:
    """Tell whether the model in a folder was saved to the end, behind so many steps."""
    try:
        return load_state(output_dir).global_step == steps
    except (OSError, ValueError):
        return False


def load_state(checkpoint: str) -> TrainerState:
    """Read the state of the training that wrote a checkpoint.

    Raises:
        ValueError: the file that says so is damaged.
    """
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
