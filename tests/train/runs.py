"""Start `disc-train` in processes of its own, and read what a run has saved."""

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import socket
import sys
import time

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

from disc_train.cli import main
from tests import forkserver


def weights(folder):
    """Read every weight of a saved model, in one float32 tensor."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def losses(folder):
    """Read the losses that a run logged."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def skip_unless_resumable(world):
    """Skip a test where transformers cannot load an optimizer into so many processes on the CPU."""
    if world > 1 and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("this transformers cannot load an optimizer into several processes on the CPU")


def start_processes(argvs, environments, folders, logs, prepare=None):
    """Start the command once for each of some command lines, in processes that find everything imported already."""
    processes = [
        forkserver.context().Process(target=_run_command, args=(*arguments, prepare))
        for arguments in zip(argvs, environments, folders, logs, strict=True)
    ]
    for process in processes:
        process.start()
    return Started(processes, logs)


def environments_of(world):
    """Make the variables that torchrun gives each of so many processes; none for one."""
    if world == 1:
        return [{}]
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    each = [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(world)]
    return [{name: str(value) for name, value in variables.items()} for variables in each]


def _run_command(argv, environment, folder, log, prepare):
    """Run the command in a started process, with its output in a file."""
    gc.freeze()  # what was imported is not looked through for garbage
    multiprocessing.set_start_method("fork", force=True)  # for the workers of data loaders
    os.setsid()  # as torchrun does
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would these
    os.chdir(folder)
    os.environ |= environment
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if prepare is not None:
        prepare()
    sys.exit(main(argv))


class Started:
    """Hold the processes of one run: `wait` gives exit codes, negative for a signal, and `logs` what they print."""

    def __init__(self, processes, logs):
        self.processes, self.paths = processes, logs

    def wait(self, timeout=120):
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [process for process in self.processes if process.is_alive()]
        for process in hung:
            process.kill()
        assert not hung, "\n".join(self.logs)
        return [process.exitcode for process in self.processes]

    @property
    def logs(self):
        return [path.read_text() for path in self.paths]
