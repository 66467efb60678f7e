"""Define the settings of `disc-generate`, and those that it shares with `disc-eval`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from disc_train.data.files import FILES_HELP
from disc_train.data.sequence_start import ADD_BOS_HELP
from disc_train.flags import check_flag, check_literals, flag, parse_flags, several
from disc_train.generation.batches import MAX_BATCH_TOKENS
from disc_train.models.pretrained import TRUST_HELP


@dataclass
class InferenceArguments:
    """Say how a command loads and runs a model, with one field for each flag.

    Raises:
        ValueError: naming the flag, what was expected and what was given.
    """

    model_name_or_path: str | None = flag("The model: a folder, a name on the Hub, or the folder of a LoRA adapter.")
    text_column: str = flag("The column that holds a text.", "text")
    max_new_tokens: int = flag("The most tokens that are generated for a text.", 256)
    batch_size: int = flag("The most sequences in a batch.", 32)
    max_batch_tokens: int = flag(
        "The most tokens in a batch, padding included: lower it if memory runs out.", MAX_BATCH_TOKENS
    )
    add_bos: Literal["auto", "true", "false"] = flag(ADD_BOS_HELP, "auto")
    attention: Literal["auto", "sdpa", "eager"] = flag(
        "The attention of the models. auto: sdpa, or eager for a model of which sdpa would leave out something.", "auto"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "The dtype of the models. auto: bfloat16 on CUDA, float32 elsewhere.", "auto"
    )
    use_cpu: bool = flag("Leave an accelerator alone.", False)
    trust_remote_code: bool = flag(TRUST_HELP, False)

    def __post_init__(self) -> None:
        check_literals(self)
        for name in ("batch_size", "max_batch_tokens"):
            check_flag(self, name, getattr(self, name) >= 1, "at least 1")


@dataclass
class GenerateArguments(InferenceArguments):
    """Hold one field for each flag of `disc-generate`; raise errors as `InferenceArguments` does."""

    output_file: str | None = flag("A .jsonl file. If it is there, the run that began it goes on.")
    train_file: list[str] | None = several(f"Documents: {FILES_HELP}.")
    dataset_name: str | None = flag("A data set's name on the Hub, in place of --train_file.")
    mode: Literal["rephrase", "cd", "answers"] = flag(
        "rephrase: paraphrases, for --method ft. cd: continuations, for --method cd. answers: the targets of records"
        " that --method cd reads but for those, or that have a question, and maybe a context.",
        "rephrase",
    )
    teacher_system_prompt: str | None = flag(
        "answers: the system prompt that messages and questions are answered behind."
    )
    prompt_template: str | None = flag(
        "What the model reads: Jinja, or a .jinja file, that writes {{ document }}; {{ chat(user, system=None) }} is"
        " the model's chat template. Default: a request to write the text again, or to go on from it."
    )
    num_generations: int = flag("How many texts are generated for a document.", 5)
    temperature: float = flag("The temperature of the distribution that tokens are drawn from.", 1.0)
    top_p: float = flag("Draw from the likeliest tokens that have this much probability together.", 0.95)
    seed: int = flag("The seed of what is drawn.", 42)

    @property
    def noun(self) -> str:
        """Return what a text is generated from, as messages call it."""
        return "question" if self.mode == "answers" else "document"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, wanted in (("model_name_or_path", "the model that generates"), ("output_file", "the file to write")):
            if getattr(self, name) is None:
                raise ValueError(f"--{name}: expected {wanted}, got none")
        for name in ("num_generations", "max_new_tokens"):
            check_flag(self, name, getattr(self, name) >= 1, "at least 1")
        check_flag(self, "temperature", 0 < self.temperature < float("inf"), "a positive, finite number")
        check_flag(self, "top_p", 0 < self.top_p <= 1, "more than 0 and at most 1")
        if self.mode == "answers":
            check_flag(self, "prompt_template", self.prompt_template is None, "none with --mode answers")
        else:
            check_flag(self, "teacher_system_prompt", self.teacher_system_prompt is None, "--mode answers with it")
        check_flag(self, "output_file", str(self.output_file).endswith(".jsonl"), "a .jsonl file")
        if (self.train_file is None) == (self.dataset_name is None):
            got = "neither" if self.train_file is None else "both"
            raise ValueError(f"expected one of --train_file and --dataset_name, got {got}")


def parse_arguments(argv: Sequence[str]) -> GenerateArguments:
    """Read `[CONFIG.yaml] [--flag value ...]`, see `disc_train.flags.parse_flags`."""
    return parse_flags("disc-generate", "Write a model's own texts about documents.", argv, GenerateArguments)[0]
