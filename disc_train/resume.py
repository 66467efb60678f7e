"""Compare a run's settings with those of the checkpoint that it goes on from.

A checkpoint restores the optimizer with its rate, the adapters and the place in the data, whatever the command line
says. So a setting that they depend on may not change; any other may, from the next step on, and the summary says so.
"""

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from disc_train.config import DiscArguments
from disc_train.data.training_data import TrainingData
from disc_train.loop_config import LoopArguments
from disc_train.parallel.agreement import describe_data

SETTINGS_FILE = "disc_train_settings.json"
DOCUMENTS_A_STEP = "per_device_train_batch_size x gradient_accumulation_steps x processes"
# Of transformers' settings those that matter to what is learned, and all of disc_train's but for a few.
LOOP_RESTORED = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args"),
    *("seed", "data_seed", "dataloader_drop_last", "train_sampling_strategy"),
)
LOOP_APPLIED = (
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs", "max_steps"),
    *("max_grad_norm", "bf16", "fp16"),
)
DISC_RESTORED = (
    *("load_in_4bit", "load_in_8bit", "lora_rank", "lora_alpha", "lora_target_modules"),
    *("freeze_head", "freeze_layers"),
)
# What makes other examples of the same documents or records.
MAKE_EXAMPLES = (
    *("method", "num_splits", "split_strategy", "suffix_tokens", "sentence_tokenization", "language"),
    *("add_bos", "max_document_tokens", "long_documents", "chunk_overlap_tokens", "teacher_template"),
    *("student_template", "teacher_system_prompt", "replay_share", "replay_objective", "teacher_name_or_path"),
)
# How the same is computed; and files, of which the content is compared.
NOT_COMPARED = (
    *("dry_run", "signal_examples", "attention", "save_dtype", "teacher_cache"),
    *("train_file", "dataset_name", "replay_file", "eval_file", "probes_file", "probe_steps"),
)


def settings_to_compare(disc: DiscArguments, loop: LoopArguments, data: TrainingData) -> dict[str, Any]:
    """Return what a checkpoint keeps of its run's settings and data, as JSON holds it."""
    chosen = {name: getattr(loop, name) for name in (*LOOP_RESTORED, *LOOP_APPLIED)}
    chosen |= {name: value for name, value in vars(disc).items() if name not in NOT_COMPARED}
    chosen[DOCUMENTS_A_STEP] = loop.train_batch_size * loop.gradient_accumulation_steps * loop.world_size
    chosen |= {"examples": len(data.dataset), "training data": describe_data(data.dataset), "texts": data.texts}
    return json.loads(json.dumps(chosen, default=str))


def save_settings(settings: dict[str, Any], checkpoint: Path) -> None:
    """Write settings into a checkpoint."""
    Path(checkpoint, SETTINGS_FILE).write_text(json.dumps(settings, indent=2), encoding="utf-8")


def changed_settings(checkpoint: str, now: dict[str, Any]) -> list[str]:
    """List the settings that differ from a checkpoint's and hold from now on; none if it has not kept any.

    Raises:
        ValueError: a setting that cannot be honoured, or other data.
    """
    path = Path(checkpoint, SETTINGS_FILE)
    if not path.is_file():  # of a trainer that is no run of disc-train
        return []
    try:
        before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected the settings of a run, got a damaged file: {error}") from error
    # What an older version did not have was as its default.
    before = {each.name: each.default for each in fields(DiscArguments) if each.default is not MISSING} | before
    changed = [name for name, value in now.items() if before.get(name, value) != value]
    for name in changed:
        if name in (*LOOP_RESTORED, *DISC_RESTORED, DOCUMENTS_A_STEP):
            raise ValueError(
                f"--{name}: expected {before[name]}, with which {checkpoint} was trained and which cannot change when"
                f" a run goes on, got {now[name]}"
            )
    other_data = "to train on other data, start from it as a new model (--model_name_or_path)"
    for flag, text in now["texts"].items():
        if (was := before.get("texts", {}).get(flag, text)) != text:
            flag = "--text_column" if "text_column" in changed else flag
            raise ValueError(f"{flag}: expected the data of {checkpoint}, {was}, got {text}: {other_data}")
    applied = [name for name in changed if name not in ("examples", "training data", "texts")]
    # Other splits or templates make other examples of the same documents; but their order is that of their number.
    if "examples" in changed or ("training data" in changed and not set(applied) & set(MAKE_EXAMPLES)):
        raise ValueError(
            f"--train_file: expected the data of {checkpoint}, {before['training data']}, got {now['training data']}:"
            f" {other_data}"
        )
    return [f"--{name} {now[name]} (was {before[name]})" for name in applied]
