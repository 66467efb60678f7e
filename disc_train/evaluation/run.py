"""One run of `disc-eval`: load, measure, write what was found."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from disc_train.data.context_length import length_of
from disc_train.data.documents import load_documents
from disc_train.evaluation.config import EvalArguments
from disc_train.evaluation.divergence import divergences
from disc_train.evaluation.generation import contains_answer, greedy_answers, is_answer, wanted_text
from disc_train.evaluation.likelihood import choice_scores, likeliest, text_losses
from disc_train.evaluation.probes import Probe, Question, read_documents, read_questions
from disc_train.evaluation.report import write_comparison, write_report
from disc_train.evaluation.results import CLOSED_BOOK, IN_CONTEXT, Evaluation, ProbeOutcome, TextOutcome
from disc_train.evaluation.tasks import run_tasks
from disc_train.loading import check_same_tokens, load_for_inference, load_tokenizer
from disc_train.models.causal_lm import check_vocabulary


def run(arguments: EvalArguments) -> None:
    """Do what the arguments ask; print the tables that are written.

    Raises:
        ValueError, OSError, ImportError, FloatingPointError: what the user can mend, with a message that says how.
    """
    folder = Path(str(arguments.output_dir))
    if arguments.compare:
        text = write_comparison(arguments.compare, folder)
    else:
        text = write_report(evaluate(arguments), folder)
    print(text)


@torch.no_grad()
def evaluate(arguments: EvalArguments) -> Evaluation:
    """Measure what the arguments ask of their model."""
    name = str(arguments.model_name_or_path)
    # The data come before the models, which may take minutes: what is wrong with them shows at once.
    tokenizer = load_tokenizer(name)
    documents = read_documents(arguments.documents_file) if arguments.documents_file else None
    questions = read_questions(arguments.probes_file, tokenizer, documents)
    groups = Counter(Path(path).stem for path in arguments.texts_file)
    if groups and groups.most_common(1)[0][1] > 1:
        raise ValueError(
            "--texts_file: expected files with names of their own, which results are shown under, got several"
            f" {groups.most_common(1)[0][0]!r}"
        )
    texts = [
        (Path(path).stem, document.text)
        for path in arguments.texts_file
        for document in load_documents(path, None, arguments.text_column)
    ]
    model, reference = load_for_inference(name, arguments.dtype, arguments.use_cpu), None
    if arguments.reference_name_or_path:
        check_same_tokens([text for _, text in texts], tokenizer, arguments.reference_name_or_path)
        reference = load_for_inference(arguments.reference_name_or_path, arguments.dtype, arguments.use_cpu)
    found = Evaluation(settings=asdict(arguments), versions={each: version(each) for each in ("torch", "transformers")})
    if arguments.tasks:  # first: what is wrong with their names shows at once
        tasks = [task.strip() for task in arguments.tasks.split(",")]
        found.tasks = run_tasks(model, tokenizer, tasks, arguments.batch_size, arguments.confirm_run_unsafe_code)
    for condition in (CLOSED_BOOK, IN_CONTEXT):
        found.probes += _ask(model, tokenizer, questions, condition, arguments)
    if questions and all(outcome.excluded for outcome in found.probes):
        raise ValueError(f"--probes_file: none of {len(questions):,} probes could be asked: {found.probes[0].excluded}")
    found.texts = _read(model, reference, tokenizer, texts, arguments)
    return found


def _ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    condition: str,
    arguments: EvalArguments,
) -> list[ProbeOutcome]:
    """Ask all questions, or in context those that have one."""
    in_context = condition == IN_CONTEXT
    questions = [question for question in questions if question.context or not in_context]
    outcomes = [ProbeOutcome(each.id, each.group, condition, each.text) for each in questions]
    probes = [question.probe(tokenizer, in_context) for question in questions]
    asked: list[tuple[ProbeOutcome, Probe]] = []
    for outcome, probe in zip(outcomes, probes, strict=True):
        outcome.excluded = _too_long(model, tokenizer, probe, arguments.max_new_tokens)
        if outcome.excluded is None:
            asked.append((outcome, probe))
    limits = arguments.batch_size, arguments.max_batch_tokens

    to_choose = [(outcome, probe) for outcome, probe in asked if len(probe.choices) > 1]
    all_scores = choice_scores(model, tokenizer, [probe for _, probe in to_choose], *limits)
    for (outcome, probe), scores in zip(to_choose, all_scores, strict=True):
        outcome.scores, outcome.right_choice = scores, likeliest(scores) == probe.answer

    if arguments.max_new_tokens:
        answers = greedy_answers(model, tokenizer, [probe for _, probe in asked], arguments.max_new_tokens, *limits)
        for (outcome, probe), answer in zip(asked, answers, strict=True):
            wanted = wanted_text(tokenizer, probe)
            outcome.generated = answer
            outcome.exact, outcome.contains = is_answer(answer, wanted), contains_answer(answer, wanted)
    return outcomes


def _too_long(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probe: Probe, max_new_tokens: int
) -> str | None:
    """Why the model cannot read a probe with what follows it, if so."""
    limit = length_of(model.config, "model")
    if limit is None:
        return None
    prompt, *choices = (
        len(tokenizer.encode(text, add_special_tokens=False)) for text in (probe.context + probe.prompt, *probe.choices)
    )
    tokens = prompt + max(max_new_tokens, *choices)
    if tokens <= limit.tokens:
        return None
    return f"{tokens} tokens with what follows the prompt, the model reads {limit.tokens}{limit.note}"


def _read(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, str]],
    arguments: EvalArguments,
) -> list[TextOutcome]:
    """Read texts (group, text), each cut to what the models read, alone and beside the reference."""
    limits = arguments.batch_size, arguments.max_batch_tokens
    models = [model] if reference is None else [model, reference]
    lengths = [length.tokens for each in models if (length := length_of(each.config, "model"))]
    whole = [tokenizer.encode(text, add_special_tokens=False) for _, text in texts]
    read = [ids[: min(lengths, default=None)] for ids in whole]
    for each in models:
        check_vocabulary(each, max(map(max, filter(None, read)), default=0))

    losses = text_losses(model, read, *limits)
    outcomes: list[TextOutcome] = []
    numbers: Counter[str] = Counter()
    for (group, _), ids, all_ids, loss in zip(texts, read, whole, losses, strict=True):
        numbers[group] += 1
        cut = len(all_ids) - len(ids)
        outcomes.append(TextOutcome(f"{group}:{numbers[group]}", group, len(ids), cut, loss.tokens, loss.nats))
    if reference is not None:
        for outcome, found in zip(outcomes, divergences(model, reference, read, *limits), strict=True):
            outcome.kl, outcome.entropy = found.kl, found.entropy
            outcome.reference_entropy, outcome.agreement = found.reference_entropy, found.agreement
    return outcomes
