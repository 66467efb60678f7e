"""The settings of `disc-train`, from flags and YAML: what is trained on what; the loop's are transformers' own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from transformers import TrainingArguments

from disc_train.flags import check_flag, check_literals, parse_flags
from disc_train.flags import flag as _flag
from disc_train.splits import check_language, check_split_options

METHODS_AVAILABLE = ("disc", "cd")
TEACHERS_AVAILABLE = ("auto", "copy")
DOCUMENT_FLAGS = (
    "text_column",
    "num_splits",
    "split_strategy",
    "suffix_tokens",
    "sentence_tokenization",
    "language",
    "max_document_tokens",
    "teacher_template",
    "student_template",
)


@dataclass
class DiscArguments:
    """One field a flag. The defaults are the settings of the method's authors (arXiv 2602.16093).

    Raises:
        ValueError: naming the flag, what was expected and what was given.
    """

    model_name_or_path: str = field(metadata={"help": "The model to teach: a folder or a name on the Hub."})
    teacher_name_or_path: str | None = _flag("A teacher other than the model itself; needs the same tokenizer.")
    student_dtype: Literal["float32", "bfloat16", "float16"] = _flag(
        "Of the trained weights. At small learning rates 16-bit weights lose most updates to rounding; for speed use"
        " --bf16, which keeps float32 weights.",
        "float32",
    )
    train_file: str | None = _flag(
        "Documents, or records for cd: a .jsonl, .json, .parquet, .csv or .txt file, or a folder of them."
    )
    dataset_name: str | None = _flag("A data set's name on the Hub, in place of --train_file.")
    text_column: str = _flag("The column that holds a document's text.", "text")
    method: Literal["disc", "ft", "ft_kl", "talr", "cd"] = _flag(
        "disc: context distillation of documents, split into a prefix and a suffix. cd: of records with the fields"
        " teacher_context, student_context (may be missing) and target, each a text or a list of chat messages. The"
        " others are not available yet.",
        "disc",
    )
    teacher: Literal["auto", "copy", "adapter", "cache"] = _flag(
        "copy: a frozen second model in memory. auto: the cheapest that gives the same result. The others are not"
        " available yet.",
        "auto",
    )
    temperature: float = _flag("Of both models' distributions; 1 is usual for cd.", 2.0)
    num_splits: int = _flag("Split points a document, fewer where it has fewer.", 5)
    split_strategy: Literal[
        "sentence_boundary",
        "middle_sentence",
        "uniform_sentence",
        "random_token",
        "uniform_token",
        "random_token_fixed",
    ] = _flag("Where a document is split.", "sentence_boundary")
    suffix_tokens: int = _flag("Length of a suffix for random_token_fixed; 0: to the end of the document.", 0)
    sentence_tokenization: Literal["document", "sentence"] = _flag(
        "document: as written. sentence: every sentence alone, without the white space between (the authors' way).",
        "document",
    )
    language: str = _flag("Of the documents, for finding sentences: an ISO 639 code.", "en")
    max_document_tokens: int | None = _flag(
        "Longer documents are cut. Default: the model's context length, less the templates."
    )
    teacher_template: str | None = _flag(
        "What the teacher reads before a suffix: Jinja, or a .jinja file, that writes {{ prefix }}, the document before"
        " the split, once; {{ chat(prefix, system=None) }} is the model's chat template. One newline at its end is"
        " dropped. Default: the prefix alone."
    )
    student_template: str | None = _flag(
        "What the student reads before a suffix: Jinja, or a .jinja file, without the prefix. Default: nothing."
    )
    attention: Literal["auto", "sdpa", "flex", "varlen"] = _flag(
        "sdpa: dense masks (eager where attention is softcapped). flex: FlexAttention, for training on CUDA only."
        " varlen: flash attention, CUDA and 16 bits. auto: flex on CUDA, sdpa elsewhere.",
        "auto",
    )
    dry_run: bool = _flag("Print the summary of what would run, and stop.", False)

    def __post_init__(self) -> None:
        check_literals(self)
        self._check("method", self.method in METHODS_AVAILABLE, "disc or cd (the others are not available yet)")
        self._check("teacher", self.teacher in TEACHERS_AVAILABLE, "auto or copy (the others are not available yet)")
        self._check("temperature", 0 < self.temperature < math.inf, "a positive, finite number")
        self._check("num_splits", self.num_splits >= 1, "at least 1")
        check_split_options(self.split_strategy, self.num_splits, self.suffix_tokens)
        check_language(self.language)
        if self.method == "cd":
            for item in fields(self):
                given = getattr(self, item.name) != item.default
                if item.name in DOCUMENT_FLAGS and given:
                    raise ValueError(f"--{item.name} is for documents, --method cd takes records: leave it out")
        limit = self.max_document_tokens
        self._check("max_document_tokens", limit is None or limit >= 3, "at least 3")
        if (self.train_file is None) == (self.dataset_name is None):
            got = "neither" if self.train_file is None else "both"
            raise ValueError(f"expected one of --train_file and --dataset_name, got {got}")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        check_flag(self, name, holds, expected)


@dataclass
class LoopArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the few defaults that suit distillation better; every flag can be given."""

    learning_rate: float = _flag("The initial learning rate (the authors' for models of 7B parameters).", 3e-6)
    logging_steps: float = _flag("Log every so many steps; below 1: a share of all steps.", 10)
    logging_first_step: bool = _flag("Log the first step's loss as well.", True)
    dataloader_pin_memory: bool = field(
        default_factory=torch.accelerator.is_available,
        metadata={"help": "Copy batches through pinned memory. On where there is an accelerator to copy to."},
    )
    logging_nan_inf_filter: bool = _flag(
        "Hide losses that are not finite from the logs. Off, since the training stops at the first one.", False
    )

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise ValueError("--output_dir: expected the folder for checkpoints and the trained model, got none")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: expected at least 1, got {getattr(self, name)}")
        if self.eval_strategy != "no" or self.do_eval:
            raise ValueError("--eval_strategy, --do_eval: expected neither, disc-train has no evaluation set")
        if self.label_smoothing_factor:
            raise ValueError(
                f"--label_smoothing_factor: expected 0, the loss is a divergence, got {self.label_smoothing_factor}"
            )
        if self.max_steps <= 0 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"--num_train_epochs: expected a positive, finite number, got {self.num_train_epochs}")
        if self.accelerator_config is None:  # a copy from pinned memory need not be waited for
            self.accelerator_config = {"non_blocking": self.dataloader_pin_memory}
        super().__post_init__()


def parse_arguments(argv: Sequence[str]) -> tuple[DiscArguments, LoopArguments]:
    """Read `[CONFIG.yaml] [--flag value ...]`, see `disc_train.flags.parse_flags`."""
    description = "Teach a language model the content of documents by context distillation."
    disc, loop = parse_flags("disc-train", description, argv, DiscArguments, LoopArguments)
    return disc, loop
