"""Define the settings of `disc-train` and `disc-cache`: what is trained on what; `loop_config.py` has the loop's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from disc_train.data.files import FILES_HELP
from disc_train.data.sequence_start import ADD_BOS_HELP
from disc_train.data.splits import check_language, check_split_options
from disc_train.flags import check_flag, check_installed, check_literals, flag, parse_flags, several
from disc_train.loop_config import MEASURED, CacheLoopArguments, LoopArguments
from disc_train.models.pretrained import TRUST_HELP
from disc_train.objectives.methods import AT_TEMPERATURE, OBJECTIVES, OF_SUFFIXES, WITH_TEACHER

# Which methods have a use for a flag, and which flag another needs: one that would change nothing is refused.
DOCUMENT_METHODS = tuple(method for method in OBJECTIVES if method != "cd")
METHODS_OF_FLAG: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("num_splits", "split_strategy", "suffix_tokens", "sentence_tokenization"), OF_SUFFIXES),
    **dict.fromkeys(("language", "student_template"), OF_SUFFIXES),
    "teacher_template": ("disc",),
    **dict.fromkeys(("temperature", "ce_weight", "divergence", "beta"), AT_TEMPERATURE),
    **dict.fromkeys(("text_column", "max_document_tokens", "long_documents", "chunk_overlap_tokens"), DOCUMENT_METHODS),
    **dict.fromkeys(("teacher", "teacher_name_or_path", "teacher_cache", "kl_clip"), WITH_TEACHER),
    **dict.fromkeys(("teacher_ema_decay", "teacher_sync_steps"), AT_TEMPERATURE),
    "kl_weight": ("ft_kl",),
    "teacher_system_prompt": ("cd",),
    "signal_examples": AT_TEMPERATURE,
}
# Replay by KL has documents and a teacher of its own, whatever the method.
FLAGS_OF_REPLAY_BY_KL = (
    *("text_column", "max_document_tokens", "long_documents", "chunk_overlap_tokens"),
    *("teacher", "teacher_name_or_path", "teacher_cache"),
)
FLAG_NEEDED_BY = {
    **dict.fromkeys(("lora_alpha", "lora_dropout", "lora_target_modules"), "lora_rank"),
    **dict.fromkeys(("lora_use_rslora", "lora_use_dora", "load_in_4bit", "load_in_8bit"), "lora_rank"),
    **dict.fromkeys(("replay_share", "replay_objective"), "replay_file"),
    "probe_steps": "probes_file",
    "teacher_cache_dtype": "teacher_cache",
}


@dataclass
class DiscArguments:
    """Hold one field for each flag. The defaults are the settings of the method's authors (arXiv 2602.16093).

    Raises:
        ValueError: naming the flag, what was expected and what was given.
    """

    model_name_or_path: str = field(
        metadata={
            "help": "The model to teach: a folder or a name on the Hub. Or an adapter, which is trained on; with"
            " --lora_rank it is merged into its model first, and new ones are trained."
        }
    )
    trust_remote_code: bool = flag(TRUST_HELP, False)
    teacher_name_or_path: str | None = flag(
        "A teacher other than the model itself, as the first model of several updates; needs the same tokenizer."
    )
    student_dtype: Literal["float32", "bfloat16", "float16"] = flag(
        "Of the trained weights. At small learning rates 16-bit weights lose most updates to rounding; for speed use"
        " --bf16, which keeps float32 weights.",
        "float32",
    )
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "Of the trained model when it is saved; a run's checkpoints are exact. auto: as its files were, and float32 for"
        " adapters.",
        "auto",
    )
    train_file: list[str] | None = several(f"Documents, or records for cd: {FILES_HELP}.")
    dataset_name: str | None = flag("A data set's name on the Hub, in place of --train_file.")
    eval_file: list[str] | None = several(
        "As --train_file, but not trained on: its loss, cross-entropy and KL from the teacher are measured when"
        " --eval_strategy says, always on the same splits."
    )
    probes_file: list[str] | None = several(
        "Probes as disc-eval's, asked of the student as it trains, without their contexts: before the first step, every"
        " --probe_steps and after the last."
    )
    probe_steps: int = flag("Steps between one asking of --probes_file and the next; 0: none in between.", 0)
    text_column: str = flag("The column that holds a document's text.", "text")
    method: Literal["disc", "ft", "split_ft", "ft_kl", "talr", "cd"] = flag(
        "disc: context distillation of documents, split into a prefix and a suffix. ft: finetuning on documents, by"
        " cross-entropy. split_ft: cross-entropy on disc's suffixes, each read without its prefix; no teacher. ft_kl:"
        " as ft, and the KL from the initial model. talr: as ft, less of it on tokens that are unlikely to the model."
        " cd: context distillation of records with the fields teacher_context,"
        " student_context (may be missing) and target, each a text or a list of chat messages; or in the forms of TRL"
        " (prompt, privileged_context, completion) and ms-swift (messages, teacher_prompt).",
        "disc",
    )
    teacher: Literal["auto", "copy", "adapter", "cache", "ema"] = flag(
        "copy: a frozen second model in memory. adapter: the model itself with its adapters switched off, for"
        " --lora_rank. auto: adapter where it can be, else copy. cache: what it says of every token, read from"
        " --teacher_cache; what is missing there is computed before the training, or ahead by disc-cache. ema: disc"
        " and cd: a copy that follows the student, by --teacher_ema_decay or --teacher_sync_steps.",
        "auto",
    )
    teacher_ema_decay: float = flag(
        "--teacher ema: after every optimizer step the teacher's weights become this times themselves and the rest of"
        " one times the student's.",
        0.95,
    )
    teacher_sync_steps: int = flag(
        "--teacher ema: the teacher becomes a copy of the student every so many optimizer steps, and is no average; 0:"
        " an average.",
        0,
    )
    teacher_cache: str | None = flag("--teacher cache: the folder of what the teacher says of these documents.")
    teacher_cache_dtype: Literal["bfloat16", "float32"] = flag("--teacher cache: how it is stored.", "bfloat16")
    temperature: float = flag("disc and cd: of both models' distributions; 1 is usual for cd.", 2.0)
    ce_weight: float = flag(
        "disc and cd: of the cross-entropy on the same tokens, which also teaches what is said once.", 0.0
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = flag(
        "disc and cd: forward_kl: KL(teacher || student). reverse_kl: KL(student || teacher). jsd: the generalised"
        " Jensen-Shannon divergence.",
        "forward_kl",
    )
    beta: float = flag("jsd: the teacher's share of the mixture that both are compared with.", 0.5)
    kl_weight: float = flag("ft_kl: of the KL from the initial model.", 0.1)
    kl_clip: float | None = flag(
        "disc, cd and ft_kl: the most nats that a token's KL, or other --divergence, counts: min(KL, this). Tokens of"
        " more have no gradient. Default: no bound."
    )
    lora_rank: int = flag(
        "Train low-rank adapters of this rank beside all linear layers but the head, and nothing else; 0: train the"
        " model. The method's authors: 16.",
        0,
    )
    lora_target_modules: list[str] | None = flag(
        "What gets adapters: names of linear layers and of experts' parameters, or their last parts. Default: all that"
        " peft can adapt."
    )
    lora_alpha: int | None = flag("The adapters are scaled by this over their rank. Default: twice the rank.")
    lora_use_rslora: bool = flag("Scale the adapters by --lora_alpha over the square root of their rank.", False)
    lora_use_dora: bool = flag("Train the norms of adapted weights beside the adapters (DoRA); not of experts.", False)
    lora_dropout: float = flag("Of what the adapters read; none where experts have adapters.", 0.1)
    load_in_4bit: bool = flag("--lora_rank beside weights of 4 bits (QLoRA): nf4, by bitsandbytes.", False)
    load_in_8bit: bool = flag("The same in 8 bits: by bitsandbytes, or else by torchao.", False)
    freeze_head: bool = flag(
        "Leave the output head as it is; where it is tied to the embeddings, those too. With --lora_rank it is anyway.",
        False,
    )
    freeze_layers: int = flag(
        "Leave the embeddings and this many of the lowest layers as they are; an output head that is tied to the"
        " embeddings, too. Half of the layers, at about three times the rate, keep more of what was known.",
        0,
    )
    replay_file: list[str] | None = several(
        "More to train on, so that it is not forgotten: as --train_file, or documents for --replay_objective kl."
    )
    replay_share: float = flag("The share of a step's examples that are replayed, in the mean.", 0.1)
    replay_objective: Literal["method", "kl"] = flag(
        "How replayed examples are trained on. method: as the others. kl: KL(initial model || student) of whole"
        " documents.",
        "method",
    )
    num_splits: int = flag("Split points a document, fewer where it has fewer.", 5)
    split_strategy: Literal[
        "sentence_boundary",
        "middle_sentence",
        "uniform_sentence",
        "random_token",
        "uniform_token",
        "random_token_fixed",
    ] = flag("Where a document is split.", "sentence_boundary")
    suffix_tokens: int = flag("Length of a suffix for random_token_fixed; 0: to the end of the document.", 0)
    sentence_tokenization: Literal["document", "sentence"] = flag(
        "document: as written. sentence: every sentence alone, without the white space between (the authors' way).",
        "document",
    )
    language: str = flag("Of the documents, for finding sentences: an ISO 639 code.", "en")
    add_bos: Literal["auto", "true", "false"] = flag(ADD_BOS_HELP, "auto")
    max_document_tokens: int | None = flag(
        "The most tokens of a document, see --long_documents. Default: the model's context length, less the templates."
    )
    long_documents: Literal["chunk", "cut"] = flag(
        "Those of more than --max_document_tokens. chunk: each becomes several documents, divided between sentences, so"
        " that no text is lost. cut: what is beyond is dropped.",
        "chunk",
    )
    chunk_overlap_tokens: int = flag(
        "A chunk repeats the last sentences of the one before, as many as have no more tokens than this.", 0
    )
    teacher_template: str | None = flag(
        "What the teacher reads before a suffix: Jinja, or a .jinja file, that writes {{ prefix }}, the document before"
        " the split, once; {{ chat(prefix, system=None) }} is the model's chat template. One newline at its end is"
        " dropped. Default: the prefix alone, after what a sequence starts with."
    )
    student_template: str | None = flag(
        "What the student reads before a suffix: Jinja, or a .jinja file, without the prefix. Default: nothing but"
        " what a sequence starts with."
    )
    teacher_system_prompt: str | None = flag(
        "cd: of the teacher, for records with messages; the last of these, the assistant's, is the target."
    )
    attention: Literal["auto", "sdpa", "flex", "varlen"] = flag(
        "sdpa: dense masks (eager where attention is softcapped). flex: FlexAttention, for training on CUDA only."
        " varlen: flash attention, CUDA and 16 bits. auto: sdpa; on CUDA flex where it saves work, by count, on the"
        " run's own batches.",
        "auto",
    )
    signal_examples: int = flag(
        "disc and cd: on how many examples the signal is measured, before the training and after it; 0: on none.", 100
    )
    dry_run: bool = flag("Print the summary of what would run, and stop.", False)

    def __post_init__(self) -> None:
        check_literals(self)
        self._check_uses()
        check_flag(self, "temperature", 0 < self.temperature < math.inf, "a positive, finite number")
        for name in ("ce_weight", "kl_weight"):
            check_flag(self, name, 0 <= getattr(self, name) < math.inf, "0 or a positive, finite number")
        clip = self.kl_clip
        check_flag(self, "kl_clip", clip is None or 0 < clip < math.inf, "a positive, finite number")
        check_flag(self, "beta", 0 < self.beta < 1, "a number between 0 and 1")
        check_flag(self, "lora_rank", self.lora_rank >= 0, "0 (no adapters) or more")
        check_flag(self, "freeze_layers", self.freeze_layers >= 0, "0 (all layers are trained) or more")
        check_flag(self, "lora_alpha", self.lora_alpha is None or self.lora_alpha > 0, "a positive number")
        check_flag(self, "lora_dropout", 0 <= self.lora_dropout < 1, "a number from 0 to 1, less than 1")
        check_flag(self, "replay_share", 0 < self.replay_share < 1, "a number between 0 and 1")
        check_flag(self, "signal_examples", self.signal_examples >= 0, "0 (no signal is measured) or more")
        check_flag(self, "probe_steps", self.probe_steps >= 0, "0 (none in between) or more")
        check_split_options(self.split_strategy, self.num_splits, self.suffix_tokens)
        check_language(self.language)
        limit = self.max_document_tokens
        check_flag(self, "max_document_tokens", limit is None or limit >= 3, "at least 3")
        if self.chunk_overlap_tokens and self.long_documents == "cut":
            raise ValueError("--chunk_overlap_tokens is for --long_documents chunk, got it with cut")
        if (self.train_file is None) == (self.dataset_name is None):
            got = "neither" if self.train_file is None else "both"
            raise ValueError(f"expected one of --train_file and --dataset_name, got {got}")

    def _check_uses(self) -> None:
        """Raise ValueError for a flag that was given and would change nothing."""
        given = [item.name for item in fields(self) if getattr(self, item.name) != item.default]
        replays_by_kl = "replay_file" in given and self.replay_objective == "kl"
        self._check_ema(given, replays_by_kl)
        for name in given:
            methods, needed = METHODS_OF_FLAG.get(name, (self.method,)), FLAG_NEEDED_BY.get(name)
            if self.method not in methods and not (replays_by_kl and name in FLAGS_OF_REPLAY_BY_KL):
                raise ValueError(
                    f"--{name} is for --method {', '.join(methods)}; got it with --method {self.method}, which has no"
                    " use for it: leave it out"
                )
            if needed and needed not in given:
                raise ValueError(f"--{name} needs --{needed}, got it without")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("expected one of --load_in_4bit and --load_in_8bit, got both")
        if self.lora_rank and self.freeze_layers:
            raise ValueError("--freeze_layers: with --lora_rank no layer is trained anyway, got both: leave one out")
        if self.lora_rank:
            check_installed("--lora_rank", "peft", install="'disc-kernels[train]'")
        if self.load_in_4bit:
            check_installed("--load_in_4bit", "bitsandbytes")
        if self.load_in_8bit:
            check_installed("--load_in_8bit", "bitsandbytes", "torchao")
        if "beta" in given and self.divergence != "jsd":
            raise ValueError(f"--beta is for --divergence jsd, got it with {self.divergence}")
        if self.teacher == "cache" and self.teacher_cache is None:
            raise ValueError("--teacher cache needs --teacher_cache DIR, got it without")
        if self.teacher != "cache" and self.teacher_cache is not None:
            raise ValueError(f"--teacher_cache DIR needs --teacher cache, got it with --teacher {self.teacher}")
        if self.teacher == "adapter" and "lora_rank" not in given:
            raise ValueError("--teacher adapter is the model without its adapters, so it needs --lora_rank")
        if self.teacher in ("adapter", "ema") and "teacher_name_or_path" in given:
            raise ValueError(
                f"--teacher {self.teacher} is the model itself; got another with --teacher_name_or_path: leave one of"
                " them out"
            )

    def _check_ema(self, given: Sequence[str], replays_by_kl: bool) -> None:
        """Raise ValueError for a teacher that follows the student where none can, or for numbers that are no use."""
        numbers = [name for name in ("teacher_ema_decay", "teacher_sync_steps") if name in given]
        if self.teacher != "ema":
            for name in numbers:
                raise ValueError(f"--{name} is for --teacher ema, got it with --teacher {self.teacher}")
            return
        if len(numbers) == 2:
            raise ValueError("expected one of --teacher_ema_decay and --teacher_sync_steps, got both")
        if self.method not in AT_TEMPERATURE:
            raise ValueError(
                f"--teacher ema is for --method disc, cd; got it with --method {self.method}: leave it out"
            )
        if replays_by_kl:
            raise ValueError("--teacher ema: --replay_objective kl needs the initial model; leave one of them out")
        check_flag(self, "teacher_ema_decay", 0 <= self.teacher_ema_decay < 1, "a number from 0 to 1, less than 1")
        check_flag(self, "teacher_sync_steps", self.teacher_sync_steps >= 0, "0 (an average) or more")


@dataclass
class CacheArguments(DiscArguments):
    """Hold what `disc-cache` reads and where it keeps it: `--teacher cache` is implied."""

    teacher: Literal["cache"] = flag("What it fills.", "cache")

    def __post_init__(self) -> None:
        if self.teacher_cache is None:
            raise ValueError("--teacher_cache: expected the folder to fill, got none")
        super().__post_init__()


def parse_arguments(argv: Sequence[str], command: str = "disc-train") -> tuple[DiscArguments, LoopArguments]:
    """Read `[CONFIG.yaml] [--flag value ...]`, see `disc_train.flags.parse_flags`."""
    if command == "disc-cache":
        description = "Read once with the teacher what a run of disc-train will ask it."
        disc, loop = parse_flags(command, description, argv, CacheArguments, CacheLoopArguments)
    else:
        description = "Teach a language model the content of documents."
        disc, loop = parse_flags(command, description, argv, DiscArguments, LoopArguments)
    if (disc.eval_file is None) != (loop.eval_strategy == "no"):
        given, other = ("eval_strategy", "eval_file") if disc.eval_file is None else ("eval_file", "eval_strategy")
        raise ValueError(f"--{given} needs --{other}, got it without")
    measured = MEASURED if disc.method in WITH_TEACHER else MEASURED[:-1]
    metric = loop.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in measured:
        raise ValueError(
            f"--metric_for_best_model: expected one of {', '.join(measured)}, which --method {disc.method} measures,"
            f" got {metric}"
        )
    return disc, loop
