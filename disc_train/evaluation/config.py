"""Define the settings of `disc-eval`, from flags and YAML."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from disc_train.flags import check_flag, check_installed, flag, parse_flags
from disc_train.generation.config import InferenceArguments


@dataclass
class EvalArguments(InferenceArguments):
    """Hold one field for each flag of `disc-eval`; raise errors as `InferenceArguments` does."""

    output_dir: str | None = flag(
        "The folder for evaluation.json, .md and .png, or for comparison.md and .png; none of them may be there."
    )
    compare: list[str] = field(
        default_factory=list,
        metadata={"help": "Put finished runs side by side, by their folders or JSON files, all against the first."},
    )
    probes_file: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Files of probes: a `question` or `prompt`, `choices`, an `answer`, and maybe a `context` or"
            " `document`, `group`, `id`."
        },
    )
    documents_file: str | None = flag("Where probes name a `document`: a file of the documents, with `id` and `text`.")
    texts_file: list[str] = field(
        default_factory=list,
        metadata={"help": "Files or folders of texts, for perplexity and the divergence from a reference."},
    )
    reference_name_or_path: str | None = flag(
        "The model before training, say: a token's KL to it and the drift of entropy are measured on the texts."
    )
    tasks: str | None = flag("Tasks of lm-eval, separated by commas: ifeval,mmlu_pro. Needs: pip install lm-eval.")
    confirm_run_unsafe_code: bool = flag("Let lm-eval run tasks that execute code the model has written.", False)
    max_new_tokens: int = flag("The most tokens that are generated for a probe; 0: nothing.", 32)
    batch_size: int = flag("The most sequences in a batch.", 64)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.output_dir:
            raise ValueError("--output_dir: expected the folder for the results, got none")
        check_flag(self, "max_new_tokens", self.max_new_tokens >= 0, "at least 0")
        asked = [*self.probes_file, *self.texts_file, *([self.tasks] if self.tasks else [])]
        if self.compare:
            if asked or self.model_name_or_path:
                raise ValueError("--compare: expected finished runs alone, no model, probes, texts or tasks with it")
            check_flag(self, "compare", len(self.compare) >= 2, "at least two runs")
            return
        if self.model_name_or_path is None:
            raise ValueError("expected --model_name_or_path or --compare, got neither")
        if not asked:
            raise ValueError("nothing to evaluate: expected --probes_file, --texts_file or --tasks, got none of them")
        if self.reference_name_or_path and not self.texts_file:
            raise ValueError("--reference_name_or_path: expected --texts_file with it, the divergence is of texts")
        if self.documents_file and not self.probes_file:
            raise ValueError("--documents_file: expected --probes_file with it, whose documents these are")
        if self.tasks:
            check_installed("--tasks", "lm_eval", install="lm-eval")


def parse_arguments(argv: Sequence[str]) -> EvalArguments:
    """Read `[CONFIG.yaml] [--flag value ...]`, see `disc_train.flags.parse_flags`."""
    return parse_flags("disc-eval", "Measure what a language model knows, and what it kept.", argv, EvalArguments)[0]
