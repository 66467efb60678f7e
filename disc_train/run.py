"""One run of `disc-train`: load, say what will run, train, save, say what came of it."""

from statistics import fmean
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from disc_train.agreement import describe_data, same_on_all_processes, settings_of
from disc_train.causal_lm import check_vocabulary, load_model, use_attention
from disc_train.checkpoints import find_checkpoint, steps_done
from disc_train.config import DiscArguments, LoopArguments
from disc_train.packing import collator
from disc_train.prefix_signal import Signal, evenly_spaced, measure_signal
from disc_train.summary import count_steps, describe_attention, describe_model, describe_packing, describe_steps, show
from disc_train.teacher import load_teacher
from disc_train.termination import Terminated
from disc_train.trainer import DiscTrainer
from disc_train.training_data import distinct_tokens, load_training_data


def run(disc: DiscArguments, loop: LoopArguments) -> None:
    """Do what the arguments ask.

    Raises:
        ValueError, OSError, ImportError, FloatingPointError: what the user can mend, with a message that says how.
        Terminated: SIGTERM stopped the training, which can be resumed.
    """
    if loop.disable_tqdm:
        disable_progress_bar()
    # The data come before the models, which may take minutes: what is wrong with them shows at once.
    with same_on_all_processes(loop) as facts:
        checkpoint = None if disc.dry_run else find_checkpoint(loop)
        tokenizer = AutoTokenizer.from_pretrained(disc.model_name_or_path)
        dataset, description = load_training_data(disc, loop, tokenizer)
        steps = count_steps(loop, len(dataset))[0]
        resumed_step = steps_done(checkpoint, steps, str(loop.output_dir))
        tokens = distinct_tokens(dataset[i] for i in range(len(dataset)))
        check_teacher_tokenizer(disc, tokenizer, tokens)
        if loop.world_size > 1:
            facts |= settings_of(disc, loop)
            facts |= {"training data": describe_data(dataset), "step of the checkpoint": resumed_step}
    student = load_model(disc.model_name_or_path, getattr(torch, disc.student_dtype)).to(loop.device)  # type: ignore[arg-type]
    teacher = load_teacher(disc.teacher_name_or_path or disc.model_name_or_path, student, loop)
    for model in (student, teacher):
        check_vocabulary(model, tokens[-1])
        use_attention(model, disc.attention)

    examples = evenly_spaced(dataset)

    def signal() -> Signal:
        return measure_signal(student, teacher, examples, temperature=disc.temperature)

    before = signal()
    speaks = loop.process_index == 0
    if speaks:
        show(
            "What will run",
            *description,
            describe_packing(dataset, loop.train_batch_size, collator(student, teacher)),
            ("student", describe_model(student)),
            ("teacher", describe_model(teacher)),
            ("attention", describe_attention(student, teacher)),
            ("steps", describe_steps(loop, dataset, resumed_step)),
            *before.describe(dataset.noun),
        )
    if disc.dry_run:
        return

    trainer = DiscTrainer(
        student,
        teacher,
        loop,
        dataset,
        temperature=disc.temperature,
        attention=disc.attention,
        processing_class=tokenizer,
        callbacks=[_LogLastStep()],
    )
    if checkpoint is not None and resumed_step == steps:  # the run was stopped between its last step and here
        trainer.restore(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.termination.agreed:
        raise Terminated(
            f"terminated behind step {trainer.state.global_step} of {steps}, which is saved: the same command with"
            " --resume_from_checkpoint true goes on from there"
        )
    trainer.save_model()
    trainer.save_state()
    after = signal()
    if speaks:
        show("What came of it", *_outcome(trainer, before, after))


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


def _outcome(trainer: DiscTrainer, before: Signal, after: Signal) -> list[tuple[str, str]]:
    noun, history = trainer.noun, trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    pace = ""
    if trainer.examples_read:
        seconds = history[-1]["train_runtime"]
        pace = (
            f"; {trainer.examples_read:,} {noun}s in {seconds:.1f} s, a second {trainer.examples_read / seconds:.1f}"
            f" {noun}s and {trainer.usage.tokens / seconds:,.0f} tokens"
        )
    lines = [("steps", f"{trainer.state.global_step:,}{pace}")]
    if losses:
        lines.append(
            ("loss", f"{losses[0]:.4f} -> {losses[-1]:.4f}, T^2 times the KL, of the first and last logged steps")
        )
    was, is_ = fmean(before.divergence), fmean(after.divergence)
    share = f": the student took up {1 - is_ / was:.0%} of it" if was else ""
    lines.append(("signal", f"{was:.4f} -> {is_:.4f} nats a token on the same {noun}s{share}"))
    lines.append(("saved", f"model and tokenizer in {trainer.args.output_dir}"))
    return lines
