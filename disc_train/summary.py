"""Say what will run, in plain words: data, tokens, models, steps."""

import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import PreTrainedModel, TrainingArguments

from disc_kernels.hf import output_head
from disc_train.config import DiscArguments
from disc_train.data.dataset import MIN_TOKENS, DocumentDataset, ExampleDataset, ReplayDataset
from disc_train.data.example import Example, Ids
from disc_train.data.splits import Split, TokenizedDocument
from disc_train.models.adapters import base_of_adapter, describe_unadapted, has_adapters
from disc_train.models.attention import Attention
from disc_train.models.frozen_head import head_is_frozen, head_is_tied
from disc_train.models.pretrained import quantised_by
from disc_train.packing.collator import PackedBatch, PackingStats
from disc_train.packing.drawing import sample_batches
from disc_train.teacher_cache.cached_teacher import CachedTeacher, Teacher

MAX_LOST = 0.05  # of the tokens, before a warning


@dataclass
class TokenCounts:
    """Count an epoch's tokens; one in a document is counted once, under the first of these that holds for it."""

    trained: int = 0  # predicted by the student
    first: int = 0  # first of a suffix, where the student has nothing before it to predict it from
    prefix: int = 0  # before the last suffix, and in none
    unread: int = 0  # after the last suffix
    suffixes: int = 0
    rows: int = 0  # predictions; more than `trained` where suffixes overlap

    @property
    def total(self) -> int:
        return self.trained + self.first + self.prefix + self.unread


def count_tokens(samples: Iterable[tuple[TokenizedDocument, Sequence[Split]]], first: int) -> TokenCounts:
    """Count over documents and their splits; the first `first` tokens (0 or 1) of a suffix are not predicted."""
    counts = TokenCounts()
    for document, splits in samples:
        end = max(split.stop for split in splits)
        trained = np.zeros(end, dtype=bool)
        for split in splits:
            trained[split.start + first : split.stop] = True
        beginnings = sum(not trained[start] for start in {split.start for split in splits})
        counts.trained += int(trained.sum())
        counts.first += beginnings
        counts.prefix += end - int(trained.sum()) - beginnings
        counts.unread += len(document.input_ids) - end
        counts.suffixes += len(splits)
        counts.rows += sum(split.stop - split.start - first for split in splits)
    return counts


def describe_documents(
    read: Sequence[TokenizedDocument], parts: Sequence[TokenizedDocument], dataset: DocumentDataset
) -> list[tuple[str, str]]:
    """Describe, in lines (label, text), the documents that were read and what a pass over them predicts.

    Args:
        parts: the same where long ones are divided into chunks.
    """
    empty = [document.name for document in dataset.too_short if len(document.input_ids) == 0]
    first = f" (the first: {empty[0]})" if empty else ""
    samples = ((document, dataset.splits(index)) for index, document in enumerate(dataset.documents))
    counts = count_tokens(samples, first=dataset[0].branches[0].first)
    templates = dataset.templates
    lines = [
        (
            "documents",
            f"{len(read):,} read, {len(dataset):,} used; {len(empty):,} empty{first},"
            f" {len(dataset.too_short) - len(empty):,} too short to split into a prefix and a suffix of 2 tokens;"
            f" {_describe_long(read, parts)}",
        ),
        ("split points", f"{counts.suffixes:,} a pass, by {dataset.split_strategy}"),
        (
            "tokens",
            f"{counts.total:,} in these documents: {counts.trained:,} predicted; skipped: {counts.prefix:,} in"
            f" prefixes only, {counts.first:,} that begin a suffix, {counts.unread:,} after the last suffix;"
            f" {counts.rows:,} predictions a pass",
        ),
    ]
    if templates.longest > templates.start:
        before, after = len(templates.teacher_header), len(templates.teacher_footer)
        teacher = f"teacher: {before:,} tokens before a document and {after:,} after a prefix; "
        student = f"student: {len(templates.student_header):,} tokens before a suffix"
        lines.append(("templates", student if before + after == templates.start else teacher + student))
    return lines + _warn_of_loss(read, dataset.too_short)


def describe_whole_documents(
    read: Sequence[TokenizedDocument], parts: Sequence[TokenizedDocument], dataset: ExampleDataset
) -> list[tuple[str, str]]:
    """Describe, in lines (label, text), documents that are read as a whole, see `describe_documents`."""
    short = [document.name for document in parts if len(document.input_ids) < MIN_TOKENS]
    names = f" ({', '.join(short[:5])}{', ...' if len(short) > 5 else ''})" if short else ""
    branches = [branch for example in dataset.examples for branch in example.branches]
    tokens, rows = sum(len(branch.target) for branch in branches), sum(branch.rows for branch in branches)
    return [
        (
            "documents",
            f"{len(read):,} read, {len(dataset):,} used; {len(short):,} of fewer than {MIN_TOKENS} tokens"
            f"{names}; {_describe_long(read, parts)}",
        ),
        ("tokens", f"{tokens:,} in these documents: {rows:,} predicted; skipped: {tokens - rows:,} first"),
        *_warn_of_loss(read, ()),
    ]


def _describe_long(read: Sequence[TokenizedDocument], parts: Sequence[TokenizedDocument]) -> str:
    """Say how many documents were too long, and what became of them."""
    longest = max(len(part.input_ids) for part in parts)
    tokens_of_long = [len(document.input_ids) for document in read if len(document.input_ids) > longest]
    if tokens_of_long:
        repeated = sum(len(part.input_ids) for part in parts) - sum(len(document.input_ids) for document in read)
        return (
            f"{len(tokens_of_long):,} too long, of {sum(tokens_of_long):,} tokens, divided into"
            f" {len(parts) - len(read) + len(tokens_of_long):,} chunks of up to {longest:,}"
            + (f", which repeat {repeated:,}" if repeated else "")
        )
    cut = [document for document in read if document.cut]
    dropped = sum(document.cut for document in cut)
    return f"{len(cut):,} cut" + (f" to {len(cut[0].input_ids):,} tokens ({dropped:,} dropped)" if cut else "")


def _warn_of_loss(read: Sequence[TokenizedDocument], too_short: Sequence[TokenizedDocument]) -> list[tuple[str, str]]:
    """Warn, in a line (label, text), if many of the tokens are in no document that is trained on."""
    cut = sum(document.cut for document in read)
    short = sum(len(document.input_ids) for document in too_short)
    total = cut + sum(len(document.input_ids) for document in read)
    if cut + short <= MAX_LOST * total:
        return []
    lost = f"{cut + short:,} of {total:,} tokens ({(cut + short) / total:.0%}) are lost"
    return [
        (
            "WARNING",
            f"{lost}: {cut:,} beyond --max_document_tokens (--long_documents chunk keeps them), {short:,} in documents"
            " too short to split",
        )
    ]


def describe_other_files(others: Sequence[Path]) -> list[tuple[str, str]]:
    """Describe, in a line (label, text) if there are any, the files of kinds that are not read."""
    if not others:
        return []
    kinds = Counter(file.suffix.lower() or "no suffix" for file in others)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(5))
    more = f" and {len(kinds) - 5:,} more kinds" if len(kinds) > 5 else ""
    return [("not read", f"{len(others):,} files of other kinds: {counts}{more} (the first: {others[0]})")]


def describe_replay(dataset: ReplayDataset, file: str) -> str:
    """Say where what is replayed comes from, how much it is, and how it is trained on."""
    objective = "by KL to the initial model" if dataset.replays_by_kl else "by the method"
    drawn = dataset.drawn_per_epoch
    return (
        f"{drawn:,} more {dataset.replay.noun}s an epoch, {drawn / len(dataset):.0%} of all, drawn anew each time from"
        f" {len(dataset.replay):,} in {file}; trained on {objective}"
    )


def describe_records(dataset: ExampleDataset) -> list[tuple[str, str]]:
    """Describe, in lines (label, text), records."""
    targets = [branch for example in dataset.examples for branch in example.branches]

    def contexts(role: str, trunks: list[Ids]) -> str:
        different = len({trunk.tobytes() for trunk in trunks})
        return f"{sum(map(len, trunks)):,} in contexts of the {role} ({different:,} different)"

    teacher = contexts("teacher", [example.teacher_trunk for example in dataset.examples])
    student = contexts("student", [example.student_trunk for example in dataset.examples])
    return [
        ("records", f"{len(dataset):,} read, all used"),
        (
            "tokens",
            f"{sum(len(branch.target) for branch in targets):,} in targets,"
            f" {sum(branch.rows for branch in targets):,} of them predicted; {teacher}; {student}",
        ),
    ]


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
        "talr": "cross-entropy with weights max(p^(1/tau), 0.01)",
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


def describe_next_steps(disc: DiscArguments, args: TrainingArguments, adapters: bool) -> list[tuple[str, str]]:
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
