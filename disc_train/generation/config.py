"""The settings of `disc-generate`, from flags and YAML."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from disc_train.batches import MAX_BATCH_TOKENS
from disc_train.flags import check_flag, check_literals, flag, parse_flags


@dataclass
class GenerateArguments:
    """One field a flag.

    Raises:
        ValueError: naming the flag, what was expected and what was given.
    """

    model_name_or_path: str = field(metadata={"help": "The model that writes: the one to be taught, as it is before."})
    output_file: str = field(metadata={"help": "A .jsonl file. If it is there, the run that began it goes on."})
    train_file: str | None = flag("Documents: a .jsonl, .json, .parquet, .csv or .txt file, or a folder of them.")
    dataset_name: str | None = flag("A data set's name on the Hub, in place of --train_file.")
    text_column: str = flag("The column that holds a document's text.", "text")
    mode: Literal["rephrase", "cd"] = flag(
        "rephrase: paraphrases, for --method ft. cd: continuations, for --method cd.", "rephrase"
    )
    prompt_template: str | None = flag(
        "What the model reads: Jinja, or a .jinja file, that writes {{ document }}; {{ chat(user, system=None) }} is"
        " the model's chat template. Default: a request to write the text again, or to go on from it."
    )
    num_generations: int = flag("Texts a document.", 5)
    max_new_tokens: int = flag("Of a text, at most.", 256)
    temperature: float = flag("Of the distribution that tokens are drawn from.", 1.0)
    top_p: float = flag("Draw from the likeliest tokens that have this much probability together.", 0.95)
    seed: int = flag("What is drawn.", 42)
    batch_size: int = flag("Texts a batch, at most.", 32)
    max_batch_tokens: int = flag("Tokens a batch, at most, padding included.", MAX_BATCH_TOKENS)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "Of the model. auto: bfloat16 on CUDA, float32 elsewhere.", "auto"
    )
    use_cpu: bool = flag("Leave an accelerator alone.", False)

    def __post_init__(self) -> None:
        check_literals(self)
        for name in ("num_generations", "max_new_tokens", "batch_size", "max_batch_tokens"):
            check_flag(self, name, getattr(self, name) >= 1, "at least 1")
        check_flag(self, "temperature", 0 < self.temperature < float("inf"), "a positive, finite number")
        check_flag(self, "top_p", 0 < self.top_p <= 1, "more than 0 and at most 1")
        check_flag(self, "output_file", self.output_file.endswith(".jsonl"), "a .jsonl file")
        if (self.train_file is None) == (self.dataset_name is None):
            got = "neither" if self.train_file is None else "both"
            raise ValueError(f"expected one of --train_file and --dataset_name, got {got}")


def parse_arguments(argv: Sequence[str]) -> GenerateArguments:
    """Read `[CONFIG.yaml] [--flag value ...]`, see `disc_train.flags.parse_flags`."""
    return parse_flags("disc-generate", "Write a model's own texts about documents.", argv, GenerateArguments)[0]
