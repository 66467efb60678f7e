"""Take the runs of a sweep, which lists in the YAML describe: a folder for each, and one table of what came of them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from transformers.trainer import TRAINER_STATE_NAME

from disc_train.config import DiscArguments, parse_arguments
from disc_train.evaluation.probes import list_groups
from disc_train.flags import flag_names, read_config
from disc_train.loop_config import LoopArguments
from disc_train.parallel.launch import processes_started
from disc_train.parallel.termination import Terminated

SWEPT = ("learning_rate", "temperature", "num_splits", "ce_weight", "lora_rank")
PROBES = "eval_probes_"
COMMAND = [sys.executable, "-m", "disc_train.cli"]


class Planned(NamedTuple):
    """Hold a run of a sweep: its values of what is swept, and its command line."""

    values: dict[str, Any]
    argv: list[str]

    @property
    def name(self) -> str:
        return "_".join(f"{key}={value}" for key, value in self.values.items())


def parse_sweep(argv: Sequence[str]) -> Callable[[], None] | None:
    """Return what runs a sweep; None: the YAML file has no lists of values, so that it is one run.

    A dry run is that of the first.

    Raises:
        ValueError: any of the runs cannot be, or several processes were started.
    """
    config, given = read_config(argv)
    over = flag_names(given)
    lists = {key: config[key] for key in SWEPT if isinstance(config.get(key), list) and key not in over}
    if not lists:
        return None
    if processes_started() > 1:
        raise ValueError("a sweep starts its runs itself: expected one process, got several, of a launcher")
    combinations = [dict(zip(lists, values, strict=True)) for values in product(*lists.values())]
    if not combinations:
        raise ValueError(f"{', '.join(lists)}: expected values, got an empty list")
    flags = [[f"--{key}={value}" for key, value in values.items()] for values in combinations]
    parsed = [parse_arguments([*argv, *each]) for each in flags]
    disc, loop = parsed[0]
    if disc.dry_run:
        from disc_train.run import run

        return partial(run, disc, loop)
    runs = [
        Planned(values, [*argv, *each, *_folders(arguments, parsed, values)])
        for values, each, arguments in zip(combinations, flags, parsed, strict=True)
    ]
    settings = {"config": {key: value for key, value in config.items() if key not in lists}, "flags": given}
    return partial(run_sweep, runs, Path(str(loop.output_dir)), settings, list_groups(disc.probes_file or ()))


def _folders(
    arguments: tuple[DiscArguments, LoopArguments],
    every: Sequence[tuple[DiscArguments, LoopArguments]],
    values: dict[str, Any],
) -> list[str]:
    """Write the flags of a run's own folders; runs share the teacher's cache as far as it serves them."""
    name = Planned(values, []).name
    flags = [f"--output_dir={Path(str(arguments[1].output_dir), name)}", "--resume_from_checkpoint=true"]
    kinds = [_kind_of_cache(disc) for disc, _ in every]
    if arguments[0].teacher_cache and len(set(kinds)) > 1:
        flags.append(f"--teacher_cache={Path(arguments[0].teacher_cache, _kind_of_cache(arguments[0]))}")
    return flags


def _kind_of_cache(disc: DiscArguments) -> str:
    """Name what a run's cache may hold: summaries are of one temperature, and of frozen heads alone."""
    frozen = disc.freeze_head or disc.lora_rank or disc.freeze_layers
    return f"temperature={disc.temperature:g}{'_lora' * bool(disc.lora_rank)}" if frozen else "hidden_states"


def run_sweep(runs: Sequence[Planned], folder: Path, settings: dict[str, Any], groups: Sequence[str]) -> None:
    """Take what is left of the runs, and write sweep.json, sweep.md and sweep.png into the folder after each.

    Args:
        groups: of the probes, what is to be learned first.

    Raises:
        ValueError: the folder holds another sweep; or a run has failed, and the others were taken.
        Terminated, KeyboardInterrupt: a signal stopped the run in progress, from which the same command goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "sweep.json"
    rows, picture = _read_rows(file, settings), ""
    for number, planned in enumerate(runs, start=1):
        print(f"run {number} of {len(runs)}: {planned.name}", flush=True)
        if "failed" in rows.get(planned.name, {"failed": None}):
            log = folder / f"{planned.name}.log"
            code = _run_process(planned.argv, log)
            rows[planned.name] = {"values": planned.values, **_outcome(code, log, folder / planned.name, groups)}
            _write(file, json.dumps({"settings": settings, "runs": rows}, indent=2))
            picture = draw(rows, file.with_suffix(".png"))
            _write(file.with_suffix(".md"), _table(rows, picture))
        print(f"  {_summary(rows[planned.name])}", flush=True)
    print(f"the table is in {file.with_suffix('.md')}. {picture}".rstrip())
    if failed := [name for name, row in rows.items() if "failed" in row]:
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed ({', '.join(failed)}); see {folder}/*.log")


def _read_rows(file: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Read the rows of a sweep that was begun; its lists may have been others."""
    if not file.exists():
        return {}
    known = json.loads(file.read_text(encoding="utf-8"))
    for part, now in json.loads(json.dumps(settings)).items():
        if known["settings"][part] != now:
            raise ValueError(
                f"--output_dir: {file.parent} holds a sweep of other settings than its lists: expected {part}"
                f" {known['settings'][part]}, got {now}: choose another folder"
            )
    rows: dict[str, dict[str, Any]] = known["runs"]
    return rows


def _run_process(argv: Sequence[str], log: Path) -> int:
    """Run `disc-train` in a process of its own, with its output in a file, and return its exit code.

    A process that this one leaves for a signal is waited for, while it saves a checkpoint.
    """

    def stop(*_: Any) -> None:
        raise Terminated("terminated; the same command goes on from there", signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen([*COMMAND, *argv], stdout=output, stderr=output)
        try:
            return process.wait()
        except Terminated:
            process.terminate()
            process.wait()
            raise
        except KeyboardInterrupt:  # the terminal has interrupted it as well
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


def _outcome(code: int, log: Path, folder: Path, groups: Sequence[str]) -> dict[str, Any]:
    """Read what came of a run: what it logged first and last of each number, groups of probes in their order."""
    if code != 0:
        lines = log.read_text(encoding="utf-8").splitlines()
        errors = [line for line in lines if "error:" in line] or lines
        return {"failed": errors[-1] if errors else f"exit code {code}"}
    history = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["log_history"]
    names = [
        name
        for name in dict.fromkeys(name for entry in history for name in entry)
        if name in ("loss", "eval_loss", "eval_cross_entropy", "eval_kl") or name.startswith(PROBES)
    ]
    asked = [f"{PROBES}{group}_{measure}" for group in groups for measure in ("accuracy", "logprob")]
    names = [name for name in asked if name in names] + [name for name in names if name not in asked]
    logged = {name: [entry[name] for entry in history if name in entry] for name in names}
    return {
        "first": {name: values[0] for name, values in logged.items()},
        "last": {name: values[-1] for name, values in logged.items()},
    }


def _summary(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"failed: {row['failed']}"
    return ", ".join(f"{_label(name)} {_cell(row, name)}" for name in row["last"])


def _table(rows: dict[str, dict[str, Any]], picture: str) -> str:
    """Write the runs as a table in Markdown, and below it what its numbers are and a sentence on the picture."""
    finished = [row for row in rows.values() if "failed" not in row]
    keys = list(next(iter(rows.values()))["values"])
    names = list(dict.fromkeys(name for row in finished for name in row["last"]))
    lines = [f"| {' | '.join([*keys, *map(_label, names), 'outcome'])} |", "|---" * (len(keys) + len(names) + 1) + "|"]
    for row in rows.values():
        cells = [str(value) for value in row["values"].values()] + [_cell(row, name) for name in names]
        lines.append(f"| {' | '.join([*cells, row.get('failed', 'finished').replace('|', '/')])} |")
    notes = f"Numbers are those logged last; of probes and of the loss, first -> last. {picture}"
    return "\n".join(["# Sweep", "", *lines, "", notes, ""])


def _label(name: str) -> str:
    return name.removeprefix(PROBES).removeprefix("eval_").replace("_", " ")


def _cell(row: dict[str, Any], name: str) -> str:
    if name not in row.get("last", {}):
        return "-"
    last = f"{row['last'][name]:.4g}"
    return f"{row['first'][name]:.4g} -> {last}" if name == "loss" or name.startswith(PROBES) else last


def trade_off(row: dict[str, Any]) -> tuple[float, float] | None:
    """Compute a run's uptake, the rise of the first group of probes, and its retention, the mean rise of the others.

    In accuracy where the probes have choices, else in nats a token; None: there are no two groups.
    """
    measure = "_accuracy" if any(name.endswith("_accuracy") for name in row.get("last", {})) else "_logprob"
    names = [name for name in row.get("last", {}) if name.startswith(PROBES) and name.endswith(measure)]
    if len(names) < 2:
        return None
    uptake, *others = (row["last"][name] - row["first"][name] for name in names)
    return uptake, sum(others) / len(others)


def draw(rows: dict[str, dict[str, Any]], path: Path) -> str:
    """Draw uptake against retention, and say in a sentence what the picture has, or why there is none."""
    points = {name: point for name, row in rows.items() if (point := trade_off(row)) is not None}
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return f"There is no {path.name}: pip install matplotlib draws one after the next run."
    if not points:
        return (
            f"There is no {path.name}: it takes --probes_file of two groups, what is to be learned and what to be kept."
        )
    figure = Figure(figsize=(10, max(6, 1 + len(points) / 5)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (name, (uptake, retention)) in enumerate(points.items()):
        marker, label = "os^Dv"[number // 10 % 5], name.replace("_", " ")
        axes.scatter([uptake], [retention], color=f"C{number % 10}", marker=marker, label=label)
    figure.legend(loc="outside right upper", fontsize=8)  # beside points that lie together names would overlap
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("uptake: rise of the first group of probes")
    axes.set_ylabel("retention: mean rise of the others")
    axes.margins(0.2)
    figure.savefig(path, dpi=100)
    return f"{path.name} has the uptake of the first group of probes against the change of all others."


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
