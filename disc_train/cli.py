"""Run the commands `disc-train`, `disc-cache`, `disc-eval` and `disc-generate`.

Exit code 0 if it did what was asked, 1 if the run failed, 2 if the call was wrong, 130 if it was interrupted, 143 if it
was terminated. Of several processes that end with the same error, one reports it.
"""

import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from disc_train.progress import hide_bars_off_terminals, say_if_slow


def main(argv: Sequence[str] | None = None) -> int:
    """Run `disc-train [CONFIG.yaml] [--flag value ...]`, or a sweep. Errors a user can mend are one line on stderr."""
    return _run("disc-train", _train, argv)


def cache(argv: Sequence[str] | None = None) -> int:
    """Run `disc-cache [CONFIG.yaml] [--flag value ...]`, with the flags of `disc-train --teacher cache`."""
    return _run("disc-cache", _cache, argv)


def evaluate(argv: Sequence[str] | None = None) -> int:
    """Run `disc-eval [CONFIG.yaml] [--flag value ...]`."""
    return _run("disc-eval", _evaluate, argv)


def generate(argv: Sequence[str] | None = None) -> int:
    """Run `disc-generate [CONFIG.yaml] [--flag value ...]`."""
    return _run("disc-generate", _generate, argv)


# Each reads a command line and returns what it asks for. Imports are inside: torch and transformers take seconds.


def _train(argv: Sequence[str]) -> Callable[[], None]:
    from disc_train.config import parse_arguments
    from disc_train.run import run
    from disc_train.sweep import parse_sweep

    return parse_sweep(argv) or partial(run, *parse_arguments(argv))


def _cache(argv: Sequence[str]) -> Callable[[], None]:
    from disc_train.config import parse_arguments
    from disc_train.run import fill_cache

    return partial(fill_cache, *parse_arguments(argv, "disc-cache"))


def _evaluate(argv: Sequence[str]) -> Callable[[], None]:
    from disc_train.evaluation.config import parse_arguments
    from disc_train.evaluation.run import run

    return partial(run, parse_arguments(argv))


def _generate(argv: Sequence[str]) -> Callable[[], None]:
    from disc_train.generation.config import parse_arguments
    from disc_train.generation.run import run

    return partial(run, parse_arguments(argv))


def _run(command: str, read: Callable[[Sequence[str]], Callable[[], None]], argv: Sequence[str] | None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line when it is printed
    try:
        return _read_and_work(command, read, sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        return _failed(command, "interrupted", 130)


def _read_and_work(command: str, read: Callable[[Sequence[str]], Callable[[], None]], argv: Sequence[str]) -> int:
    if "--version" in argv:  # known without what the flags' definitions import, which takes ten seconds
        print(f"{command} {_version()}")
        return 0
    slow = say_if_slow(f"{command}: importing PyTorch and transformers ...") if sys.stderr.isatty() else nullcontext()
    try:
        with slow:
            work = read(argv)
    except SystemExit as exit_:  # argparse has printed its help
        return int(exit_.code or 0)
    except (ValueError, OSError, ImportError) as error:  # on a machine all processes were given the same command line
        return _failed(command, error, 2, quiet=os.environ.get("LOCAL_RANK", "0") != "0")
    from disc_train.parallel.agreement import CommonError
    from disc_train.parallel.termination import Terminated

    hide_bars_off_terminals()
    another_reports = os.environ.get("RANK", "0") != "0"
    try:
        work()
    except CommonError as error:
        return _failed(command, error, 1, quiet=another_reports)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        return _failed(command, error, 1)
    except Terminated as ending:
        return _failed(command, ending, 128 + ending.signal, quiet=another_reports)
    return 0


def _version() -> str:
    try:
        return version("disc-kernels")
    except PackageNotFoundError:  # run from the source tree
        return "(not installed)"


def _failed(command: str, error: Exception | str, code: int, *, quiet: bool = False) -> int:
    if not quiet:
        print(f"{command}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
