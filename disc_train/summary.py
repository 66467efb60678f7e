"""Say what will run, in plain words: packing, models, steps; and what can be done with what came of it."""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from transformers import PreTrainedModel, TrainingArguments

from disc_kernels.hf import output_head
from disc_train.config import DiscArguments
from disc_train.data.dataset import ExampleDataset
from disc_train.data.description import Lines
from disc_train.data.example import Example
from disc_train.models.adapters import base_of_adapter, describe_unadapted, has_adapters
from disc_train.models.attention import Attention
from disc_train.models.frozen_head import head_is_frozen, head_is_tied
from disc_train.models.frozen_layers import count_frozen
from disc_train.models.pretrained import quantised_by
from disc_train.packing.collator import PackedBatch, PackingStats
from disc_train.packing.drawing import sample_batches
from disc_train.teacher_cache.cached_teacher import CachedTeacher, Teacher


def describe_packing(
    dataset: ExampleDataset, batch_size: int, collate: Callable[[Sequence[Example]], PackedBatch]
) -> tuple[str, str]:
    """Describe, in a line (label, text), how well batches of the dataset are packed."""
    packed = [collate(batch) for batch in sample_batches(dataset, batch_size)]
    stats = sum((batch["packing"] for batch in packed), PackingStats())

    def rows(side: Literal["input_ids", "teacher_input_ids"]) -> float:
        return sum(0 if (ids := batch[side]) is None else len(ids) for batch in packed) / len(packed)

    teacher, student = rows("teacher_input_ids"), rows("input_ids")
    readers, where = "the student reads", f"{student:.1f} rows"
    if teacher:
        readers, where = "both models read", f"{teacher:.1f} rows of the teacher and {student:.1f} of the student"
    padding = 1 - stats.efficiency
    saving = f"{stats.saving:.1f}"
    return (
        "packing",
        f"{readers} {stats.tokens / len(packed):,.0f} tokens a batch, "
        + (f"{saving}x fewer than in a pass for every target, " if saving != "1.0" else "")
        + f"in {where}; "
        + (f"{padding:.1%} padding" if padding else "no padding")
        + f" ({len(packed):,} tried)",
    )


def describe_method(disc: DiscArguments) -> str:
    """Write the loss of an example as a formula."""
    divergence = {
        "forward_kl": "KL(teacher || student)",
        "reverse_kl": "KL(student || teacher)",
        "jsd": f"JSD(teacher, student; beta = {disc.beta:g})",
    }[disc.divergence]
    of_initial = "KL(initial model || student)"
    if disc.kl_clip is not None:
        divergence, of_initial = (f"min({each}, {disc.kl_clip:g})" for each in (divergence, of_initial))
    loss = {
        "ft": "cross-entropy",
        "split_ft": "cross-entropy of suffixes, each read without its prefix",
        "ft_kl": f"cross-entropy + {disc.kl_weight:g} {of_initial}",
        "talr": "cross-entropy with weights max(q^(1/tau), 0.01)",
    }.get(disc.method, f"T^2 {divergence} at T = {disc.temperature:g}")
    return loss + (f" + {disc.ce_weight:g} cross-entropy" if disc.ce_weight else "")


def describe_model(model: PreTrainedModel) -> str:
    """Say a model's class, size and dtype, and how much of it is trained."""
    total = model.num_parameters()  # of 4 bits there are two in an entry
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    dtype = str(model.dtype).removeprefix("torch.")
    adapted = has_adapters(model) and trained > 0
    what = "trained, in adapters" if adapted else "trained"
    name = type(model).__name__.removeprefix("FSDP")  # PyTorch's mark on models that are divided over processes
    if method := quantised_by(model):
        dtype += f", the rest quantised ({method})"
    return f"{name}, {total:,} parameters, {trained:,} {what}, {dtype}" + (describe_unadapted(model) if adapted else "")


def describe_frozen(model: PreTrainedModel) -> str:
    """Say how many of the lowest layers are not trained."""
    frozen, layers = count_frozen(model)
    return f"the embeddings and the lowest {frozen} of {layers} layers stay as they are"


def describe_teacher(student: PreTrainedModel, teacher: Teacher, needed: bool) -> str:
    """Say what the student is compared with."""
    if not needed:
        return "none: nothing is compared with one"
    if isinstance(teacher, CachedTeacher):
        return f"not in memory{'' if teacher.head is None else ', but for its head'}; {teacher.note}"
    return "the student without its adapters" if teacher is None else describe_model(teacher)


def describe_head(
    student: PreTrainedModel,
    teacher: Teacher,
    compared: bool,
    divergence: str = "forward_kl",
    kl_clip: float | None = None,
) -> str:
    """Say whether the output head is trained, and how often the comparison with a teacher multiplies with a head."""
    again = 0 if kl_clip is None else 2  # the backward pass computes both models' logits anew
    if not head_is_frozen(student):
        return "trained" + (f"; the comparison takes {4 + again} products with a head a step" if compared else "")
    what = "frozen" + (", and so are the embeddings, which are tied to it" if head_is_tied(student) else "")
    if not compared:
        return what
    cached = isinstance(teacher, CachedTeacher)
    if isinstance(teacher, CachedTeacher) and teacher.head is None:
        return f"{what}; the KL takes 2 products with it a step, from cached summaries of the teacher"
    if divergence != "forward_kl":
        why = "summaries are for the forward KL"
    elif output_head(student).transform.softcap is not None:
        why = "summaries are for students without a soft cap on their logits"
    elif cached:
        why = "the cache has hidden states, not summaries"
    else:
        why = "a live teacher's summary would be one more"
    return f"{what}; the comparison takes {3 + again} products with a head a step ({why})"


def describe_attention(attention: Mapping[str, Attention]) -> str:
    """Say which attention each model runs with, and why."""
    texts = {role: f"{got.implementation} ({got.reason})" for role, got in attention.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{role}: {text}" for role, text in texts.items())


def count_steps(args: TrainingArguments, examples: int) -> tuple[int, int]:
    """Count the optimizer steps in all and in an epoch, as `transformers.Trainer` does.

    Raises:
        ValueError: an epoch without a batch.
    """
    per_batch = args.train_batch_size * args.world_size
    batches = examples // per_batch if args.dataloader_drop_last else math.ceil(examples / per_batch)
    if batches == 0:
        raise ValueError(
            f"--dataloader_drop_last: expected at least {per_batch} examples, a batch for every process, got {examples}"
        )
    epoch = math.ceil(batches / args.gradient_accumulation_steps)
    return (args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)), epoch


def describe_steps(
    args: TrainingArguments, dataset: ExampleDataset, checkpoint: str | None = None, resumed_step: int = 0
) -> str:
    """Say how many steps of what size there are, and how many are done."""
    total, epoch = count_steps(args, len(dataset))
    per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    where = f", in {args.world_size} processes" if args.world_size > 1 else ""
    done = f"; {resumed_step:,} are done, in {checkpoint}" if checkpoint else ""
    return f"{total:,} of up to {per_step:,} {dataset.noun}s{where}; {epoch:,} an epoch{done}"


def describe_next_steps(disc: DiscArguments, args: TrainingArguments, adapters: bool) -> Lines:
    """Write a command that evaluates what was trained, on texts beside what it was before; how adapters are loaded."""
    texts = disc.eval_file or disc.train_file if disc.method != "cd" else None
    command = ["disc-eval", "--model_name_or_path", args.output_dir]
    if texts:
        command += ["--reference_name_or_path", disc.model_name_or_path, "--texts_file", *texts]
        command += ["--text_column", disc.text_column] if disc.text_column != "text" else []
    command += ["--trust_remote_code"] if disc.trust_remote_code else []
    command += ["--output_dir", f"{args.output_dir}/evaluation", *(["--use_cpu"] if args.use_cpu else [])]
    command += ["--probes_file", *disc.probes_file] if disc.probes_file else []
    lines = [("next", shlex.join(map(str, command)))]
    if not disc.probes_file:
        texts_or = "" if texts else "--texts_file (what it is to read) or "
        lines.append(("", f"to which {texts_or}--probes_file (what it is to be asked) can be added"))
    if adapters:
        lines.append(("in Python", _loading_code(str(args.output_dir))))
    return lines


def _loading_code(name_or_path: str) -> str:
    """Write Python that loads a model, or an adapter on what it was trained on, which may have an adapter itself."""
    base = base_of_adapter(name_or_path)
    if base is None:
        return f"AutoModelForCausalLM.from_pretrained({name_or_path!r})"
    merge = ".merge_and_unload()" if base_of_adapter(base) else ""
    return f"PeftModel.from_pretrained({_loading_code(base)}{merge}, {name_or_path!r})"


def print_section(title: str, *lines: tuple[str, str]) -> None:
    """Print labelled lines under a title."""
    print(title)
    for label, text in lines:
        print(f"  {label:<13} {text}")
    print(flush=True)
