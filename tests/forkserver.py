"""Start processes that find everything imported already: importing takes each of them seconds."""

import multiprocessing
from typing import Any

IMPORTED = (
    "pytest",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "tests.linear_kl.oracle",
    "disc_train.run",
    "transformers.models.llama.modeling_llama",
    "tests.train.runs",
)


def context() -> Any:
    """Return the context of processes that are forked from a server, one a test session."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(list(IMPORTED))
    return made
