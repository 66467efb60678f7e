"""Show the progress of whatever takes longer than two seconds: a bar on a terminal, plain lines elsewhere.

Nothing heavy is imported at the top: this also says that something heavy is being imported.
"""

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

DELAY = 2.0  # seconds before anything is shown
LONGEST_SILENCE = 60.0  # seconds between lines, which come at doubling times until then

Batch = TypeVar("Batch", bound=Sequence[Any])


def hide_bars_off_terminals() -> None:
    """Let transformers draw no bars ("Loading weights") where stderr is a file or a pipe."""
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()


@contextmanager
def say_if_slow(what: str) -> Iterator[None]:
    """Print on stderr, in the first of several processes, what a block does if it takes longer than two seconds."""
    timer = threading.Timer(DELAY, print, [what], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if os.environ.get("RANK", "0") == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def show_progress(batches: Iterable[Batch], total: int, what: str) -> Iterator[Batch]:
    """Yield batches, and show on stderr, in the first of several processes, how many of their items are done.

    Args:
        total: the number of items in all batches.
        what: the items and what happens to them, as in "choices scored".
    """
    import torch.distributed as dist
    from tqdm import tqdm

    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        yield from batches
        return
    if sys.stderr.isatty():
        with tqdm(total=total, desc=what, delay=DELAY, leave=False) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch))
        return
    start, next_line, done = time.monotonic(), DELAY, 0
    for batch in batches:
        yield batch
        done += len(batch)
        elapsed = time.monotonic() - start
        if elapsed >= next_line or (done == total and next_line > DELAY):
            print(f"{what}: {done:,} of {total:,} in {elapsed:.0f} s", file=sys.stderr, flush=True)
            next_line = elapsed + min(elapsed, LONGEST_SILENCE)
