"""End a training with a checkpoint on SIGTERM, which schedulers send before they take a machine away."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from torch.utils.data import get_worker_info
from transformers import TrainerCallback


class Terminated(Exception):
    """Say that the training was asked to stop, and has saved a checkpoint."""


class StopOnSigterm(TrainerCallback):
    """Finish the running optimizer step, save and stop on SIGTERM, while entered as a context manager.

    Processes are signalled at different times, or only some of them, but have to stop after the same step: the trainer
    asks each before a step, and tells all.

    Attributes:
        requested: this process got the signal.
        agreed: a process had got it before the step that runs, so all stop after that step.
    """

    def __init__(self) -> None:
        self.requested = self.agreed = False

    def __enter__(self) -> None:
        self.requested = self.agreed = False
        # Python lets no other thread; and there, whoever started the thread decides what becomes of signals.
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._before = signal.signal(signal.SIGTERM, self._request)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def __exit__(self, *_: Any) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._before)

    def _request(self, *_: Any) -> None:
        self.requested = True


def collate_in_own_process_group(collate: Callable[[Any], Any], examples: Any) -> Any:
    """Collate examples; in a data loader's worker, leave the process group that receives signals first.

    torchrun and batch systems signal whole groups, and a step cannot come to its end without the workers' batches. They
    end with their process all the same.
    """
    if get_worker_info() is not None:
        os.setpgid(0, 0)
    return collate(examples)
