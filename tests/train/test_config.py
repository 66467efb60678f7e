"""Flags: what is read, what wins, and what is refused in which words."""

import re
import sys
from pathlib import Path

import pytest
import torch

from disc_train.cli import main
from disc_train.config import DiscArguments, parse_arguments
from disc_train.loop_config import LoopArguments

ROOT = Path(__file__).parents[2]
REQUIRED = ["--model_name_or_path", "m", "--train_file", "f.jsonl", "--output_dir", "o", "--use_cpu", "true"]


def test_the_defaults_are_the_authors():
    disc, loop = parse_arguments(REQUIRED)
    assert (disc.method, disc.temperature, disc.num_splits) == ("disc", 2.0, 5)
    assert (disc.split_strategy, disc.suffix_tokens) == ("sentence_boundary", 0)
    assert (disc.sentence_tokenization, disc.student_dtype) == ("document", "float32")
    assert (loop.learning_rate, loop.logging_nan_inf_filter) == (3e-6, False)


@pytest.mark.parametrize("pinned", ["true", "false"])
def test_copies_from_pinned_memory_are_not_waited_for(pinned):
    _, loop = parse_arguments([*REQUIRED, "--dataloader_pin_memory", pinned])
    assert loop.accelerator_config.non_blocking == (pinned == "true")
    _, loop = parse_arguments([*REQUIRED, "--accelerator_config", '{"even_batches": false}'])
    assert (loop.accelerator_config.even_batches, loop.accelerator_config.non_blocking) == (False, False)


@pytest.mark.parametrize("accelerator", [True, False])
def test_another_process_collates_where_there_is_an_accelerator(accelerator, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    _, loop = parse_arguments(REQUIRED)
    assert loop.dataloader_num_workers == accelerator
    _, loop = parse_arguments([*REQUIRED, "--dataloader_num_workers", "3"])
    assert loop.dataloader_num_workers == 3


def test_the_version_is_printed_at_once(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "disc_train.config", None)  # whose imports take ten seconds
    assert main(["--version"]) == 0
    assert re.fullmatch(r"disc-train \S.*\n", capsys.readouterr().out)


def test_a_process_alone_needs_no_backend():
    """As in a YAML file that serves several processes too."""
    _, loop = parse_arguments([*REQUIRED, "--ddp_backend", "gloo"])
    assert (loop.world_size, loop.device.type) == (1, "cpu")


@pytest.mark.parametrize("flag", ["bf16", "fp16"])
def test_sixteen_bits_without_a_gpu(flag, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    message = f"--{flag} is for a GPU, and none was found: leave it out on a CPU, or add --use_cpu"
    with pytest.raises(ValueError, match=message):
        parse_arguments([*REQUIRED[:-2], f"--{flag}"])


EVALUATION = ["--eval_file", "e.jsonl", "--eval_strategy", "steps"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_sampling_strategy", "group_by_length"], "--train_sampling_strategy: expected random or sequential"),
        (["--lerning_rate", "1"], "--lerning_rate; did you mean --learning_rate?"),
        (["--lr", "1"], "--lr; did you mean --learning_rate?"),
        (["--target_modules=q_proj"], "did you mean --lora_target_modules?"),
        (["--num-split=3"], "did you mean --num_splits?"),
        (["--dtype=bfloat16"], "--dtype=bfloat16; did you mean --student_dtype?"),
        (["--init_lora_weights", "pissa"], "unknown argument --init_lora_weights$"),
        (["--zzzzzz"], "unknown argument --zzzzzz$"),
        (["second.yaml"], "unknown argument second.yaml"),
        (
            ["--report_to", "nobody"],
            "--report_to: expected none, or loggers that are installed, got nobody: pip install",
        ),
        (["--temperature", "0"], "--temperature: expected a positive, finite number, got 0.0"),
        (["--temperature", "nan"], "--temperature"),
        (["--num_splits", "0"], "--num_splits: expected at least 1, got 0"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size: expected at least 1, got 0"),
        (["--per_device_eval_batch_size", "0"], "--per_device_eval_batch_size: expected at least 1, got 0"),
        *(
            ([f"--{flag}", *values], f"--{flag} needs --eval_strategy steps or epoch .*, got --eval_strategy no")
            for flag, *values in (
                ("load_best_model_at_end",),
                ("eval_on_start",),
                ("eval_delay", "2"),
                ("eval_steps", "5"),
                ("per_device_eval_batch_size", "3"),
                ("metric_for_best_model", "loss"),
                ("greater_is_better", "false"),
                ("load_best_model_at_end", "true", "--eval_file", "e.jsonl"),
            )
        ),
        (["--save_strategy", "best"], "--save_strategy best needs --eval_strategy steps or epoch"),
        (
            ["--eval_file", "e.jsonl", "--eval_strategy", "epoch", "--eval_steps", "5"],
            "--eval_steps needs .* steps, got",
        ),
        (["--do_train", "false"], "--do_train: expected true .*, got False"),
        (["--do_predict"], "--do_predict would change nothing, got True: leave it out"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor would change nothing, got 0.1"),
        (["--include_for_metrics", "inputs"], r"--include_for_metrics would change nothing, got \['inputs'\]"),
        (["--bf16_full_eval"], "--bf16_full_eval would change nothing, got True"),
        (["--gradient_checkpointing_kwargs", "{}"], "--gradient_checkpointing_kwargs needs --gradient_checkpointing"),
        (["--enable_jit_checkpoint"], "--enable_jit_checkpoint would change nothing, got True"),
        (["--optim_args", "eps=1"], "--optim_args is not for --optim adamw_torch"),
        (["--optim_target_modules", "attn"], "--optim_target_modules is for --optim galore and apollo, got it with"),
        (["--optim", "galore_adamw"], "--optim galore_adamw needs --optim_target_modules, got it without"),
        (["--dataloader_persistent_workers", "--dataloader_num_workers=0"], "--dataloader_persistent_workers needs"),
        (["--lr_scheduler_kwargs", '{"a": 1}'], "--lr_scheduler_kwargs: expected arguments of the linear .* 'a'"),
        (
            ["--lr_scheduler_type", "warmup_stable_decay"],
            "--lr_scheduler_kwargs: expected arguments of the warmup_stable_decay schedule, .* 'num_decay_steps'",
        ),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "--lr_scheduler_kwargs: expected arguments of .* min_lr_rate"),
        (
            ["--learning_rate", "0", "--lr_scheduler_type=cosine_with_min_lr", '--lr_scheduler_kwargs={"min_lr": 1}'],
            "--lr_scheduler_kwargs: expected arguments of .* division by zero",
        ),
        (["--hub_model_id", "a/b"], "--hub_model_id needs --push_to_hub, got it without"),
        (
            [*EVALUATION, "--save_strategy", "best"],
            "--save_strategy best needs --metric_for_best_model, got it without",
        ),
        ([*EVALUATION, "--eval_steps", "-1"], "--eval_steps: expected a positive number, got -1.0"),
        (["--save_steps", "0"], "--save_steps: expected a positive number, got 0"),
        (["--max_grad_norm", "nan"], "--max_grad_norm: expected 0 or a positive, finite number, got nan"),
        (["--adam_beta1", "1"], "--adam_beta1: expected a number from 0 to 1, less than 1, got 1.0"),
        (["--output_dir", ""], "--output_dir: expected the folder for checkpoints and the trained model, got none"),
        (["--resume_from_checkpoint", ""], "--resume_from_checkpoint: expected a name or a path, got an empty text"),
        (["--dataset_name="], "--dataset_name: expected a name or a path, got an empty text"),
        (["--train_file", "a", ""], "--train_file: expected a name or a path, got an empty text"),
        (["--teacher_cache", ""], "--teacher_cache: expected a name or a path, got an empty text"),
        (["--deepspeed", "no.json"], "--deepspeed: expected JSON, or a file of it, got no.json: "),
        (["--deepspeed", "/"], "--deepspeed: expected JSON, or a file of it, got /: .*Is a directory"),
        (["--lr_scheduler_kwargs", "{bad"], "--lr_scheduler_kwargs: expected JSON, or a file of it, got {bad: "),
        (
            ["--accelerator_config", "no.json"],
            "--accelerator_config: expected JSON, or a file of it, got no.json: .*No ",
        ),
        (["--fsdp", "--fsdp_config", "no.json"], "--fsdp_config: expected JSON, or a file of it, got no.json: .*No "),
        (["--optim=sgd", "--optim_args=momentum=x"], "--optim_args: expected name=value, as --optim sgd has them, got"),
        (["--seed", "-1"], "--seed: expected a number from 0 to 2.32 - 1, got -1"),
        (["--dataloader_num_workers", "-1"], "--dataloader_num_workers: expected 0 .*, got -1"),
        (
            ["--accelerator_config", '{"foo": 1}'],
            "--accelerator_config: expected fields of .*unexpected keyword .*'foo'",
        ),
        (["--learning_rate", "-1"], "--learning_rate: expected 0 or a positive, finite number, got -1.0"),
        (["--weight_decay", "nan"], "--weight_decay: expected 0 or a positive, finite number, got nan"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps: expected at least 1, got 0"),
        (["--num_train_epochs", "0"], "--num_train_epochs: expected a positive, finite number, got 0"),
        (["--num_train_epochs", "nan"], "--num_train_epochs: expected a positive, finite number, got nan"),
        (["--suffix_tokens", "1", "--split_strategy", "random_token_fixed"], "suffix_tokens: expected 0"),
        (["--suffix_tokens", "9"], "--suffix_tokens is for --split_strategy random_token_fixed"),
        (["--max_document_tokens", "2"], "--max_document_tokens: expected at least 3, got 2"),
        (["--language", "english"], "language: expected an ISO 639 code"),
        (["--chunk_overlap_tokens", "9", "--long_documents", "cut"], "--chunk_overlap_tokens is for --long_documents"),
        (["--method", "cd", "--long_documents", "cut"], "--long_documents is for --method disc, ft, split_ft,"),
        (["--method", "cd", "--num_splits", "3"], "--num_splits is for --method disc, split_ft; got it with"),
        (["--method", "cd", "--teacher_template", "{{ prefix }}"], "--teacher_template is for --method disc;"),
        (["--method", "cd", "--text_column", "body"], "--text_column is for --method disc, ft, split_ft, ft_kl,"),
        (["--teacher_system_prompt", "x"], "--teacher_system_prompt is for --method cd; got it with --method disc"),
        (["--method", "ft", "--temperature", "1"], "--temperature is for --method disc, cd; got it with --method ft,"),
        (["--method", "ft_kl", "--ce_weight", "1"], "--ce_weight is for --method disc, cd; got"),
        (["--method", "talr", "--suffix_tokens", "9"], "--suffix_tokens is for --method disc, split_ft; got"),
        (["--method", "talr", "--sentence_tokenization", "sentence"], "--sentence_tokenization is for --method"),
        (["--method", "ft", "--teacher_name_or_path", "t"], "--teacher_name_or_path is for --method disc, cd, ft_kl;"),
        (
            ["--method", "split_ft", "--teacher", "cache", "--teacher_cache", "d"],
            "--teacher is for --method disc, cd, ft",
        ),
        (["--method", "split_ft", "--ce_weight", "1"], "--ce_weight is for --method disc, cd; got it with"),
        (["--method", "split_ft", "--teacher_template", "{{ prefix }}"], "--teacher_template is for --method disc;"),
        (["--method", "talr", "--teacher", "copy"], "--teacher is for --method disc, cd, ft_kl; got"),
        (["--teacher_ema_decay", "0.9"], "--teacher_ema_decay is for --teacher ema, got it with --teacher auto"),
        (["--teacher", "copy", "--teacher_sync_steps", "9"], "--teacher_sync_steps is for --teacher ema, got it with"),
        (["--teacher", "ema", "--teacher_ema_decay", "1"], "--teacher_ema_decay: expected a number from 0 to 1, less"),
        (
            ["--teacher", "ema", "--teacher_sync_steps", "-1"],
            r"--teacher_sync_steps: expected 0 \(an average\) or more",
        ),
        (
            ["--teacher", "ema", "--teacher_sync_steps", "9", "--teacher_ema_decay", "0.9"],
            "expected one of --teacher_ema_decay and --teacher_sync_steps, got both",
        ),
        (
            ["--teacher", "ema", "--teacher_cache", "d"],
            "--teacher_cache DIR needs --teacher cache, got it with --teacher ema",
        ),
        (
            ["--teacher", "cache", "--teacher_cache", "d", "--teacher_ema_decay", "0.9"],
            "--teacher_ema_decay is for --teacher ema, got it with --teacher cache",
        ),
        (["--teacher", "ema", "--teacher_name_or_path", "t"], "--teacher ema is the model itself; got another with"),
        (
            ["--teacher", "ema", "--method", "ft_kl"],
            "--teacher ema is for --method disc, cd; got it with --method ft_kl",
        ),
        (
            ["--teacher", "ema", "--replay_file", "r", "--replay_objective", "kl"],
            "--teacher ema: --replay_objective kl needs the initial model",
        ),
        (["--kl_weight", "0.2"], "--kl_weight is for --method ft_kl; got it with --method disc"),
        (["--method", "ft_kl", "--kl_weight", "-1"], "--kl_weight: expected 0 or a positive, finite number, got -1.0"),
        (["--kl_clip", "0"], "--kl_clip: expected a positive, finite number, got 0.0"),
        (["--kl_clip", "inf"], "--kl_clip: expected a positive, finite number, got inf"),
        (["--method", "ft", "--kl_clip", "1"], "--kl_clip is for --method disc, cd, ft_kl; got it with --method ft"),
        (["--ce_weight", "nan"], "--ce_weight: expected 0 or a positive, finite number, got nan"),
        (["--method", "ft", "--divergence", "jsd"], "--divergence is for --method disc, cd; got it with --method ft"),
        (["--beta", "0.3"], "--beta is for --divergence jsd, got it with forward_kl"),
        (["--divergence", "jsd", "--beta", "1"], "--beta: expected a number between 0 and 1, got 1.0"),
        (["--lora_alpha", "8"], "--lora_alpha needs --lora_rank, got it without"),
        (["--lora_target_modules", "q_proj"], "--lora_target_modules needs --lora_rank, got it without"),
        (["--lora_dropout", "0"], "--lora_dropout needs --lora_rank, got it without"),
        (["--lora_rank", "-1"], r"--lora_rank: expected 0 \(no adapters\) or more, got -1"),
        (["--lora_rank", "4", "--lora_alpha", "0"], "--lora_alpha: expected a positive number, got 0"),
        (["--lora_rank", "4", "--lora_dropout", "1"], "--lora_dropout: expected a number from 0 to 1, less than 1"),
        (["--teacher", "adapter"], "--teacher adapter is the model without its adapters, so it needs --lora_rank"),
        (["--teacher", "adapter", "--lora_rank", "4", "--teacher_name_or_path", "t"], "--teacher adapter is the model"),
        (["--replay_share", "0.5"], "--replay_share needs --replay_file, got it without"),
        (["--replay_objective", "kl"], "--replay_objective needs --replay_file, got it without"),
        (["--replay_file", "r", "--replay_share", "1"], "--replay_share: expected a number between 0 and 1, got 1.0"),
        (["--dataset_name", "d"], "one of --train_file and --dataset_name, got both"),
    ],
)
def test_what_is_wrong_is_named(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments([*REQUIRED, *flags])


EVALUATED = [*REQUIRED, *EVALUATION, "--load_best_model_at_end"]


@pytest.mark.parametrize(
    ("method", "metric", "others"),
    [("disc", "eval_foo", "loss, cross_entropy, kl"), ("ft", "eval_kl", "loss, cross_entropy"), ("talr", "kl", "loss")],
)
def test_a_metric_that_the_method_does_not_measure(method, metric, others):
    message = f"--metric_for_best_model: expected one of {others}.* which --method {method} measures, got {metric}"
    with pytest.raises(ValueError, match=message):
        parse_arguments([*EVALUATED, "--method", method, "--metric_for_best_model", metric])


@pytest.mark.parametrize("metric", ["eval_kl", "cross_entropy", "loss"])
def test_less_is_better_of_whatever_is_measured(metric):
    """transformers takes all but losses for what should be large."""
    _, loop = parse_arguments([*EVALUATED, "--metric_for_best_model", metric])
    assert loop.greater_is_better is False


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "ft", "--teacher", "copy"],
        ["--method", "talr", "--teacher_name_or_path", "t"],
        ["--method", "cd", "--text_column", "body"],
        ["--method", "cd", "--max_document_tokens", "9"],
    ],
)
def test_replay_by_kl_has_documents_and_a_teacher_of_its_own(flags):
    with pytest.raises(ValueError, match="is for --method"):
        parse_arguments([*REQUIRED, *flags, "--replay_file", "r"])
    parse_arguments([*REQUIRED, *flags, "--replay_file", "r", "--replay_objective", "kl"])


@pytest.mark.parametrize("flag", ["--deepspeed", "--fsdp_config", "--gradient_checkpointing_kwargs"])
def test_a_file_of_json_that_is_no_object(flag, tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match=f"{flag}: expected JSON, or a file of it, got .*list.json: "):
        parse_arguments([*REQUIRED, "--fsdp", "--gradient_checkpointing", flag, str(tmp_path / "list.json")])


def test_settings_in_a_file_of_json(tmp_path):
    (tmp_path / "cycles.json").write_text('{"num_cycles": 2}')
    flags = ["--lr_scheduler_type", "cosine_with_restarts", "--lr_scheduler_kwargs", str(tmp_path / "cycles.json")]
    assert parse_arguments([*REQUIRED, *flags])[1].lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize(
    "flags",
    [["--method", "sft"], ["--num_splits", "two"], ["--learning_rate", "fast"], ["--ddp_backend", "nonsense"]],
)
def test_argparse_refuses_what_has_the_wrong_form(flags):
    with pytest.raises(ValueError, match=f"argument {flags[0]}.*: invalid"):
        parse_arguments([*REQUIRED, *flags])


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, r"--use_cpu: expected the 2 processes that were started .* got 1 on cpu: add --use_cpu"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}, "--num_processes: accelerate launch was asked for"),
    ],
)
def test_processes_that_would_each_train_alone_are_refused(variables, message, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        parse_arguments(REQUIRED[:-2])


def test_required_flags():
    with pytest.raises(ValueError, match="--output_dir"):
        parse_arguments(REQUIRED[:4])
    with pytest.raises(ValueError, match="one of --train_file and --dataset_name, got neither"):
        parse_arguments([*REQUIRED[:2], *REQUIRED[4:]])


def test_the_choices_are_checked_from_python_too():
    with pytest.raises(ValueError, match="--attention: expected one of auto, sdpa, flex, varlen, got fast"):
        DiscArguments("m", train_file="f", attention="fast")


def test_the_authors_settings():
    """The table in the paper, setting by setting."""
    disc, loop = parse_arguments([str(ROOT / "examples" / "paper_qwen2.5_7b.yaml"), "--use_cpu"])
    assert isinstance(loop, LoopArguments)
    assert disc.model_name_or_path == "Qwen/Qwen2.5-7B-Instruct"
    assert (disc.method, disc.split_strategy, disc.num_splits) == ("disc", "sentence_boundary", 5)
    assert (disc.sentence_tokenization, disc.temperature) == ("sentence", 2.0)
    assert (loop.learning_rate, loop.weight_decay, loop.adam_epsilon) == (3e-6, 0.01, 1e-8)
    assert (loop.adam_beta1, loop.adam_beta2) == (0.9, 0.999)
    assert (loop.lr_scheduler_type, loop.warmup_steps, loop.max_grad_norm) == ("constant", 0, 0)
    assert (disc.student_dtype, loop.bf16, disc.teacher) == ("float32", True, "copy")
    assert (loop.per_device_train_batch_size, loop.gradient_accumulation_steps) == (1, 1)
    assert (loop.num_train_epochs, loop.seed) == (1, 1234)
