"""Measure what a model knows, what it kept, and how far it has moved."""

from disc_train.evaluation.answers import greedy_answers
from disc_train.evaluation.choices import choice_accuracy, choice_scores
from disc_train.evaluation.in_training import AskProbes
from disc_train.evaluation.probes import Probe, Question, read_documents, read_questions
from disc_train.evaluation.texts import kl_to_reference, perplexity, text_sums

__all__ = [
    "AskProbes",
    "Probe",
    "Question",
    "choice_accuracy",
    "choice_scores",
    "greedy_answers",
    "kl_to_reference",
    "perplexity",
    "read_documents",
    "read_questions",
    "text_sums",
]
