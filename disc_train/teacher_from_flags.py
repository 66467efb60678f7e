"""Provide a run's teacher: a model in memory, the student without its adapters, or a cache of what a model said."""

import gc
import math
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from disc_train.config import DiscArguments
from disc_train.data.sequence_start import bos_prefix
from disc_train.data.training_data import TrainingData
from disc_train.loop_config import LoopArguments
from disc_train.models.causal_lm import check_vocabulary, use_attention
from disc_train.models.live_teacher import copy_to_follow, load_teacher, teacher_dtype, teacher_or_base_model
from disc_train.objectives.methods import AT_TEMPERATURE, WITH_TEACHER
from disc_train.parallel.agreement import same_on_all_processes
from disc_train.summary import count_steps
from disc_train.teacher_cache.cached_teacher import CachedTeacher
from disc_train.teacher_cache.open import CacheSettings, TeacherCache
from disc_train.teacher_cache.sequences import sources


def load_teacher_for(
    disc: DiscArguments, student: PreTrainedModel, loop: LoopArguments, largest_token: int
) -> PreTrainedModel | None:
    """Load the teacher; None: the student without its adapters, which needs no second model in memory."""
    if _is_its_own_teacher(disc):
        return None
    if disc.teacher == "ema":
        return copy_to_follow(student)
    teacher = load_teacher(disc.teacher_name_or_path or disc.model_name_or_path, student, loop)
    check_vocabulary(teacher, largest_token)
    return teacher


def load_cached_teacher(
    disc: DiscArguments,
    loop: LoopArguments,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingData,
    student: PreTrainedModel,
) -> CachedTeacher:
    """Open the run's cache; what is missing the first process has the teacher read, which is then dropped.

    Raises:
        ValueError, OSError: as `disc_train.teacher_cache.open.TeacherCache`; on all processes alike.
    """
    identity: list[dict[str, Any] | None] = [None]
    with same_on_all_processes(loop):
        if loop.process_index == 0:
            cache = teacher_cache(disc, loop, tokenizer, data, student)
            if not cache.complete:
                _fill(cache, load_teacher_for(disc, student, loop, data.tokens[-1]), disc, loop, student)
            identity = [cache.identity]
            gc.collect()  # the teacher's modules refer to each other
    if loop.world_size > 1:
        broadcast_object_list(identity)
    with same_on_all_processes(loop):
        if loop.process_index > 0:
            cache = teacher_cache(disc, loop, tokenizer, data, student, identity[0])
        return cache.teacher()


def teacher_cache(
    disc: DiscArguments,
    loop: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingData,
    student: PreTrainedModel,
    identity: dict[str, Any] | None = None,
) -> TeacherCache:
    """Make the cache that the flags ask for."""
    steps, steps_an_epoch = count_steps(loop, len(data.dataset))
    autocast = torch.bfloat16 if loop.bf16 else torch.float16 if loop.fp16 else None
    settings = CacheSettings(
        folder=str(disc.teacher_cache),
        teacher_name_or_path=disc.teacher_name_or_path or disc.model_name_or_path,
        dtype=student.dtype if _is_its_own_teacher(disc) else teacher_dtype(student, loop),
        stored=getattr(torch, disc.teacher_cache_dtype),
        temperature=disc.temperature if disc.method in AT_TEMPERATURE else 1.0,
        autocast=autocast,
        start=bos_prefix(tokenizer, disc.add_bos),
        forward_kl=disc.method not in AT_TEMPERATURE or disc.divergence == "forward_kl",
    )
    compare_all = disc.method in WITH_TEACHER
    read = [(source, math.ceil(steps / steps_an_epoch)) for source in sources(data.dataset, compare_all)]
    if compare_all and data.held_out:
        read.append((data.held_out, 1))  # every evaluation has the same splits
    return TeacherCache(settings, read, tokenizer, student, identity)


def _is_its_own_teacher(disc: DiscArguments) -> bool:
    # Adapters that a run begins with are trained on: without them the student is not what it was. And a cache is of the
    # model as its files are, not as a student's weights are quantised.
    cache_of_files = disc.teacher == "cache" and (disc.load_in_4bit or disc.load_in_8bit)
    other = disc.teacher in ("copy", "ema") or disc.teacher_name_or_path is not None
    return bool(disc.lora_rank) and not other and not cache_of_files


def _fill(
    cache: TeacherCache,
    teacher: PreTrainedModel | None,
    disc: DiscArguments,
    loop: LoopArguments,
    student: PreTrainedModel,
) -> None:
    reader = student if teacher is None else teacher
    reader.to(loop.device)  # type: ignore[arg-type]
    use_attention(reader, disc.attention)
    with teacher_or_base_model(teacher, student) as model:
        cache.fill(model, loop.train_batch_size)
