"""Run `disc-eval`: load, measure, write what was found."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from disc_train.data.context_length import length_of
from disc_train.data.documents import load_documents
from disc_train.data.sequence_start import bos_prefix, start_sequence
from disc_train.evaluation.answers import contains_answer, greedy_answers, is_answer, right_answer
from disc_train.evaluation.choices import choice_scores, likeliest
from disc_train.evaluation.config import EvalArguments
from disc_train.evaluation.probes import Probe, Question, read_documents, read_questions, too_long
from disc_train.evaluation.report import check_nothing_is_there, write_comparison, write_report
from disc_train.evaluation.results import CLOSED_BOOK, IN_CONTEXT, Evaluation, ProbeOutcome, TextOutcome
from disc_train.evaluation.tasks import run_tasks
from disc_train.evaluation.texts import text_sums
from disc_train.loading import check_same_tokens, load_for_inference, load_tokenizer
from disc_train.models.causal_lm import check_vocabulary
from disc_train.models.pretrained import trust_remote_code


def run(arguments: EvalArguments) -> None:
    """Do what the arguments ask; print the tables that are written.

    Raises:
        ValueError, OSError, ImportError, FloatingPointError: what the user can mend, with a message that says how.
    """
    folder = Path(str(arguments.output_dir))
    check_nothing_is_there(folder)
    if arguments.compare:
        text = write_comparison(arguments.compare, folder)
    else:
        text = write_report(evaluate(arguments), folder)
    print(text)


@torch.no_grad()
def evaluate(arguments: EvalArguments) -> Evaluation:
    """Measure what the arguments ask of their model."""
    name, reference_name = str(arguments.model_name_or_path), arguments.reference_name_or_path
    trust_remote_code(arguments.trust_remote_code)
    # The data come before the models, which may take minutes: what is wrong with them shows at once.
    tokenizer = load_tokenizer(name)
    prefix = bos_prefix(tokenizer, arguments.add_bos)
    documents = read_documents(arguments.documents_file) if arguments.documents_file else None
    questions = read_questions(arguments.probes_file, tokenizer, documents)
    texts = _read_texts(arguments)
    if reference_name:
        check_same_tokens([text for _, text in texts], tokenizer, reference_name)
    how = arguments.dtype, arguments.use_cpu, arguments.attention
    model, reference = load_for_inference(name, *how), None
    if reference_name:
        reference = load_for_inference(reference_name, *how, flag="--reference_name_or_path")
    found = Evaluation(settings=asdict(arguments), versions={each: version(each) for each in ("torch", "transformers")})
    if arguments.tasks:  # first: what is wrong with their names shows at once
        tasks = [task.strip() for task in arguments.tasks.split(",")]
        unsafe = arguments.confirm_run_unsafe_code
        found.tasks = run_tasks(model, tokenizer, tasks, arguments.batch_size, bool(prefix), unsafe)
    for condition in (CLOSED_BOOK, IN_CONTEXT):
        found.probes += _ask(model, tokenizer, prefix, questions, condition, arguments)
    if questions and all(outcome.excluded for outcome in found.probes):
        raise ValueError(f"--probes_file: none of {len(questions):,} probes could be asked: {found.probes[0].excluded}")
    found.texts = _measure_texts(model, reference, tokenizer, prefix, texts, arguments)
    return found


def _read_texts(arguments: EvalArguments) -> list[tuple[str, str]]:
    """Read all texts, each with its group, which is its file's name."""
    groups = Counter(Path(path).stem for path in arguments.texts_file)
    if groups and groups.most_common(1)[0][1] > 1:
        raise ValueError(
            "--texts_file: expected files with names of their own, which results are shown under, got several"
            f" {groups.most_common(1)[0][0]!r}"
        )
    return [
        (Path(path).stem, document.text)
        for path in arguments.texts_file
        for document in load_documents(path, None, arguments.text_column, flag="--texts_file")
    ]


def _ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefix: Sequence[int],
    questions: Sequence[Question],
    condition: str,
    arguments: EvalArguments,
) -> list[ProbeOutcome]:
    """Ask all questions closed book, or in context those that have a context."""
    outcomes: list[ProbeOutcome] = []
    asked: list[tuple[ProbeOutcome, Probe]] = []
    for question in questions:
        probe = question.closed_book if condition == CLOSED_BOOK else question.in_context
        if probe is None:
            continue
        excluded = too_long(model, tokenizer, prefix, probe, arguments.max_new_tokens)
        outcomes.append(ProbeOutcome(question.id, question.group, condition, question.text, excluded))
        if excluded is None:
            asked.append((outcomes[-1], probe))
    how = arguments.batch_size, arguments.max_batch_tokens, prefix, f"probes asked {condition}"

    to_choose = [(outcome, probe) for outcome, probe in asked if len(probe.choices) > 1]
    all_scores = choice_scores(model, tokenizer, [probe for _, probe in to_choose], *how)
    for (outcome, probe), scores in zip(to_choose, all_scores, strict=True):
        outcome.scores, outcome.right_choice = scores, likeliest(scores) == probe.answer

    if arguments.max_new_tokens:
        probes = [probe for _, probe in asked]
        answers = greedy_answers(model, tokenizer, probes, arguments.max_new_tokens, *how)
        for (outcome, probe), answer in zip(asked, answers, strict=True):
            right = right_answer(tokenizer, probe)
            outcome.generated = answer
            outcome.exact, outcome.contains = is_answer(answer, right), contains_answer(answer, right)
    return outcomes


def _measure_texts(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    prefix: Sequence[int],
    texts: Sequence[tuple[str, str]],
    arguments: EvalArguments,
) -> list[TextOutcome]:
    """Read texts (group, text), each cut to what the models read, alone and beside the reference."""
    models = [model] if reference is None else [model, reference]
    lengths = [length.tokens for each in models if (length := length_of(each.config, "model"))]
    whole = [start_sequence(prefix, tokenizer.encode(text, add_special_tokens=False)) for _, text in texts]
    read = [ids[: min(lengths, default=None)] for ids in whole]
    for each in models:
        check_vocabulary(each, max(map(max, filter(None, read)), default=0))

    outcomes: list[TextOutcome] = []
    numbers: Counter[str] = Counter()
    all_sums = text_sums(model, read, reference, arguments.batch_size, arguments.max_batch_tokens)
    for (group, _), sums, ids in zip(texts, all_sums, whole, strict=True):
        numbers[group] += 1
        outcomes.append(
            TextOutcome(id=f"{group}:{numbers[group]}", group=group, cut=len(ids) - sums.tokens, **vars(sums))
        )
    return outcomes
