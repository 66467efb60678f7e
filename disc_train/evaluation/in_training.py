"""Ask probes of the student while it trains: what it has learned, and what it has kept."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from disc_train.evaluation.choices import choice_scores, likeliest
from disc_train.evaluation.probes import Question, too_long
from disc_train.generation.batches import MAX_BATCH_TOKENS
from disc_train.parallel.sharding import free_gathered_parameters


class AskProbes(TrainerCallback):
    """Ask probes closed book before the first step, every so many steps and after the last; log the results.

    For each group of probes the logs get `eval_probes_GROUP_accuracy`, the share whose likeliest choice is the right
    one (of those with choices), and `eval_probes_GROUP_logprob`, the mean log-probability of a token of the right
    answer, in nats. `disc-eval` gives the same of a checkpoint. The training is, bit for bit, as without.

    Every process asks all of them, so that models that are divided over processes are put together in step.

    Args:
        prefix: what every sequence starts with, see `disc_train.data.sequence_start.bos_prefix`.
        every: steps between; 0: none in between.

    Raises:
        ValueError: a probe has a token that is none of the model's, or all are longer than the model reads.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        prefix: Sequence[int] = (),
        every: int = 0,
    ) -> None:
        self.trainer, self.tokenizer, self.prefix, self.every = trainer, tokenizer, prefix, every
        reasons = [too_long(self._student, tokenizer, prefix, question.closed_book) for question in questions]
        self.questions = [each for each, reason in zip(questions, reasons, strict=True) if reason is None]
        self.left_out = [reason for reason in reasons if reason]
        if not self.questions:
            raise ValueError(f"--probes_file: none of {len(questions):,} probes could be asked: {self.left_out[0]}")

    @property
    def _student(self) -> Any:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:  # what a resumed run began with is in its logs
            self.trainer.log(self.ask())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps or (self.every and state.global_step % self.every == 0):
            should_log = control.should_log
            self.trainer.log(self.ask())
            control.should_log = should_log  # which logging has switched off: the step's own loss is still to be logged

    def ask(self) -> dict[str, float]:
        """Return what is logged of the student as it is now."""
        student, probes = self._student, [question.closed_book for question in self.questions]
        training = student.training
        student.eval()
        autocast: AbstractContextManager[None] = self.trainer.accelerator.autocast()
        with autocast:
            limits = self.trainer.args.eval_batch_size, MAX_BATCH_TOKENS
            scores = choice_scores(student, self.tokenizer, probes, *limits, self.prefix)
        student.train(training)
        free_gathered_parameters(student)
        found: dict[str, list[float]] = {}
        for question, probe, of_choices in zip(self.questions, probes, scores, strict=True):
            name = f"eval_probes_{question.group}"
            if len(of_choices) > 1:
                found.setdefault(f"{name}_accuracy", []).append(likeliest(of_choices) == probe.answer)
            found.setdefault(f"{name}_logprob", []).append(of_choices[probe.answer])
        return {name: fmean(values) for name, values in found.items()}

    def describe(self) -> str:
        """Say what is asked, and when."""
        groups = ", ".join(dict.fromkeys(question.group for question in self.questions))
        between = f", every {self.every:,} steps" if self.every else ""
        left_out = f"; {len(self.left_out):,} left out (the first: {self.left_out[0]})" if self.left_out else ""
        return f"{len(self.questions):,} ({groups}), asked before the first step{between} and after the last{left_out}"

    def describe_outcome(self) -> str:
        """Say how each logged number changed from the first time that probes were asked to the last."""
        history = [entry for entry in self.trainer.state.log_history if any("eval_probes_" in name for name in entry)]
        names = [name for name in history[0] if name.startswith("eval_probes_")] if history else []
        return "; ".join(
            f"{name.removeprefix('eval_probes_')} {history[0][name]:.3f} -> {history[-1][name]:.3f}" for name in names
        )
