"""End a training with a checkpoint on SIGTERM, which schedulers send, and on the first Ctrl-C."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from torch.utils.data import get_worker_info
from transformers import TrainerCallback

SIGNALS = (signal.SIGTERM, signal.SIGINT)
INTERRUPTED = (
    "\ninterrupted: the running step and at most one more are finished, then a checkpoint is saved;"
    " a second Ctrl-C stops at once without saving\n"
)


class Terminated(Exception):
    """Say that the training was asked to stop, by which signal, and has saved a checkpoint."""

    def __init__(self, message: str, signal: signal.Signals) -> None:
        super().__init__(message)
        self.signal = signal


class StopOnSignal(TrainerCallback):
    """Finish the running optimizer step and at most one more, save and stop on a signal, while entered as a context.

    A second Ctrl-C ends the process as if nobody had caught it. Processes are signalled at different times, or only
    some of them, but have to stop after the same step: the trainer asks each before a step, and tells all.
    """

    requested: signal.Signals | None = None  # the signal that this process got
    agreed: signal.Signals | None = None  # that a process had got before the step that runs, after which all stop

    def __enter__(self) -> None:
        self.requested = self.agreed = None
        # Python lets no other thread; and there, whoever started the thread decides what becomes of signals.
        main_thread = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, self._request) for number in SIGNALS} if main_thread else {}

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def votes(self) -> list[int]:
        """Count, for each of SIGNALS, whether this process got it; the trainer adds up those of all processes."""
        return [number == self.requested for number in SIGNALS]

    def agree(self, votes: list[int]) -> None:
        """Take the sum of all processes' votes."""
        self.agreed = next((number for number, count in zip(SIGNALS, votes, strict=True) if count), None)

    def _request(self, number: int, _: Any) -> None:
        self.requested = signal.Signals(number)
        if self.requested == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next one stops even a process that waits for others
            if os.environ.get("RANK", "0") == "0":
                os.write(2, INTERRUPTED.encode())  # what is printed here could meet another print halfway


def collate_in_own_process_group(collate: Callable[[Any], Any], examples: Any) -> Any:
    """Collate examples; in a data loader's worker, leave the process group that receives signals first.

    torchrun, batch systems and terminals signal whole groups, and a step cannot come to its end without the workers'
    batches. They end with their process all the same.
    """
    if get_worker_info() is not None:
        os.setpgid(0, 0)
    return collate(examples)
