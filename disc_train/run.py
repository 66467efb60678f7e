"""Run `disc-train`: load, say what will run, train, save, say what came of it."""

import os
import signal
import zlib
from statistics import fmean
from typing import Any, NamedTuple

import torch
from huggingface_hub import whoami
from transformers import (
    AutoConfig,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from disc_train.checkpoints import find_checkpoint, is_finished, steps_done
from disc_train.config import DiscArguments
from disc_train.cost import Cost, measure_cost
from disc_train.data.description import Lines
from disc_train.data.sequence_start import bos_prefix
from disc_train.data.training_data import TrainingData, load_training_data
from disc_train.evaluation.in_training import AskProbes
from disc_train.evaluation.probes import Question, read_questions
from disc_train.loading import load_tokenizer
from disc_train.loop_config import LoopArguments
from disc_train.models.adapters import add_lora, base_of_adapter, has_adapters
from disc_train.models.causal_lm import check_vocabulary, load_model
from disc_train.models.frozen_head import freeze_head
from disc_train.models.frozen_layers import freeze_layers
from disc_train.models.pretrained import load_pretrained, quantisation, quantised_by, trust_remote_code
from disc_train.objectives.methods import AT_TEMPERATURE, WITH_TEACHER
from disc_train.objectives.signal import Signal, measure_signal, take_evenly
from disc_train.packing.collator import collator
from disc_train.parallel.agreement import describe_data, same_on_all_processes, settings_of
from disc_train.parallel.termination import Terminated
from disc_train.resume import changed_settings, settings_to_compare
from disc_train.summary import (
    count_steps,
    describe_attention,
    describe_frozen,
    describe_head,
    describe_method,
    describe_model,
    describe_next_steps,
    describe_packing,
    describe_steps,
    describe_teacher,
    print_section,
)
from disc_train.teacher_cache.cached_teacher import CachedTeacher, Teacher, live, read_by
from disc_train.teacher_from_flags import load_cached_teacher, load_teacher_for, teacher_cache
from disc_train.trainer import DiscTrainer


class Inputs(NamedTuple):
    """Hold what a run begins with, once all processes have found the same."""

    tokenizer: PreTrainedTokenizerBase
    data: TrainingData
    questions: list[Question]  # that are asked as it trains
    settings: dict[str, Any]  # that checkpoints keep
    checkpoint: str | None  # to go on from
    changed: list[str]  # settings that were others when it was saved
    resumed_step: int  # steps done when it was saved
    steps: int  # in all


def run(disc: DiscArguments, loop: LoopArguments) -> None:
    """Do what the arguments ask.

    Raises:
        ValueError, OSError, ImportError, FloatingPointError: what the user can mend, with a message that says how.
        Terminated: a signal stopped the training, which can be resumed.
    """
    if loop.disable_tqdm:
        disable_progress_bar()
    inputs = load_inputs(disc, loop)
    finished, steps = inputs.resumed_step == inputs.steps, inputs.steps
    main_process = loop.process_index == 0
    done = inputs.resumed_step
    # No error: a scheduler may repeat a command.
    if inputs.checkpoint and is_finished(str(loop.output_dir), done, steps):
        if main_process:
            of = f"all {steps:,} steps" if finished else f"{done:,} of {steps:,} steps, stopped early"
            print_section("Nothing is left to train", ("saved", f"after {of}, in {loop.output_dir}"))
        return
    trainer = make_trainer(disc, loop, inputs)
    examples = take_evenly(inputs.data.own, disc.signal_examples)

    def signal_now() -> Signal | None:
        # A cache does not have what the teacher says of other contexts, nor a summary what it says of a token.
        cached = isinstance(trainer.teacher, CachedTeacher)
        if disc.method not in AT_TEMPERATURE or not examples or cached:
            return None
        return measure_signal(trainer.student, live(trainer.teacher), examples, temperature=disc.temperature)

    before = signal_now()
    cost = None
    if disc.dry_run:
        cache = None
        if disc.teacher == "cache" and main_process:  # the teacher is in memory, so that the signal can be measured
            cache = teacher_cache(disc, loop, inputs.tokenizer, inputs.data, trainer.student)
        cost = measure_cost(trainer, inputs.data.dataset, cache)
    if main_process:
        print_section("What will run", *_describe_run(disc, trainer, inputs, before, cost))
    if disc.dry_run:
        return
    if inputs.checkpoint is not None and finished:  # the run was stopped between its last step and here
        trainer.restore(inputs.checkpoint)
    else:
        trainer.train(resume_from_checkpoint=inputs.checkpoint)
    if stopped_by := trainer.termination.agreed:
        how = "interrupted" if stopped_by == signal.SIGINT else "terminated"
        raise Terminated(
            f"{how} after step {trainer.state.global_step} of {steps}, which is saved: the same command with"
            " --resume_from_checkpoint true goes on from there",
            stopped_by,
        )
    trainer.save_model()
    trainer.save_state()
    after = None if trainer.follow else signal_now()  # to a teacher that has moved, another signal
    if main_process:
        print_section("What came of it", *_describe_outcome(disc, trainer, inputs.resumed_step, before, after))


def fill_cache(disc: DiscArguments, loop: LoopArguments) -> None:
    """Do what `disc-cache` does: read with the teacher all that a run with these arguments will look up.

    Raises as `run` does.
    """
    disc.dry_run = True  # no checkpoint is looked for, and nothing is written to --output_dir
    inputs = load_inputs(disc, loop)
    student = load_student(disc, loop)
    check_vocabulary(student, inputs.data.tokens[-1])
    teacher = load_cached_teacher(disc, loop, inputs.tokenizer, inputs.data, student)
    if loop.process_index == 0:
        print_section("The teacher's cache is complete", ("cache", teacher.note))


def load_inputs(disc: DiscArguments, loop: LoopArguments) -> Inputs:
    """Find the checkpoint, read the data, and check both, before the models, which may take minutes to load."""
    trust_remote_code(disc.trust_remote_code)
    with same_on_all_processes(loop) as must_agree:
        if loop.push_to_hub and not disc.dry_run:
            check_hub_login(loop.hub_token)
        checkpoint = None if disc.dry_run else find_checkpoint(loop)
        tokenizer = load_tokenizer(disc.model_name_or_path)
        data = load_training_data(disc, loop, tokenizer)
        questions = read_questions(disc.probes_file or (), tokenizer, closed_book=True)
        steps = count_steps(loop, len(data.dataset))[0]
        settings = settings_to_compare(disc, loop, data)
        changed = [] if checkpoint is None else changed_settings(checkpoint, settings)
        resumed_step = steps_done(checkpoint, steps)
        check_teacher_tokenizer(disc, tokenizer, data.tokens)
        if loop.world_size > 1:
            must_agree |= settings_of(disc, loop)
            if data.held_out is not None:
                must_agree["evaluation data"] = describe_data(data.held_out)
            must_agree |= {"training data": settings["training data"], "step of the checkpoint": resumed_step}
            must_agree["probes"] = zlib.crc32(repr(questions).encode())
    return Inputs(tokenizer, data, questions, settings, checkpoint, changed, resumed_step, steps)


def make_trainer(disc: DiscArguments, loop: LoopArguments, inputs: Inputs) -> DiscTrainer:
    """Load the models and put them into a trainer."""
    dataset = inputs.data.dataset
    with same_on_all_processes(loop):
        set_seed(loop.seed)  # the Trainer's own comes too late for adapters, which begin at random
        student = load_student(disc, loop)
        check_vocabulary(student, inputs.data.tokens[-1])
    teacher: Teacher = None
    if disc.method in WITH_TEACHER or dataset.replays_by_kl:
        if disc.teacher == "cache" and not disc.dry_run:
            teacher = load_cached_teacher(disc, loop, inputs.tokenizer, inputs.data, student)
        else:
            with same_on_all_processes(loop):
                teacher = load_teacher_for(disc, student, loop, inputs.data.tokens[-1])
    if disc.dry_run:  # the Trainer makes the folder that it is given, and the repository on the Hub
        loop.output_dir, loop.push_to_hub = os.curdir, False
    patience = loop.early_stopping_patience
    trainer = DiscTrainer(
        student,
        teacher,
        loop,
        dataset,
        eval_dataset=inputs.data.held_out,
        method=disc.method,
        temperature=disc.temperature,
        ce_weight=disc.ce_weight,
        kl_weight=disc.kl_weight,
        divergence=disc.divergence,
        beta=disc.beta,
        kl_clip=disc.kl_clip,
        teacher_ema_decay=None if disc.teacher != "ema" else 0.0 if disc.teacher_sync_steps else disc.teacher_ema_decay,
        teacher_sync_steps=disc.teacher_sync_steps or 1,
        attention=disc.attention,
        processing_class=inputs.tokenizer,
        callbacks=[_LogLastStep(), *([EarlyStoppingCallback(patience)] if patience else [])],
    )
    trainer.save_dtype = find_save_dtype(disc)
    trainer.run_settings = inputs.settings
    if inputs.questions:
        start = bos_prefix(inputs.tokenizer, disc.add_bos)
        trainer.probes = AskProbes(trainer, inputs.tokenizer, inputs.questions, start, disc.probe_steps)
        trainer.add_callback(trainer.probes)
    return trainer


def load_student(disc: DiscArguments, loop: LoopArguments) -> PreTrainedModel:
    """Load the model, with adapters if asked for; an adapter is trained on, or merged where new ones are asked for."""
    dtype: torch.dtype = getattr(torch, disc.student_dtype)
    how = None
    if disc.load_in_4bit or disc.load_in_8bit:
        how = quantisation(4 if disc.load_in_4bit else 8, torch.bfloat16 if loop.bf16 else dtype)
    student = load_model(disc.model_name_or_path, dtype, "merged" if disc.lora_rank else "trained", how)
    if not (disc.lora_rank or has_adapters(student)) and (method := quantised_by(student)):
        raise ValueError(
            f"--model_name_or_path: expected weights that can be trained, got some that are quantised ({method}): train"
            " adapters beside them, with --lora_rank"
        )
    if disc.lora_rank:
        add_lora(
            *(student, disc.lora_rank, disc.lora_alpha or 2 * disc.lora_rank),
            *(disc.lora_dropout, disc.lora_target_modules),
            rslora=disc.lora_use_rslora,
            dora=disc.lora_use_dora,
        )
    if disc.freeze_layers and has_adapters(student):
        raise ValueError(
            f"--freeze_layers: adapters leave all layers as they are, got some to train on: {disc.model_name_or_path}"
        )
    if disc.freeze_layers:
        freeze_layers(student, disc.freeze_layers)
    return freeze_head(student) if disc.freeze_head else student


def find_save_dtype(disc: DiscArguments) -> torch.dtype | None:
    """Find the dtype that the trained model is saved in; None: the one that it was trained in."""
    if disc.save_dtype != "auto":
        dtype: torch.dtype = getattr(torch, disc.save_dtype)
        return dtype
    adapters = disc.lora_rank or base_of_adapter(disc.model_name_or_path)
    return None if adapters else load_pretrained(AutoConfig, disc.model_name_or_path).dtype


def check_hub_login(token: str | None) -> None:
    """Raise ValueError if the Hub is out of reach, or does not know who asks."""
    try:
        whoami(token)
    except Exception as error:  # which HTTP client it uses, whose errors these are, depends on its version
        raise ValueError(f"--push_to_hub: expected a login to the Hub (hf auth login), got: {error}") from error


def check_teacher_tokenizer(disc: DiscArguments, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    """Raise ValueError if the data's tokens are others to the teacher's tokenizer, where it comes with one."""
    if disc.teacher_name_or_path is None:
        return
    try:
        other = load_tokenizer(disc.teacher_name_or_path)
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
    """Log the last step's loss, wherever it falls between the steps that are logged."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log |= state.global_step == state.max_steps


def _describe_run(
    disc: DiscArguments, trainer: DiscTrainer, inputs: Inputs, signal: Signal | None, cost: Cost | None
) -> Lines:
    """Describe the data, the models and the steps."""
    dataset, student, teacher = inputs.data.dataset, trainer.student, trainer.teacher
    compared = disc.method in WITH_TEACHER
    collate = collator(student, read_by(teacher, student), compared)
    cached = isinstance(teacher, CachedTeacher) and disc.method in AT_TEMPERATURE
    return [
        *inputs.data.description,
        ("method", f"{disc.method}: {describe_method(disc)}"),
        describe_packing(dataset, trainer.args.train_batch_size, collate),
        ("student", describe_model(student)),
        *([("", describe_frozen(student))] if disc.freeze_layers else []),
        ("teacher", describe_teacher(student, teacher, compared or dataset.replays_by_kl)),
        *([("", trainer.follow.describe())] if trainer.follow else []),
        ("head", describe_head(student, teacher, compared or dataset.replays_by_kl, disc.divergence, disc.kl_clip)),
        ("attention", describe_attention(trainer.attention)),
        ("steps", describe_steps(trainer.args, dataset, inputs.checkpoint, inputs.resumed_step)),
        *(cost.describe() if cost else []),
        *([("changed", f"since then, from here on: {', '.join(inputs.changed)}")] if inputs.changed else []),
        *([("probes", trainer.probes.describe())] if trainer.probes else []),
        *(signal.describe(dataset.noun, disc.temperature, _clip_of_signal(disc)) if signal else []),
        *([("signal", "not measured: it needs the teacher itself; --dry_run measures it")] if cached else []),
    ]


def _clip_of_signal(disc: DiscArguments) -> float | None:
    """Return the bound on a token's forward KL, which the signal is measured in; None: there is none."""
    return disc.kl_clip if disc.divergence == "forward_kl" else None


def _describe_outcome(
    disc: DiscArguments, trainer: DiscTrainer, resumed_step: int, before: Signal | None, after: Signal | None
) -> Lines:
    """Describe the steps taken here, their pace, their loss, and how much of the signal the student took up in all."""
    noun, history = trainer.noun, trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry and entry["step"] > resumed_step]
    steps, pace = f"{trainer.state.global_step:,}", ""
    if trainer.examples_read:
        if resumed_step:
            steps = f"{trainer.state.global_step - resumed_step:,} of {steps}, since the resume"
        seconds = history[-1]["train_runtime"]
        pace = (
            f"; {trainer.examples_read:,} {noun}s in {seconds:.1f} s, a second {trainer.examples_read / seconds:.1f}"
            f" {noun}s and {trainer.packing.tokens / seconds:,.0f} tokens"
        )
    if trainer.state.global_step < trainer.state.max_steps:
        pace += f"; stopped early, of {trainer.state.max_steps:,}: evaluations got no better"
    lines = [("steps", f"{steps}{pace}")]
    if losses:
        ends, which = f"{losses[0]:.4f}", "of the one logged step"
        if len(losses) > 1:
            ends, which = f"{ends} -> {losses[-1]:.4f}", "of the first and last logged steps"
        lines.append(("loss", f"{ends}, {describe_method(disc)}, {which}"))
    if before and after:
        was, is_ = fmean(before.divergence), fmean(after.divergence)
        share = f": the student took up {1 - is_ / was:.0%} of it" if was else ""
        lines.append(("signal", f"{was:.4f} -> {is_:.4f} nats a token on the same {noun}s{share}"))
        if was and 1 - is_ / was < 0.01:
            advice = f"raise --learning_rate, which was {trainer.args.learning_rate:g}, or take more steps"
            if before.clip_warning(_clip_of_signal(disc)):
                advice = "raise --kl_clip, or leave it out"
            lines.append(("WARNING", f"the student took up hardly anything: {advice}"))
    if trainer.probes and (answers := trainer.probes.describe_outcome()):
        lines.append(("probes", answers))
    adapters = has_adapters(trainer.student)
    dtype = f" in {trainer.save_dtype}".replace("torch.", "") if trainer.save_dtype else ""
    saved = f"{'adapters' if adapters else 'model'}{dtype} and tokenizer in {trainer.args.output_dir}"
    return [*lines, ("saved", saved), *describe_next_steps(disc, trainer.args, adapters)]
