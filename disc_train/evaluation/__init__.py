"""What a model knows, what it kept, and how far it has moved."""

from disc_train.evaluation.divergence import Divergence, divergences, kl_to_reference
from disc_train.evaluation.generation import greedy_accuracy, greedy_answers
from disc_train.evaluation.likelihood import choice_accuracy, choice_scores, perplexity, text_losses
from disc_train.evaluation.probes import Probe, Question, read_documents, read_questions

__all__ = [
    "Divergence",
    "Probe",
    "Question",
    "choice_accuracy",
    "choice_scores",
    "divergences",
    "greedy_accuracy",
    "greedy_answers",
    "kl_to_reference",
    "perplexity",
    "read_documents",
    "read_questions",
    "text_losses",
]
