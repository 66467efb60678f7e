"""Check that the processes that a launcher started train together, and do not each train alone."""

import os

from transformers import TrainingArguments

# A launcher that starts a process for each rank tells it one of these.
RANKS = ("RANK", "LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def processes_started() -> int:
    """Return how many processes torchrun, or another launcher, says that it has started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_launched() -> bool:
    """Return whether a launcher started this process, perhaps as the only one."""
    return bool(os.environ.keys() & set(RANKS))


def check_launch(args: TrainingArguments) -> None:
    """Raise ValueError if several processes were asked for, and they do not train together."""
    started = processes_started()
    if args.world_size != started:
        raise ValueError(
            f"--use_cpu: expected the {started} processes that were started (WORLD_SIZE) to train together, got"
            f" {args.world_size} on {args.device.type}: add --use_cpu true to train on the CPU, or start one process an"
            " accelerator with torchrun"
        )
    # What `accelerate launch` sets for several processes before it starts one, for want of several accelerators.
    if {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= os.environ.keys() and not is_launched():
        raise ValueError(
            "--num_processes: accelerate launch was asked for several processes and started one, as it does on a CPU:"
            " start them with torchrun --nproc_per_node, or add --multi_gpu to accelerate launch"
        )
