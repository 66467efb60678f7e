"""Which flags belong to which methods: one that would change nothing is refused, not passed over."""

from dataclasses import fields
from typing import Any

TEACHING = ("disc", "cd")  # the methods that teach what a context tells
DOCUMENTS = ("disc", "ft", "ft_kl", "talr")  # the methods that take documents
KL = ("disc", "cd", "ft_kl")  # the methods that compare with a teacher

METHODS_OF = {
    **dict.fromkeys(("text_column", "max_document_tokens"), DOCUMENTS),
    **dict.fromkeys(("num_splits", "split_strategy", "suffix_tokens", "sentence_tokenization", "language"), ("disc",)),
    **dict.fromkeys(("teacher_template", "student_template"), ("disc",)),
    **dict.fromkeys(("temperature", "ce_weight"), TEACHING),
    **dict.fromkeys(("teacher", "teacher_name_or_path"), KL),
    "kl_weight": ("ft_kl",),
}
# Replay by KL has a teacher and documents of its own, whatever the method.
OF_REPLAY_BY_KL = ("text_column", "max_document_tokens", "teacher", "teacher_name_or_path")
NEEDED_BY = {
    "lora_alpha": "lora_rank",
    "lora_dropout": "lora_rank",
    "replay_share": "replay_file",
    "replay_objective": "replay_file",
}


def check_method_flags(arguments: Any) -> None:
    """Check that flags of `disc_train.config.DiscArguments` that are given have something to say.

    Raises:
        ValueError: naming the flag and the method.
    """
    defaults = {item.name: item.default for item in fields(arguments)}

    def given(name: str) -> bool:
        return getattr(arguments, name) != defaults[name]

    replays_by_kl = given("replay_file") and arguments.replay_objective == "kl"
    for name, methods in METHODS_OF.items():
        used = arguments.method in methods or (replays_by_kl and name in OF_REPLAY_BY_KL)
        if given(name) and not used:
            raise ValueError(
                f"--{name} is for --method {', '.join(methods)}; got it with --method {arguments.method}, which has no"
                " use for it: leave it out"
            )
    for name, needed in NEEDED_BY.items():
        if given(name) and not given(needed):
            raise ValueError(f"--{name} needs --{needed}, got it without")
    if arguments.teacher == "adapter":
        if not given("lora_rank"):
            raise ValueError("--teacher adapter is the model without its adapters, so it needs --lora_rank")
        if given("teacher_name_or_path"):
            raise ValueError(
                "--teacher adapter is the model itself; got another with --teacher_name_or_path: leave one of them out"
            )
