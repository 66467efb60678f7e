"""One run of `disc-train`: load, say what will run, train, save, say what came of it."""

import os
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils.logging import disable_progress_bar

from disc_train.attention import prepare_attention
from disc_train.causal_lm import check_vocabulary, load_model
from disc_train.config import DiscArguments, LoopArguments
from disc_train.lora import add_lora, has_adapters
from disc_train.objectives import AT_TEMPERATURE, WITH_TEACHER
from disc_train.packing import collator
from disc_train.prefix_signal import Signal, evenly_spaced, measure_signal
from disc_train.summary import (
    count_steps,
    describe_attention,
    describe_method,
    describe_model,
    describe_packing,
    describe_steps,
    describe_teacher,
    show,
)
from disc_train.teacher import load_teacher
from disc_train.trainer import DiscTrainer
from disc_train.training_data import load_training_data


def run(disc: DiscArguments, loop: LoopArguments) -> None:
    """Do what the arguments ask.

    Raises:
        ValueError, OSError, ImportError, FloatingPointError: what the user can mend, with a message that says how.
    """
    checkpoint = None if disc.dry_run else find_checkpoint(loop)
    if loop.disable_tqdm:
        disable_progress_bar()
    # The data come before the models, which may take minutes: what is wrong with them shows at once.
    tokenizer = AutoTokenizer.from_pretrained(disc.model_name_or_path)
    data = load_training_data(disc, loop, tokenizer)
    dataset = data.dataset
    resumed_step = steps_done(checkpoint, count_steps(loop, len(dataset))[0])
    check_teacher_tokenizer(disc, tokenizer, data.tokens)
    set_seed(loop.seed)  # the Trainer's own comes too late for adapters, which begin at random
    student = load_student(disc).to(loop.device)  # type: ignore[arg-type]
    compared = disc.method in WITH_TEACHER
    teacher = load_teacher_for(disc, student, loop) if compared or dataset.replays_by_kl else None
    for model in (student, teacher):
        if model is not None:
            check_vocabulary(model, data.tokens[-1])
    attention = prepare_attention(student, teacher, disc.attention, dataset, loop.train_batch_size)

    examples = evenly_spaced(data.own)

    def signal() -> Signal | None:
        if disc.method not in AT_TEMPERATURE:
            return None
        return measure_signal(student, teacher, examples, temperature=disc.temperature)

    before = signal()
    speaks = loop.process_index == 0
    if speaks:
        other = teacher or student
        show(
            "What will run",
            *data.description,
            ("method", f"{disc.method}: {describe_method(disc)}"),
            describe_packing(dataset, loop.train_batch_size, collator(student, other, compared)),
            ("student", describe_model(student)),
            ("teacher", describe_teacher(student, teacher, compared or dataset.replays_by_kl)),
            ("attention", describe_attention(attention)),
            ("steps", describe_steps(loop, dataset, resumed_step)),
            *(before.describe(dataset.noun) if before else []),
        )
    if disc.dry_run:
        return

    trainer = DiscTrainer(
        student,
        teacher,
        loop,
        dataset,
        method=disc.method,
        temperature=disc.temperature,
        ce_weight=disc.ce_weight,
        kl_weight=disc.kl_weight,
        attention=attention,
        processing_class=tokenizer,
        callbacks=[_LogLastStep()],
    )
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    after = signal()
    if speaks:
        lines = _outcome(trainer, result, describe_method(disc))
        if before and after:
            lines.append(_learned(before, after, trainer.noun))
        what = "adapters" if has_adapters(student) else "model"
        show("What came of it", *lines, ("saved", f"{what} and tokenizer in {trainer.args.output_dir}"))


def load_student(disc: DiscArguments) -> PreTrainedModel:
    """The model, with adapters if asked for."""
    student = load_model(disc.model_name_or_path, getattr(torch, disc.student_dtype))
    if disc.lora_rank:
        add_lora(student, disc.lora_rank, disc.lora_alpha or 2 * disc.lora_rank, disc.lora_dropout)
    return student


def load_teacher_for(disc: DiscArguments, student: PreTrainedModel, loop: LoopArguments) -> PreTrainedModel | None:
    """The teacher asked for; None: the student without its adapters, which needs no second model in memory."""
    if has_adapters(student) and disc.teacher != "copy" and disc.teacher_name_or_path is None:
        return None
    return load_teacher(disc.teacher_name_or_path or disc.model_name_or_path, student, loop)


def find_checkpoint(loop: LoopArguments) -> str | None:
    """The checkpoint to go on from, or None for a new run.

    Raises:
        ValueError: a new run in a folder that holds one, a folder that cannot be written to, or nothing to go on from.
    """
    folder, wanted = Path(str(loop.output_dir)), loop.resume_from_checkpoint
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(f"--output_dir: expected a folder that can be written to, got {folder}")
    last = _last_checkpoint(folder)
    if wanted is None:
        if last is not None:
            raise ValueError(
                f"--output_dir: {folder} already holds a run: continue it with --resume_from_checkpoint {last},"
                " or choose another folder"
            )
        if any((folder / name).exists() for name in ("config.json", "trainer_state.json")):
            raise ValueError(f"--output_dir: {folder} already holds a model: choose another folder")
        return None
    if wanted.lower() == "true":  # the last one of this run; YAML's true arrives as True
        checkpoint = last
    elif Path(wanted, "trainer_state.json").is_file():
        checkpoint = wanted
    else:
        checkpoint = _last_checkpoint(Path(wanted))
    if checkpoint is None:
        raise ValueError(
            "--resume_from_checkpoint: expected a checkpoint, a folder with checkpoints, or true for the last one in"
            f" --output_dir ({folder}), got {wanted}, which has none"
        )
    return checkpoint


def steps_done(checkpoint: str | None, steps: int) -> int:
    """The optimizer steps behind a checkpoint; 0 for none.

    Raises:
        ValueError: no step is left, where the Trainer would do one more.
    """
    if checkpoint is None:
        return 0
    done = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json"))).global_step
    if done >= steps:
        raise ValueError(
            f"--resume_from_checkpoint: {checkpoint} is at step {done} of {steps}: nothing is left to train; for more,"
            " raise --max_steps or --num_train_epochs"
        )
    return done


def _last_checkpoint(folder: Path) -> str | None:
    """The last complete one: what is written last is there. A run may have been stopped while it saved."""
    complete = {
        int(step): path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (step := path.name.rpartition("-")[2]).isdecimal() and (path / "trainer_state.json").is_file()
    }
    return str(complete[max(complete)]) if complete else None


def check_teacher_tokenizer(disc: DiscArguments, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    """Raise ValueError if the data's tokens are others to the teacher's tokenizer, where it comes with one."""
    if disc.teacher_name_or_path is None:
        return
    try:
        other = AutoTokenizer.from_pretrained(disc.teacher_name_or_path)
    except (OSError, ValueError):  # weights alone
        return
    for token, ours, theirs in zip(
        ids, tokenizer.convert_ids_to_tokens(ids), other.convert_ids_to_tokens(ids), strict=True
    ):
        if ours != theirs:
            raise ValueError(
                f"--teacher_name_or_path: expected a teacher with the student's tokenizer, got one in which token"
                f" {token} is {theirs!r}, not {ours!r}"
            )


class _LogLastStep(TrainerCallback):
    """Logs the last step's loss, wherever it falls between the steps that are logged."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log |= state.global_step == state.max_steps


def _outcome(trainer: DiscTrainer, result: TrainOutput, loss: str) -> list[tuple[str, str]]:
    seconds, noun = result.metrics["train_runtime"], trainer.noun
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    lines = [
        (
            "steps",
            f"{result.global_step:,}; {trainer.examples_read:,} {noun}s in {seconds:.1f} s, a second"
            f" {trainer.examples_read / seconds:.1f} {noun}s and {trainer.usage.tokens / seconds:,.0f} tokens",
        )
    ]
    if losses:
        lines.append(("loss", f"{losses[0]:.4f} -> {losses[-1]:.4f}, {loss}, of the first and last logged steps"))
    return lines


def _learned(before: Signal, after: Signal, noun: str) -> tuple[str, str]:
    was, is_ = fmean(before.divergence), fmean(after.divergence)
    share = f": the student took up {1 - is_ / was:.0%} of it" if was else ""
    return "signal", f"{was:.4f} -> {is_:.4f} nats a token on the same {noun}s{share}"
