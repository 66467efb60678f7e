"""Make every run of a grid that has not been made yet, and write the page that shows them.

    python examples/reproduction/reproduce.py                                       # the small grid, on two CPU cores
    python examples/reproduction/reproduce.py examples/reproduction/gpu.yaml --jobs 1

Every result is appended to runs.jsonl in the output folder as soon as it is there: what is interrupted goes on where it
stopped. Exit code 1 if the initial model is no teacher, 130 if it was interrupted.
"""

import argparse
import multiprocessing
import platform
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import transformers
from cells import Cell, Grid, read_grid
from page import compared, write_page
from results import Initial, Results, one_writer
from update import Laboratory

from disc_train.teacher_cache.identity import weights_checksum

HERE = Path(__file__).resolve().parent

_laboratory: Laboratory  # each process has one


def _open_laboratory(grid: Grid) -> None:
    global _laboratory
    # Products this small gain nothing from a second thread, and every job has one core.
    torch.set_num_threads(1)
    _laboratory = Laboratory(grid.model, grid.device, grid.pretraining_steps)


def _result(task: Cell | Initial) -> dict[str, Any]:
    return _laboratory.run(task) if isinstance(task, Cell) else _laboratory.initial(*task)


def make_runs(grid: Grid, results: Results, jobs: int) -> None:
    """Make what `results` lacks: first the initial model on every seed's documents, then the runs.

    Raises:
        ValueError: the initial model fails the gate, or the results are of another one.
    """
    ours = environment(grid)
    for each in results.environments:
        if each.get("model", ours["model"]) != ours["model"]:
            raise ValueError(
                f"{results.path}: expected runs of {grid.model} ({ours['model']}), got those of another model"
                f" ({each['model']}); choose another --output_dir"
            )
    cells = list(grid.cells())
    documents = list(dict.fromkeys(Initial.of(cell) for cell in cells))
    # Processes that are started anew, since a fork takes half of what threads were doing along.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _open_laboratory, (grid,)) as pool:
        try:
            _make(documents, results, ours, pool)
            check_gate(grid, results, documents)
            _make(cells, results, ours, pool)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _make(tasks: Sequence[Cell | Initial], results: Results, ours: dict[str, str], pool: ProcessPoolExecutor) -> None:
    missing = [task for task in tasks if task not in results]
    if missing:
        results.add_environment(ours)
    start = time.monotonic()
    futures = {pool.submit(_result, task): task for task in missing}
    for number, future in enumerate(as_completed(futures), start=1):
        results.add(futures[future], future.result())
        print(f"{number} of {len(missing)} in {time.monotonic() - start:.0f} s: {futures[future]}", flush=True)


def check_gate(grid: Grid, results: Results, documents: Sequence[Initial]) -> None:
    """Raise ValueError unless the initial model reads the documents of every seed, and can do what it may forget."""
    for task in documents:
        if task.wrong or task.joined > 1:
            continue  # how well it reads such documents is part of what is measured
        initial = results[task]
        shares = {f"facts in context, {form}": score["accuracy"] for form, score in initial["in_context"].items()}
        shares |= {group: score["accuracy"] for group, score in initial["kept"].items()}
        for name, share in shares.items():
            if share < grid.min_accuracy:
                raise ValueError(
                    f"{grid.model}: expected an initial model that gets at least {grid.min_accuracy:.0%} right of"
                    f" everything that it is to teach or to keep, got {share:.0%} of: {name} ({task})"
                )


def environment(grid: Grid) -> dict[str, str]:
    return {
        "model": f"{weights_checksum(str(grid.model))[:12]} after {grid.pretraining_steps} steps",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, nargs="?", default=HERE / "cpu.yaml")
    parser.add_argument("--output_dir", type=Path, help="default: runs/reproduction/ and the grid's name")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--seeds", type=int, help="only the first so many of every row's seeds")
    args = parser.parse_args(argv)
    for flag, count in (("--jobs", args.jobs), ("--seeds", args.seeds)):
        if count is not None and count < 1:
            parser.error(f"{flag}: expected at least 1, got {count}")
    output_dir = args.output_dir or Path("runs") / "reproduction" / args.grid.stem
    try:
        from plot import write_plot  # needs matplotlib, better missed before the runs than after them

        grid = read_grid(args.grid, args.seeds)
        output_dir.mkdir(parents=True, exist_ok=True)
        with one_writer(output_dir):
            results = Results(output_dir / "runs.jsonl")
            make_runs(grid, results, args.jobs)
            write_page(grid, results, output_dir)
            write_plot(grid, results, output_dir / "tradeoff.png")
        committed = HERE / "results" / args.grid.stem / "runs.jsonl"
        if committed.exists() and committed.resolve() != results.path.resolve():
            print(compared(grid, results, Results(committed)))
    except (ValueError, OSError, ImportError, BrokenExecutor) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{output_dir / 'results.md'}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else the jobs would be left behind
    sys.exit(main())
