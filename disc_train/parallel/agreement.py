"""Check, before processes train together, that they were all given the same run.

One small exchange of Python objects. So processes that were given different flags or files, or of which one cannot go
on, all end with the same error, where collectives that do not fit each other would wait forever.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from transformers import TrainingArguments

from disc_train.config import DiscArguments
from disc_train.data.dataset import ExampleDataset
from disc_train.loop_config import LoopArguments

PER_PROCESS_SETTINGS = {"local_rank", "disable_tqdm"}  # the latter: where stderr goes


class CommonError(ValueError):
    """Say why all processes of a run end, so that only one of them has to report it."""


@contextmanager
def same_on_all_processes(args: TrainingArguments) -> Iterator[dict[str, Any]]:
    """Run a block on every process, and check that it succeeds with the same result on all of them.

    Yields:
        An empty dict for what must be the same: a name, as messages have it, and a value that can be compared.

    Raises:
        CommonError: on all processes alike, naming the first thing they disagree on, or what failed on one of them.
            In a run of one process, what has failed.
        TimeoutError: some processes have not come this far within `--ddp_timeout` seconds.
    """
    facts: dict[str, Any] = {}
    failure = None
    try:
        yield facts
    except (ValueError, OSError, ImportError) as error:
        if args.world_size == 1:
            raise
        failure = error
    if args.world_size == 1:
        return
    everyone: list[Any] = [None] * args.world_size
    try:
        dist.all_gather_object(everyone, (facts, None if failure is None else str(failure)))
    except RuntimeError as error:
        raise TimeoutError(
            f"process {args.process_index} of {args.world_size} waited for the others, but one has ended or did not"
            f" come within {args.ddp_timeout} seconds (--ddp_timeout)"
        ) from error
    failures = {number: text for number, (_, text) in enumerate(everyone) if text is not None}
    if len(failures) == args.world_size and len(set(failures.values())) == 1:
        raise CommonError(failures[0])
    if failures:
        number, text = next(iter(failures.items()))
        raise CommonError(f"process {number} of {args.world_size} cannot go on: {text}")
    for name in facts:
        values = [theirs.get(name) for theirs, _ in everyone]
        for number, value in enumerate(values):
            if value != values[0]:
                raise CommonError(
                    f"{name}: expected the same on all {args.world_size} processes, got {values[0]} on process 0 and"
                    f" {value} on process {number}"
                )


def settings_of(disc: DiscArguments, loop: LoopArguments) -> dict[str, Any]:
    """Return every flag and its value."""
    values = {**vars(disc), **loop.to_dict()}
    return {f"--{name}": repr(value) for name, value in values.items() if name not in PER_PROCESS_SETTINGS}


def describe_data(dataset: ExampleDataset) -> str:
    """Describe how much there is to read, with a checksum of it."""
    checksum = 0
    for number in range(len(dataset)):
        for piece in dataset[number].pieces():
            checksum = zlib.crc32(piece.tobytes(), checksum)
    return f"{len(dataset):,} {dataset.noun}s (checksum {checksum:08x})"
